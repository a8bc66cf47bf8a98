"""From the learner's weights to workers that act with them: Squall's store, or Ray with the state sent by value.

This process is the learner: between versions it computes, and what a publication keeps it from that is the stall. Each
receiver is a process of its own, which looks for new weights every few milliseconds, as a worker does between steps.
"""

from __future__ import annotations

import time
from typing import Any

from measure import arguments, quantile, report

parsed = arguments("way", "receivers")
from services.supervision.ray_environment import set_ray_defaults  # noqa: E402

set_ray_defaults()

import ray  # noqa: E402
import torch  # noqa: E402

from actors.environments import DiscreteActions, EnvironmentSpec  # noqa: E402
from actors.networks import QNetwork  # noqa: E402
from actors.weights import WeightClient, WeightStoreActor, pack, unpack  # noqa: E402
from replay.remote import NAMESPACE, RemoteActor  # noqa: E402

EVERY_SECONDS, LOOK_SECONDS = 0.5, 0.005
PONG = EnvironmentSpec("PongNoFrameskip-v4", (4, 84, 84), "uint8", 4, DiscreteActions(6))
torch.set_num_threads(parsed.threads)


def network() -> QNetwork:
    """Return Nature's network for Pong, 1.7 million parameters."""
    return QNetwork(PONG, 6, (512,))


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
class Receiver:
    """Takes each version and notes when it is applied."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.module, self.applied = network(), {}

    def follow(self, seconds: float) -> dict[int, float]:
        """Poll Squall's store as a worker does; return when each version was applied."""
        client, end, applied = WeightClient(RemoteActor("bench-weights")), time.time() + seconds, {}
        while time.time() < end:
            weights = client.poll()
            if weights is not None:
                unpack(weights, self.module)
                applied[weights.version] = time.time()
            time.sleep(LOOK_SECONDS)
        return applied

    def take(self, version: int, state: Any) -> None:
        """Apply weights that came by value."""
        self.module.load_state_dict(state)
        self.applied[version] = time.time()

    def all_applied(self) -> dict[int, float]:
        """Return when each version that came by value was applied."""
        return dict(self.applied)


def main() -> None:
    """Publish versions through the window, then ask when they were applied."""
    count, seconds = int(parsed.receivers), parsed.warm_up + parsed.seconds
    ray.init(
        address="local", namespace=NAMESPACE, num_cpus=2, include_dashboard=False, log_to_driver=False,
        object_store_memory=512 * 2**20,
    )  # fmt: skip
    module, squall = network(), parsed.way == "squall"
    receivers = [Receiver.remote() for _ in range(count)]
    ray.get([receiver.all_applied.remote() for receiver in receivers])
    store = WeightStoreActor.options(name="bench-weights", namespace=NAMESPACE).remote(put=ray.put)
    ray.get(store.report.remote())
    target = RemoteActor("bench-weights")
    following = [receiver.follow.remote(seconds + 2.0) for receiver in receivers] if squall else []
    time.sleep(0.5)
    published: dict[int, float] = {}
    stalls: list[float] = []
    begun = time.time()
    for version in range(int(seconds / EVERY_SECONDS)):
        at, begin = time.time(), time.perf_counter()
        if squall:
            target.later("publish", pack(module, version))
        else:
            state = {name: value.detach().clone() for name, value in module.state_dict().items()}
            for receiver in receivers:
                receiver.take.remote(version, state)
        took = time.perf_counter() - begin
        if at - begun >= parsed.warm_up:
            published[version] = at
            stalls.append(took * 1e3)
        time.sleep(max(0.0, EVERY_SECONDS - took))
    asked = following or [receiver.all_applied.remote() for receiver in receivers]
    seen = ray.get(asked, timeout=seconds + 60.0)
    delays = sorted(
        (applied[version] - at) * 1e3 for applied in seen for version, at in published.items() if version in applied
    )
    ray.shutdown()
    stalls.sort()
    report(
        quantile(stalls, 0.5), receivers=count, parameters=sum(p.numel() for p in module.parameters()),
        stall_p50_ms=quantile(stalls, 0.5), stall_p99_ms=quantile(stalls, 0.99),
        applied_p50_ms=quantile(delays, 0.5), applied_p99_ms=quantile(delays, 0.99),
        missed=1.0 - len(delays) / (count * len(published)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
