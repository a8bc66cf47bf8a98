"""The pushes of a rollout worker: their numbers and sizes, waits for the replay server, drains, and errors."""

from __future__ import annotations

import threading
import time

import pytest

from actors import rollout
from replay.errors import LayoutMismatch
from replay.messages import InsertReply, Push
from replay.server import ReplayServer
from replay.types import EpisodeResult
from tests.actors.toys import Script, scripted
from tests.actors.workers import (
    LONG,
    Direct,
    make_server,
    make_spec,
    make_worker,
    run_vector_steps,
    running,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("toy_policies")


class Blocked(Direct):
    """A replay that accepts no push."""

    def __init__(self) -> None:
        self.waiting_for = None
        self.pushes = []

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        self.waiting_for = "the learner: it sleeps"
        assert stop is not None
        stop.wait()
        return None


class Failing(Direct):
    """A replay that raises at push number `at`."""

    def __init__(self, server: ReplayServer, at: int) -> None:
        super().__init__(server)
        self.at = at

    def insert(self, push: Push, *, stop: threading.Event | None = None) -> InsertReply | None:
        if push.sequence == self.at:
            raise LayoutMismatch("the push does not fit")
        return super().insert(push, stop=stop)


def test_pushes_are_numbered_signed_and_bounded() -> None:
    spec = make_spec(lanes=2, length=4, n_steps=5)
    replay = Direct(make_server(spec))
    with scripted(default=LONG):
        run_vector_steps(make_worker(spec, replay, worker=3, workers=5, incarnation=2), 31)
    assert [push.sequence for push in replay.pushes] == list(range(len(replay.pushes)))
    assert {(push.worker, push.incarnation) for push in replay.pushes} == {(3, 2)}
    steps = [push.steps for push in replay.pushes]
    # Of 31 rows, 24 are sent once the 4 rows after them are known; the flush sends a segment and its tail of 3.
    assert steps == [2 * 4] * 6 + [2 * 7]
    assert spec.largest_push == 2 * 7


def test_stop_sends_the_rest() -> None:
    for steps in (1, 2, 3, 4, 5):
        spec = make_spec(lanes=2, length=4)
        server = make_server(spec)
        with scripted(default=LONG):
            report = run_vector_steps(make_worker(spec, Direct(server)), steps)
        assert report.env_steps == server.stats().counters.env_steps == 2 * steps


def test_a_server_that_says_wait_stops_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "DRAIN_SECONDS", 0.2)
    spec = make_spec(lanes=2, length=4)
    with scripted(default=LONG):
        worker = make_worker(spec, Blocked())
    # One push is at the server, two are waiting, and one is blocked in `put`; n = 1.
    most = 4 * 2 * 4
    with running(worker) as end:
        wait_until(lambda: worker.report().env_steps == most)
        time.sleep(0.3)
        assert worker.report().env_steps == most
        assert worker.report().waiting_for == "the learner: it sleeps"
        worker.stop()
        begun = time.monotonic()
        end()
        assert time.monotonic() - begun < 3.0


@pytest.mark.parametrize("opens", [True, False])
def test_a_draining_worker_sends_its_experience_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    monkeypatch.setattr(rollout, "DRAIN_SECONDS", 0.0)
    spec = make_spec(lanes=2, length=4)
    server = make_server(spec, samples_per_insert=1.0, minimum_size=8)
    with scripted(default=LONG):
        worker = make_worker(spec, Direct(server))
    with running(worker) as end:
        wait_until(lambda: "samples due" in str(worker.report().waiting_for))
        wait_until(lambda: worker.report().env_steps == worker.report().steps_sent + 4 * 2 * 4)
        worker.stop(20.0 if opens else 0.3)
        time.sleep(0.4)
        while opens and worker.report().status_message != "done":
            server.sample(1, 1)
            time.sleep(0.001)
        report = end()
    assert report.steps_sent == server.stats().counters.env_steps
    assert report.steps_unsent == report.env_steps - report.steps_sent
    assert (report.steps_unsent == 0) is opens


def test_a_limiter_that_says_wait_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "DRAIN_SECONDS", 0.2)
    spec = make_spec(lanes=2, length=4)
    server = make_server(spec, samples_per_insert=1.0, minimum_size=8)
    with scripted(default=LONG):
        worker = make_worker(spec, Direct(server))
    with running(worker):
        wait_until(lambda: "samples due" in str(worker.report().waiting_for))
        before = server.stats().counters.env_steps
        for _ in range(16):
            assert server.sample(1, 1).batch is not None
        wait_until(lambda: server.stats().counters.env_steps > before)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_what_a_push_meets_ends_the_run(at: int) -> None:
    """Also if it is the last push, after which the loop itself does not check for errors."""
    spec = make_spec(lanes=1, length=4)
    with scripted(default=LONG):
        worker = make_worker(spec, Failing(make_server(spec), at))
    with pytest.raises(LayoutMismatch, match="the push does not fit"):
        run_vector_steps(worker, 18)
    assert worker.report().status_message == "rolling out"


def test_a_finished_run_ends_the_loop() -> None:
    spec = make_spec(lanes=2, length=4)
    server = make_server(spec, max_env_steps=50)
    with scripted(default=LONG), running(make_worker(spec, Direct(server))) as end:
        end()
    assert 50 <= server.stats().counters.env_steps < 50 + 2 * 4


def test_the_last_episodes_are_sent_though_no_step_is_left() -> None:
    spec = make_spec(lanes=1, length=64)
    replay = Direct(make_server(spec))
    with scripted({0: Script(length=2, reward=3.0, raises_at=frozenset({3}))}):
        run_vector_steps(make_worker(spec, replay), 4)
    [push] = replay.pushes
    assert push.segments == ()
    assert push.episodes == (EpisodeResult(6.0, 2),)
    assert replay.server.drain_episodes() == push.episodes
