"""The Experience service: external environments feed a run, each through a session, like one lane of a rollout worker.

No session blocks the event loop: one thread chooses the actions, with one forward pass for all sessions that wait at
the same time, and a few other threads send pushes. Every step enters the replay at most once, because each push of a
session has a worker index, an incarnation, and a sequence number that no other push of the run has.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

from actors.environments import DiscreteActions
from actors.push_sender import Replay
from actors.rollout import RolloutSpec
from replay.errors import ConfigurationError, DeadlineExceeded
from replay.messages import Push
from replay.types import Array
from services.errors import NotReady, OutOfOrder, Overloaded, ServesNothing, UnknownRun
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.codec import encode_array
from services.rpc.interceptors import IDLE_SECONDS
from services.rpc.policy import REFRESH_SECONDS, Batcher, ServedPolicy
from services.rpc.push_pool import PushPool
from services.rpc.server import Service
from services.rpc.session import PushContent, Session

MAX_SESSIONS = 1_024
_FIRST_WEIGHTS_SECONDS = 300.0
_DRAIN_SECONDS = 5.0
_NAME = "squall.v1.Experience"
_log = logging.getLogger("squall.experience")


class _Call:
    """A call of Play: its session, and its state in the service."""

    def __init__(self, session: Session, slot: int, worker: int, incarnation: int, client: str) -> None:
        self.session, self.slot, self.client = session, slot, client
        self.worker, self.incarnation = worker, incarnation
        self.sequence = self.accepted = 0
        self.push: asyncio.Task[None] | None = None
        self.last_answer: pb.PlayResponse | None = None
        self.waits_for: str | None = None
        self.closed = False


class ExperienceService(squall_pb2_grpc.ExperienceServicer, Service):
    """The service of one off-policy run."""

    name = _NAME

    def __init__(
        self,
        run: str,
        rollout: RolloutSpec,
        served: ServedPolicy,
        make_client: Callable[[], Replay],
        *,
        first_worker: int,
        first_incarnation: int = 0,
        idle_seconds: float = IDLE_SECONDS,
        max_sessions: int = MAX_SESSIONS,
        weights_seconds: float = _FIRST_WEIGHTS_SECONDS,
    ) -> None:
        """Serve sessions.

        Args:
            run: name of the run.
            rollout: description of a rollout worker of the run.
            served: the run's policy, for this service alone. The caller has seeded its exploration.
            make_client: function that creates a client of the replay, whose waits have a deadline.
            first_worker: worker index in the pushes of the first session; session i pushes as this worker + i.
            first_incarnation: incarnation in the pushes of the first session; each session has its own.
            idle_seconds: time without a message after which a session ends.
            max_sessions: maximum number of open sessions.
            weights_seconds: time that a session waits for the learner's first weights.
        """
        self._run, self._rollout, self._served = run, rollout, served
        self._idle_seconds, self._weights_seconds = idle_seconds, weights_seconds
        # Only this thread uses the policy.
        self._thread = ThreadPoolExecutor(1, "policy")
        self._batcher = Batcher(self._forward, self._thread)
        self._push_pool = PushPool(make_client)
        self._free_slots = list(range(max_sessions))
        self._max_sessions = max_sessions
        self._first_worker, self._next_incarnation = first_worker, first_incarnation
        self._calls: dict[int, _Call] = {}
        self._drains: set[asyncio.Task[Any]] = set()
        self._has_weights: asyncio.Event | None = None
        self._refresh_task: asyncio.Task[None] | None = None
        self._env_steps = 0
        self._closing = False
        self.steps = self.opened = 0

    # Calls of the endpoint.

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods of this service with a server."""
        squall_pb2_grpc.add_ExperienceServicer_to_server(self, server)

    async def start(self) -> None:
        """Start to fetch weights."""
        self._has_weights = asyncio.Event()
        self._refresh_task = asyncio.create_task(self._refresh())

    async def stop(self) -> None:
        """End all sessions, give them a few seconds to push their remaining steps, and end all threads."""
        for call in list(self._calls.values()):
            self._close(call)
        if self._drains:
            await asyncio.wait(self._drains, timeout=_DRAIN_SECONDS)
        self._push_pool.close()
        if self._refresh_task is not None:
            self._refresh_task.cancel()
        for task in self._drains:
            task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def note_progress(self, env_steps: int) -> None:
        """Set the run's number of environment steps, on which exploration depends."""
        self._env_steps = env_steps

    def finish(self) -> None:
        """End each session at its next message: the run accepts no more experience, even if it lacks steps."""
        self._closing = True

    @property
    def _accepts_no_more(self) -> bool:
        return self._closing or self._push_pool.finished

    @property
    def waiting_for(self) -> str | None:
        """The number of waiting sessions and the event that they wait for; None if none waits."""
        reasons = Counter(call.waits_for for call in list(self._calls.values()) if call.waits_for)
        if not reasons:
            return None
        reason, count = reasons.most_common(1)[0]
        if reason == "replay":
            reason = self._push_pool.waiting_for or "the replay to answer"
        return f"{count} of {len(self._calls)} sessions: {reason}"

    @property
    def finished(self) -> bool:
        """Whether the replay has reported that the run has all its steps."""
        return self._push_pool.finished

    @property
    def status_message(self) -> str:
        """Numbers of sessions and steps, for people."""
        return f"{len(self._calls)} sessions, {self.steps:,} steps of {self.opened:,} sessions in all"

    async def _refresh(self) -> None:
        # Periodically rather than at each call, so that every session gets the newest weights.
        assert self._has_weights is not None
        loop = asyncio.get_running_loop()
        while True:
            self._served.step = max(self._env_steps, self._push_pool.env_steps)
            await loop.run_in_executor(self._thread, self._served.refresh)
            if self._served.version >= 0:
                self._has_weights.set()
            await asyncio.sleep(REFRESH_SECONDS)

    # Sessions.

    async def Play(self, requests: AsyncIterator[pb.PlayRequest], context: Any) -> AsyncIterator[pb.PlayResponse]:
        """Serve one session, from Open to Close or to the end of the call, for any reason that the call ends."""
        call = self._open(await self._next_message(requests))
        context.add_done_callback(lambda _: self._close(call))
        try:
            yield pb.PlayResponse(opened=pb.Opened(session=f"{call.slot}-{call.incarnation}"))
            while not self._push_pool.finished:
                message = await self._next_message(requests)
                if message is None or message.WhichOneof("kind") == "close":
                    break
                answer = await self._answer(call, message)
                if answer is None:
                    break
                yield answer
            call.session.flush()
            await self._start_push(call, rest=True)
            await self._wait_for_push(call)
            yield pb.PlayResponse(closed=pb.Closed(steps=call.accepted, finished=self._accepts_no_more))
        finally:
            self._close(call)

    async def _next_message(self, requests: AsyncIterator[pb.PlayRequest]) -> pb.PlayRequest | None:
        """Return the client's next message, or None if the client has ended its stream.

        Raises:
            DeadlineExceeded: no message within `idle_seconds`.
        """
        try:
            async with asyncio.timeout(self._idle_seconds):
                return await anext(requests, None)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"no message for {self._idle_seconds:g} s: the session has ended, and its complete steps count; open a "
                f"new session"
            ) from error

    def _open(self, message: pb.PlayRequest | None) -> _Call:
        if message is None or message.WhichOneof("kind") != "open":
            raise OutOfOrder("a session begins with Open")
        opening = message.open
        if opening.run not in ("", self._run):
            raise UnknownRun(f"this server accepts experience for {self._run!r} only, not for {opening.run!r}")
        session = Session(self._rollout, opening)
        if self._refresh_task is not None and self._refresh_task.done():
            self._refresh_task.result()  # raises its error, because stale weights must not be used as the newest
        if not self._free_slots:
            raise Overloaded(f"all {self._max_sessions} sessions are in use; try again later")
        slot = heapq.heappop(self._free_slots)
        call = _Call(session, slot, self._first_worker + slot, self._next_incarnation, opening.client)
        self._next_incarnation += 1
        self._calls[slot] = call
        self.opened += 1
        return call

    async def _answer(self, call: _Call, message: pb.PlayRequest) -> pb.PlayResponse | None:
        """Process a Reset or a Step and return the answer; None if the run accepts no more experience.

        Raises:
            OutOfOrder: a message that is not allowed now.
            ConfigurationError: an invalid message.
        """
        kind = message.WhichOneof("kind")
        if call.closed:
            return None
        if kind == "step" and message.step.number == call.session.steps and call.last_answer is not None:
            return call.last_answer
        if kind == "reset":
            call.session.reset(message.reset)
            result = call.last_answer = None
        elif kind == "step":
            result = call.session.step(message.step)
        elif kind == "open":
            raise OutOfOrder("a session is opened only once; use another call for another session")
        else:
            raise ConfigurationError("a message must contain an open, a reset, a step, or a close, got none of them")
        await self._start_push(call)
        if self._accepts_no_more:
            return None
        if result is not None:
            ended = pb.EpisodeEnded(episode_return=result.episode_return, length=result.length)
            answer = pb.PlayResponse(episode_ended=ended)
        else:
            answer = pb.PlayResponse(action=await self._act(call))
        if kind == "step":
            call.last_answer = answer
        return answer

    async def _act(self, call: _Call) -> pb.Action:
        assert self._has_weights is not None
        if not self._has_weights.is_set():
            call.waits_for = reason = "the learner's first weights"
            try:
                async with asyncio.timeout(self._weights_seconds):
                    await self._has_weights.wait()
            except TimeoutError as error:
                raise NotReady(f"waited {self._weights_seconds:g} s for {reason}") from error
            finally:
                call.waits_for = None
        actions, version = await self._batcher.act(call.session.observation[None], True)
        call.session.act(actions[0])
        environment = self._served.environment
        # In the protocol, Discrete actions are numbered from 0, even if the environment's own numbers start elsewhere.
        sent = actions if isinstance(environment.actions, DiscreteActions) else environment.to_environment(actions)
        array = encode_array(np.asarray(sent[0]))
        return pb.Action(action=array, number=call.session.steps + 1, weights_version=version)

    def _forward(self, observations: Array, explore: bool) -> tuple[Array, int]:
        """Return the actions before they are clipped to the environment's box, as segments contain them."""
        served = self._served
        return served.policy.act(observations, step=served.step, greedy=not explore).action, served.version

    # Pushes.

    async def _start_push(self, call: _Call, *, rest: bool = False) -> None:
        """Start to push the ready content, once the previous push has been answered."""
        if call.session.is_ready(rest=rest):
            # Wait before the content is taken, because a cancelled wait must not lose content.
            await self._wait_for_push(call)
            call.push = asyncio.create_task(self._push(call, call.session.take()))

    async def _wait_for_push(self, call: _Call) -> None:
        """Wait for the reply to the last push; raises its error. Cancelling the wait does not cancel the push."""
        if call.push is not None:
            call.waits_for = "replay"
            try:
                await asyncio.shield(call.push)
            finally:
                call.waits_for = None

    async def _push(self, call: _Call, content: PushContent) -> None:
        push = Push(
            call.worker, call.incarnation, call.sequence,
            segments=content.segments, episodes=content.episodes, returns=content.returns,
        )  # fmt: skip
        call.sequence += 1
        if self._push_pool.finished:
            return
        reply = await self._push_pool.send(push)
        # Repeated: an earlier attempt of this push was accepted, but its reply was lost.
        if reply is not None and (reply.accepted or reply.repeated):
            call.accepted += push.steps
            self.steps += push.steps

    def _close(self, call: _Call) -> None:
        """Start to push the remaining content of a session, and then free its slot; later calls have no effect."""
        if not call.closed:
            call.closed = True
            task = asyncio.get_running_loop().create_task(self._drain(call))
            self._drains.add(task)
            task.add_done_callback(self._drains.discard)

    async def _drain(self, call: _Call) -> None:
        try:
            with contextlib.suppress(RuntimeError):  # the threads of the pool have ended
                # Push the ready content separately: together with the rest it could exceed the maximum size of a push.
                await self._start_push(call)
                call.session.flush()
                await self._start_push(call, rest=True)
                await self._wait_for_push(call)
        except Exception:
            _log.exception("the last steps of session %s (%s) are lost", call.slot, call.client)
        finally:
            del self._calls[call.slot]
            heapq.heappush(self._free_slots, call.slot)


class NoExperience(squall_pb2_grpc.ExperienceServicer, Service):
    """The Experience service of a run that accepts no external experience: it refuses every session with a reason."""

    name = _NAME

    def __init__(self, reason: str) -> None:
        """Refuse every session with `reason`."""
        self._reason = reason

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods of this service with a server."""
        squall_pb2_grpc.add_ExperienceServicer_to_server(self, server)

    async def Play(self, requests: AsyncIterator[pb.PlayRequest], context: Any) -> AsyncIterator[pb.PlayResponse]:
        """Refuse the session."""
        raise ServesNothing(self._reason)
        yield  # makes this function a generator
