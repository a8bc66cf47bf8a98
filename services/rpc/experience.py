"""Experience over gRPC: environments outside Squall feed a run, each session as one lane of a rollout worker.

A session never waits on the event loop: actions are chosen by a thread, for all who ask at the same time in one
forward pass, and pushes are sent by a few others. Every step enters the replay at most once, because a session's
pushes carry a worker number, an incarnation and a sequence that no other push of the run has.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import threading
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
from replay.messages import InsertReply, Push
from replay.types import Array
from services.errors import NotReady, OutOfOrder, Overloaded, ServesNothing, UnknownRun
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.codec import encode_array
from services.rpc.interceptors import IDLE_SECONDS
from services.rpc.policy import REFRESH_SECONDS, Batcher, ServedPolicy
from services.rpc.server import Service
from services.rpc.session import Content, Session

MOST_SESSIONS = 1_024
_PUSH_THREADS = 8
_SECONDS_FOR_FIRST_WEIGHTS = 300.0
SECONDS_TO_SEND_THE_REST = 5.0
_NAME = "squall.v1.Experience"
_log = logging.getLogger("squall.experience")


class PushPool:
    """Send pushes from a few threads. They wait as the limiter says, which counts for all sessions alike."""

    def __init__(self, make_client: Callable[[], Replay]) -> None:
        """Send with clients that `make_client` makes, one a thread."""
        self._make_client = make_client
        self._pool = ThreadPoolExecutor(_PUSH_THREADS, "experience")
        self._own = threading.local()
        self._clients: list[Replay] = []
        self._abort = threading.Event()
        self.env_steps = 0
        self.finished = False

    async def send(self, push: Push) -> InsertReply | None:
        """Return the replay's answer, or None if this was closed meanwhile; raises as `ReplayClient.insert` does."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._insert, push)

    def _insert(self, push: Push) -> InsertReply | None:
        client: Replay | None = getattr(self._own, "client", None)
        if client is None:
            client = self._own.client = self._make_client()
            self._clients.append(client)
        reply = client.insert(push, stop=self._abort)
        if reply is not None:
            self.env_steps = max(self.env_steps, reply.env_steps)
            self.finished = self.finished or reply.finished
        return reply

    @property
    def waiting_for(self) -> str | None:
        """What a push waits for, or None."""
        return next((client.waiting_for for client in self._clients if client.waiting_for), None)

    def close(self) -> None:
        """End every wait."""
        self._abort.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Caller:
    """A session and what the service keeps beside it."""

    def __init__(self, session: Session, slot: int, worker: int, incarnation: int, client: str) -> None:
        self.session, self.slot, self.client = session, slot, client
        self.worker, self.incarnation = worker, incarnation
        self.sequence = self.accepted = 0
        self.sending: asyncio.Task[None] | None = None
        self.last_answer: pb.PlayResponse | None = None
        self.waits_for: str | None = None
        self.left = False


