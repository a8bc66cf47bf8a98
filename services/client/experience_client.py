"""ExperienceClient: plays an environment of yours for a run, over gRPC, and starts again where a connection breaks."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from replay.errors import ConfigurationError, DeadlineExceeded, SquallError
from replay.types import Array
from services.client.run_client import Closing, SquallClient
from services.errors import NotReady, Overloaded, ServerUnavailable
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.codec import DTYPES, decode_array, encode_array, encode_space

ANSWER_SECONDS = 360.0
"""A little more than a run waits for its learner by default."""
_SECONDS_TO_CLOSE = 30.0
_LONGEST_PAUSE = 5.0
_log = logging.getLogger("squall.experience")


@dataclass(frozen=True)
class Played:
    """What came of playing.

    Attributes:
        steps: steps that the server said it has in the run; those of a connection that broke are not among them.
        taken: steps that the environment took.
        returns: of the episodes that ended.
        sessions: opened, so one less is how often the connection broke.
        finished: the run takes no more: it has all its steps, or ends.
    """

    steps: int
    taken: int
    returns: tuple[float, ...]
    sessions: int
    finished: bool


class ExperienceSession(Closing):
    """One session: `reset`, then `step` until it returns None, then `reset` again. Use as a `with` block.

    Errors are those that the server raised, by type; besides `ServerUnavailable` if the connection broke (open another
    session, which begins an episode) and `DeadlineExceeded` if no answer came in time.
    """

    def __init__(self, client: SquallClient, opening: pb.Open, *, seconds: float) -> None:
        """Open it; see `ExperienceClient.open`."""
        space = opening.observation_space
        self._dtype = DTYPES[space.box.dtype] if space.HasField("box") else np.dtype("int64")
        self._client, self._seconds = client, seconds
        self._requests: queue.SimpleQueue[pb.PlayRequest | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[pb.PlayResponse | SquallError] = queue.SimpleQueue()
        self._closed: pb.Closed | None = None
        self._over = False
        self._number = 0
        self.episode_return: float | None = None
        """Return of the last episode that ended, as the server counted it."""
        self._call = squall_pb2_grpc.ExperienceStub(client.channel).Play(self._outgoing(), metadata=client.metadata)
        # gRPC's blocking iterator has no deadline of its own.
        self._reader = threading.Thread(target=self._read, name="experience", daemon=True)
        self._reader.start()
        try:
            self.id = self._ask(pb.PlayRequest(open=opening)).opened.session
        except BaseException:
            self._abandon()
            raise

    def _outgoing(self) -> Iterator[pb.PlayRequest]:
        while (request := self._requests.get()) is not None:
            yield request

    def _read(self) -> None:
        try:
            with self._client.errors():
                for answer in self._call:
                    self._answers.put(answer)
            self._answers.put(ServerUnavailable(f"{self._client.address} ended the session"))
        except SquallError as error:
            self._answers.put(error)

    def _ask(self, request: pb.PlayRequest) -> pb.PlayResponse:
        if self._over:
            raise ServerUnavailable("this session is over; open another one")
        self._requests.put(request)
        return self._answer(self._seconds)

    def _answer(self, seconds: float) -> pb.PlayResponse:
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self._abandon()
            raise DeadlineExceeded(f"{self._client.address} gave no answer for {seconds:g} s") from None
        if isinstance(answer, SquallError):
            self._abandon()
            raise answer
        if answer.WhichOneof("kind") == "closed":
            self._closed = answer.closed
            self._abandon()
        return answer

    def _abandon(self) -> None:
        self._over = True
        self._requests.put(None)
        self._call.cancel()
        self._reader.join(_SECONDS_TO_CLOSE)

    @property
    def finished(self) -> bool:
        """Whether the server said that the run takes no more: it has all its steps, or ends."""
        return self._closed is not None and self._closed.finished

    @property
    def steps(self) -> int | None:
        """Steps of this session that are in the run; None before it was closed."""
        return None if self._closed is None else int(self._closed.steps)

    def reset(self, observation: Any) -> Array | None:
        """Begin an episode with its first observation; return the first action, None if the run is finished.

        Raises:
            ConfigurationError: an observation of another shape or dtype; the text names both.
        """
        return self._action(pb.PlayRequest(reset=pb.Reset(observation=self._encode(observation))))

    def step(self, reward: float, terminated: bool, truncated: bool, observation: Any) -> Array | None:
        """Tell what the last action brought; return the next one, None if the episode or the run is over.

        Args:
            reward: unclipped.
            terminated: whether the episode ended here.
            truncated: whether it was broken off here.
            observation: that followed, the episode's last one too.

        Raises:
            ConfigurationError: something that cannot be; the text names it and what would be right.
            OutOfOrder: no episode is going on.
        """
        step = pb.Step(
            number=self._number + 1, reward=reward, terminated=terminated, truncated=truncated,
            observation=self._encode(observation),
        )  # fmt: skip
        self._number += 1
        return self._action(pb.PlayRequest(step=step))

    def _encode(self, observation: Any) -> pb.Array:
        # Environments give int for int64 and float64 for float32; anything else is for the server to refuse.
        array = np.asarray(observation)
        return encode_array(array.astype(self._dtype) if array.dtype.kind == self._dtype.kind else array)

    def _action(self, request: pb.PlayRequest) -> Array | None:
        answer = self._ask(request)
        if answer.WhichOneof("kind") == "action":
            message = answer.action.action
            dtype = DTYPES.get(message.dtype, np.dtype("int64")).name
            return decode_array(message, "an action", dtype=dtype, shape=tuple(message.shape))
        if answer.WhichOneof("kind") == "episode_ended":
            self.episode_return = answer.episode_ended.episode_return
        return None

    def close(self) -> int:
        """Send what is left, end the session and return the steps of it that are in the run."""
        if not self._over:
            self._requests.put(pb.PlayRequest(close=pb.Close()))
            self._answer(self._seconds)
        return self.steps or 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._over:
            if error is None:
                self.close()
            else:
                self._abandon()


class ExperienceClient(Closing):
    """Plays for a run; use as a `with` block. Several threads may each have sessions of their own."""

    def __init__(
        self,
        address: str,
        *,
        run: str = "",
        name: str = "",
        answer_seconds: float = ANSWER_SECONDS,
        patience_seconds: float = 60.0,
        **connection: Any,
    ) -> None:
        """Connect at the first session.

        Args:
            address: `host:port` of the run's endpoint or of a gateway.
            run: the run's name; may be left out at the run's own endpoint.
            name: shown in the run's log.
            answer_seconds: deadline of every answer; a run's learner may make a session wait.
            patience_seconds: how long `play` tries to open a session again after a connection broke.
            connection: `token`, `tls`, `tls_authority`, see `SquallClient`.
        """
        self._client = SquallClient(address, **connection)
        self._run, self._name = run, name
        self._answer_seconds, self._patience = answer_seconds, patience_seconds

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def open(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> ExperienceSession:
        """Open a session for an environment of these spaces.

        Discrete actions are numbered from 0. A run that stacks frames wants single ones.

        Raises:
            ConfigurationError: spaces that are not the run's; the text names both.
            ServesNothing: the run takes no experience from outside; on-policy ones do not.
            Overloaded: too many sessions are open.
        """
        if isinstance(action_space, spaces.Discrete):
            action_space = spaces.Discrete(int(action_space.n))
        opening = pb.Open(
            run=self._run,
            observation_space=encode_space(observation_space),
            action_space=encode_space(action_space),
            client=self._name,
        )
        return ExperienceSession(self._client, opening, seconds=self._answer_seconds)

    def play(self, env: gym.Env[Any, Any], *, steps: int | None = None, seed: int | None = None) -> Played:
        """Play until the run takes no more, or `steps` are taken; a broken connection begins a new episode.

        A run that cannot be reached is tried again, with a word in the log `squall.experience`.

        Args:
            env: the environment; it is not closed.
            steps: to take at most.
            seed: of the first reset.

        Raises:
            ServerUnavailable: the run could not be reached again within `patience_seconds`.
            SquallError: see `open`, `ExperienceSession.step`.
        """
        if steps is not None and steps < 1:
            raise ConfigurationError(f"steps must be positive, got {steps}")
        player = _Player(env, steps, seed)
        accepted = sessions = 0
        broken_at: float | None = None
        pause = 0.1
        while not player.done:
            before = player.taken
            try:
                with self.open(env.observation_space, env.action_space) as session:
                    sessions += 1
                    player.play(session)
                accepted += session.steps or 0
            except (ServerUnavailable, NotReady, Overloaded) as error:
                if player.taken > before or broken_at is None:
                    broken_at, pause = time.monotonic(), 0.1
                    _log.warning("%s; trying again for %.0f s", error, self._patience)
                if time.monotonic() - broken_at > self._patience:
                    raise
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        return Played(accepted, player.taken, tuple(player.returns), sessions, player.finished)


class _Player:
    """Drives an environment by one session after the other."""

    def __init__(self, env: gym.Env[Any, Any], steps: int | None, seed: int | None) -> None:
        self._env, self._steps, self._seed = env, steps, seed
        self._start = int(env.action_space.start) if isinstance(env.action_space, spaces.Discrete) else 0
        self.taken = 0
        self.returns: list[float] = []
        self.finished = False

    @property
    def done(self) -> bool:
        return self.finished or (self._steps is not None and self.taken >= self._steps)

    def play(self, session: ExperienceSession) -> None:
        action: Array | None = None
        while not self.done:
            if action is None:
                observation, _ = self._env.reset(seed=self._seed)
                self._seed = None
                action = session.reset(observation)
            if action is not None:
                own = int(action) + self._start if action.dtype.kind == "i" else action.copy()
                observation, reward, terminated, truncated, _ = self._env.step(own)
                self.taken += 1
                action = session.step(float(reward), bool(terminated), bool(truncated), observation)
                if (terminated or truncated) and session.episode_return is not None and not session.finished:
                    self.returns.append(session.episode_return)
            self.finished = session.finished
