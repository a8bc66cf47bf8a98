"""Steps a second of one RolloutWorker whose pushes are taken at once."""

from __future__ import annotations

import threading
import time
from typing import Any

from measure import arguments, report

parsed = arguments("env", "lanes")

from actors.rollout import RolloutWorker  # noqa: E402
from actors.weights import pack  # noqa: E402
from learner import DQN  # noqa: E402
from replay.messages import InsertReply, Push  # noqa: E402

lanes = int(parsed.lanes)
module = DQN(parsed.env, num_envs=lanes, eps_start=0.05, eps_end=0.05)


class Sink:
    """Takes every push."""

    waiting_for: str | None = None

    def __init__(self) -> None:
        self.steps = 0

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply:
        self.steps += push.steps
        return InsertReply(env_steps=self.steps, accepted=True)


class Once:
    """The first weights, and no others."""

    version = -1
    pending = False

    def poll(self) -> Any:
        if self.version == 0:
            return None
        self.version = 0
        return pack(module.policy, 0)


sink = Sink()
worker = RolloutWorker(
    module.rollout_spec(), worker=0, workers=1, incarnation=0, replay=sink, weights=Once(), threads=parsed.threads
)
thread = threading.Thread(target=worker.run)
thread.start()
while not sink.steps:
    time.sleep(0.01)
time.sleep(parsed.warm_up)
begun, first = time.perf_counter(), worker.report().env_steps
time.sleep(parsed.seconds)
found = (worker.report().env_steps - first) / (time.perf_counter() - begun)
worker.stop()
thread.join()
report(found, lanes=lanes)