class ExperienceService(squall_pb2_grpc.ExperienceServicer, Service):
    """Sessions of one off-policy run."""

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
        most_sessions: int = MOST_SESSIONS,
        weights_seconds: float = _SECONDS_FOR_FIRST_WEIGHTS,
    ) -> None:
        """Serve sessions.

        Args:
            run: the run's name.
            rollout: what a worker of the run does.
            served: the run's policy, for this service alone; the seed of its exploration is its maker's business.
            make_client: makes a client of the replay; each has a deadline for its waits.
            first_worker: worker index in the pushes of the first session; session i pushes as this worker + i.
            first_incarnation: incarnation in the pushes of the first session; each session has its own.
            idle_seconds: a client that says nothing for so long loses its session.
            most_sessions: sessions at once.
            weights_seconds: how long a session waits for the learner's first weights.
        """
        self._run, self._rollout, self._served = run, rollout, served
        self._idle_seconds, self._weights_seconds = idle_seconds, weights_seconds
        # The one thread that touches the policy.
        self._thread = ThreadPoolExecutor(1, "policy")
        self._batcher = Batcher(self._forward, self._thread)
        self.couriers = PushPool(make_client)
        self._free = list(range(most_sessions))
        self._most_sessions = most_sessions
        self._first_worker, self._next_incarnation = first_worker, first_incarnation
        self._callers: dict[int, _Caller] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._weights_came: asyncio.Event | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._env_steps = 0
        self._over = False
        self.steps = self.opened = 0

    # What the process calls.

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register this service's methods."""
        squall_pb2_grpc.add_ExperienceServicer_to_server(self, server)

    async def start(self) -> None:
        """Begin to fetch weights."""
        self._weights_came = asyncio.Event()
        self._refreshing = asyncio.create_task(self._refresh())

    async def stop(self) -> None:
        """Let sessions that have ended send what they have, for a short time, and end all threads."""
        for caller in list(self._callers.values()):
            self._leave(caller)
        if self._background:
            await asyncio.wait(self._background, timeout=SECONDS_TO_SEND_THE_REST)
        self.couriers.close()
        if self._refreshing is not None:
            self._refreshing.cancel()
        for task in self._background:
            task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def note_progress(self, env_steps: int) -> None:
        """Take note of how far the run is: exploration follows it."""
        self._env_steps = env_steps

    def finish(self) -> None:
        """End each session at its next message: the run takes no more, though it may not have all its steps."""
        self._over = True

    @property
    def _takes_no_more(self) -> bool:
        return self._over or self.couriers.finished

    @property
    def waiting_for(self) -> str | None:
        """How many sessions wait, and for what; None if none does."""
        reasons = Counter(caller.waits_for for caller in list(self._callers.values()) if caller.waits_for)
        if not reasons:
            return None
        reason, count = reasons.most_common(1)[0]
        if reason == "replay":
            reason = self.couriers.waiting_for or "the replay to answer"
        return f"{count} of {len(self._callers)} sessions: {reason}"

    @property
    def finished(self) -> bool:
        """Whether the replay said that the run has all its steps."""
        return self.couriers.finished

    @property
    def status_message(self) -> str:
        """Sessions and steps, for people."""
        return f"{len(self._callers)} sessions, {self.steps:,} steps of {self.opened:,} sessions in all"

    async def _refresh(self) -> None:
        # By the clock, so that whoever acts next has the newest weights.
        assert self._weights_came is not None
        loop = asyncio.get_running_loop()
        while True:
            self._served.step = max(self._env_steps, self.couriers.env_steps)
            await loop.run_in_executor(self._thread, self._served.refresh)
            if self._served.version >= 0:
                self._weights_came.set()
            await asyncio.sleep(REFRESH_SECONDS)

    # One session.

    async def Play(self, requests: AsyncIterator[pb.PlayRequest], context: Any) -> AsyncIterator[pb.PlayResponse]:
        """Play one session, from Open to Close or to the end of the call, whatever ends it."""
        caller = self._open(await self._next(requests))
        context.add_done_callback(lambda _: self._leave(caller))
        try:
            yield pb.PlayResponse(opened=pb.Opened(session=f"{caller.slot}-{caller.incarnation}"))
            while not self.couriers.finished:
                message = await self._next(requests)
                if message is None or message.WhichOneof("kind") == "close":
                    break
                answer = await self._answer(caller, message)
                if answer is None:
                    break
                yield answer
            caller.session.flush()
            await self._ship(caller, rest=True)
            await self._sent(caller)
            yield pb.PlayResponse(closed=pb.Closed(steps=caller.accepted, finished=self._takes_no_more))
        finally:
            self._leave(caller)

    async def _next(self, requests: AsyncIterator[pb.PlayRequest]) -> pb.PlayRequest | None:
        """Return the client's next message, or None when there is none.

        Raises:
            DeadlineExceeded: none came in time.
        """
        try:
            async with asyncio.timeout(self._idle_seconds):
                return await anext(requests, None)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"nothing came for {self._idle_seconds:g} s: the session is over, its whole steps count; open a new one"
            ) from error

    def _open(self, message: pb.PlayRequest | None) -> _Caller:
        if message is None or message.WhichOneof("kind") != "open":
            raise OutOfOrder("a session begins with Open")
        opening = message.open
        if opening.run not in ("", self._run):
            raise UnknownRun(f"this server takes experience for {self._run!r} alone, not for {opening.run!r}")
        session = Session(self._rollout, opening)
        if self._refreshing is not None and self._refreshing.done():
            self._refreshing.result()  # raises what ended it: old weights must not pass for the newest
        if not self._free:
            raise Overloaded(f"{self._most_sessions} sessions are open, and no more may be; try again later")
        slot = heapq.heappop(self._free)
        caller = _Caller(session, slot, self._first_worker + slot, self._next_incarnation, opening.client)
        self._next_incarnation += 1
        self._callers[caller.slot] = caller
        self.opened += 1
        return caller

    async def _answer(self, caller: _Caller, message: pb.PlayRequest) -> pb.PlayResponse | None:
        """Take in a Reset or a Step and return its answer; None if the run takes no more.

        Raises:
            OutOfOrder: a message that may not come now.
            ConfigurationError: one that cannot be.
        """
        kind, session = message.WhichOneof("kind"), caller.session
        if caller.left:
            return None
        if kind == "step" and message.step.number == session.steps and caller.last_answer is not None:
            return caller.last_answer
        if kind == "reset":
            session.reset(message.reset)
            result = caller.last_answer = None
        elif kind == "step":
            result = session.step(message.step)
        elif kind == "open":
            raise OutOfOrder("a session is opened once; another one is another call")
        else:
            raise ConfigurationError("a message holds an open, a reset, a step or a close, got none of them")
        await self._ship(caller)
        if self._takes_no_more:
            return None
        if result is not None:
            ended = pb.EpisodeEnded(episode_return=result.episode_return, length=result.length)
            answer = pb.PlayResponse(episode_ended=ended)
        else:
            answer = pb.PlayResponse(action=await self._act(caller))
        if kind == "step":
            caller.last_answer = answer
        return answer

    async def _act(self, caller: _Caller) -> pb.Action:
        assert self._weights_came is not None
        if not self._weights_came.is_set():
            caller.waits_for = reason = "the learner's first weights"
            try:
                async with asyncio.timeout(self._weights_seconds):
                    await self._weights_came.wait()
            except TimeoutError as error:
                raise NotReady(f"waited {self._weights_seconds:g} s for {reason}") from error
            finally:
                caller.waits_for = None
        actions, version = await self._batcher.act(caller.session.observation[None], True)
        caller.session.act(actions[0])
        environment = self._served.environment
        # Discrete ones are numbered from 0 in the protocol, whatever the environment's own begin with.
        shown = actions if isinstance(environment.actions, DiscreteActions) else environment.to_environment(actions)
        array = encode_array(np.asarray(shown[0]))
        return pb.Action(action=array, number=caller.session.steps + 1, weights_version=version)

    def _forward(self, observations: Array, explore: bool) -> tuple[Array, int]:
        """Return actions as the learner sees them: a worker's segments hold those, not the clipped ones."""
        served = self._served
        return served.policy.act(observations, step=served.step, greedy=not explore).action, served.version

    # Pushes.

    async def _ship(self, caller: _Caller, *, rest: bool = False) -> None:
        """Begin to send what is ready, once what was sent before has arrived."""
        if caller.session.is_ready(rest=rest):
            await self._sent(caller)  # first: if this wait is given up, nothing is taken out and lost
            caller.sending = asyncio.create_task(self._send(caller, caller.session.take()))

    async def _sent(self, caller: _Caller) -> None:
        """Wait until what was sent has arrived; raises what it met. The wait may be given up, not the sending."""
        if caller.sending is not None:
            caller.waits_for = "replay"
            try:
                await asyncio.shield(caller.sending)
            finally:
                caller.waits_for = None

    async def _send(self, caller: _Caller, content: Content) -> None:
        push = Push(
            caller.worker, caller.incarnation, caller.sequence,
            segments=content.segments, episodes=content.episodes, returns=content.returns,
        )  # fmt: skip
        caller.sequence += 1
        if self.couriers.finished:
            return
        reply = await self.couriers.send(push)
        # Repeated: an earlier try of this very push got through, and its answer did not.
        if reply is not None and (reply.accepted or reply.repeated):
            caller.accepted += push.steps
            self.steps += push.steps

    def _leave(self, caller: _Caller) -> None:
        """Send what a session has left, in the background, and let others have its place; once."""
        if not caller.left:
            caller.left = True
            task = asyncio.get_running_loop().create_task(self._drain(caller))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _drain(self, caller: _Caller) -> None:
        try:
            with contextlib.suppress(RuntimeError):  # the threads have ended
                await self._ship(caller)  # apart: with the rest it may be more than a push holds
                caller.session.flush()
                await self._ship(caller, rest=True)
                await self._sent(caller)
        except Exception:
            _log.exception("the last steps of session %s (%s) are lost", caller.slot, caller.client)
        finally:
            del self._callers[caller.slot]
            heapq.heappush(self._free, caller.slot)


class NoExperience(squall_pb2_grpc.ExperienceServicer, Service):
    """Stands in for sessions where a run cannot take any, and says why."""

    name = _NAME

    def __init__(self, why: str) -> None:
        """Refuse every session because of `why`."""
        self._why = why

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register this service's methods."""
        squall_pb2_grpc.add_ExperienceServicer_to_server(self, server)

    async def Play(self, requests: AsyncIterator[pb.PlayRequest], context: Any) -> AsyncIterator[pb.PlayResponse]:
        """Refuse."""
        raise ServesNothing(self._why)
        yield  # what makes this a stream
