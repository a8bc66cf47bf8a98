"""The Python client that feeds a run with the experience of an external environment over gRPC.

`ExperienceClient.play` opens a new session when the connection breaks.
"""

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
from services.client.run_client import Closeable, SquallClient
from services.errors import NotReady, Overloaded, ServerUnavailable
from services.rpc import squall_pb2 as pb
from services.rpc import squall_pb2_grpc
from services.rpc.codec import DTYPES, decode_array, encode_array, encode_space

ANSWER_SECONDS = 360.0
"""Default deadline of an answer: a little longer than a run waits for its learner by default."""
_CLOSE_SECONDS = 30.0
_MAX_PAUSE_SECONDS = 5.0
_log = logging.getLogger("squall.experience")


@dataclass(frozen=True)
class Played:
    """The result of `ExperienceClient.play`.

    Attributes:
        steps: steps that the server has confirmed; steps of a session whose connection broke are not included.
        taken: steps taken in the environment.
        returns: returns of the finished episodes.
        sessions: number of opened sessions, which is one more than the number of broken connections.
        finished: whether the run accepts no more experience, because it has all its steps or ends.
    """

    steps: int
    taken: int
    returns: tuple[float, ...]
    sessions: int
    finished: bool


class ExperienceSession(Closeable):
    """One session: call `reset`, then `step` until it returns None, then `reset` again. Use it as a `with` block.

    Methods raise the exceptions that the server has raised. They also raise `ServerUnavailable` if the connection has
    broken (open another session, which begins a new episode) and `DeadlineExceeded` if no answer arrived in time.
    """

    def __init__(self, client: SquallClient, opening: pb.Open, *, seconds: float) -> None:
        """Open the session; see `ExperienceClient.open`."""
        space = opening.observation_space
        self._dtype = DTYPES[space.box.dtype] if space.HasField("box") else np.dtype("int64")
        self._client, self._seconds = client, seconds
        self._requests: queue.SimpleQueue[pb.PlayRequest | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[pb.PlayResponse | SquallError] = queue.SimpleQueue()
        self._closed: pb.Closed | None = None
        self._ended = False
        self._number = 0
        self.episode_return: float | None = None
        """Return of the last finished episode, as computed by the server."""
        self._call = squall_pb2_grpc.ExperienceStub(client.channel).Play(self._outgoing(), metadata=client.metadata)
        # A thread reads the answers, because gRPC's blocking iterator has no timeout for one answer.
        self._reader = threading.Thread(target=self._read, name="experience", daemon=True)
        self._reader.start()
        try:
            self.id = self._request(pb.PlayRequest(open=opening)).opened.session
        except BaseException:
            self._end()
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

    def _request(self, request: pb.PlayRequest) -> pb.PlayResponse:
        if self._ended:
            raise ServerUnavailable("this session has ended; open another session")
        self._requests.put(request)
        return self._answer(self._seconds)

    def _answer(self, seconds: float) -> pb.PlayResponse:
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self._end()
            raise DeadlineExceeded(f"no answer from {self._client.address} within {seconds:g} s") from None
        if isinstance(answer, SquallError):
            self._end()
            raise answer
        if answer.WhichOneof("kind") == "closed":
            self._closed = answer.closed
            self._end()
        return answer

    def _end(self) -> None:
        self._ended = True
        self._requests.put(None)
        self._call.cancel()
        self._reader.join(_CLOSE_SECONDS)

    @property
    def finished(self) -> bool:
        """Whether the server has reported that the run accepts no more experience."""
        return self._closed is not None and self._closed.finished

    @property
    def steps(self) -> int | None:
        """Number of steps of this session that the run has accepted; None before the session is closed."""
        return None if self._closed is None else int(self._closed.steps)

    def reset(self, observation: Any) -> Array | None:
        """Begin an episode with its first observation; return the first action, or None if the run is finished.

        Raises:
            ConfigurationError: an observation of another shape or dtype; the error names both.
        """
        return self._action(pb.PlayRequest(reset=pb.Reset(observation=self._encode(observation))))

    def step(self, reward: float, terminated: bool, truncated: bool, observation: Any) -> Array | None:
        """Send the result of the last action; return the next action, or None if the episode or the run has ended.

        Args:
            reward: reward of the action, unclipped.
            terminated: whether the environment ended the episode with this step.
            truncated: whether the episode was cut off after this step.
            observation: observation after the step, also for the last step of an episode.

        Raises:
            ConfigurationError: an invalid value; the error states which values are valid.
            OutOfOrder: no episode is running.
        """
        step = pb.Step(
            number=self._number + 1, reward=reward, terminated=terminated, truncated=truncated,
            observation=self._encode(observation),
        )  # fmt: skip
        self._number += 1
        return self._action(pb.PlayRequest(step=step))

    def _encode(self, observation: Any) -> pb.Array:
        # Environments return int for int64 and float64 for float32. The server rejects any other difference.
        array = np.asarray(observation)
        return encode_array(array.astype(self._dtype) if array.dtype.kind == self._dtype.kind else array)

    def _action(self, request: pb.PlayRequest) -> Array | None:
        answer = self._request(request)
        if answer.WhichOneof("kind") == "action":
            message = answer.action.action
            dtype = DTYPES.get(message.dtype, np.dtype("int64")).name
            return decode_array(message, "an action", dtype=dtype, shape=tuple(message.shape))
        if answer.WhichOneof("kind") == "episode_ended":
            self.episode_return = answer.episode_ended.episode_return
        return None

    def close(self) -> int:
        """Send the remaining steps, end the session, and return the number of its steps that the run has accepted."""
        if not self._ended:
            self._requests.put(pb.PlayRequest(close=pb.Close()))
            self._answer(self._seconds)
        return self.steps or 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._ended:
            if error is None:
                self.close()
            else:
                self._end()


class ExperienceClient(Closeable):
    """The client that plays environments for a run; use it as a `with` block. Threads may have separate sessions."""

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
        """Create a client, which connects at the first session.

        Args:
            address: `host:port` of the run's endpoint or of a gateway.
            run: name of the run; may be omitted at the run's own endpoint.
            name: name of the client in the run's log.
            answer_seconds: deadline of every answer in seconds; a session may have to wait for the run's learner.
            patience_seconds: seconds for which `play` tries to open a new session after the connection broke.
            connection: `token`, `tls`, and `tls_authority`, see `SquallClient`.
        """
        self._client = SquallClient(address, **connection)
        self._run, self._name = run, name
        self._answer_seconds, self._patience = answer_seconds, patience_seconds

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def open(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> ExperienceSession:
        """Open a session for an environment of these spaces.

        Discrete actions are numbered from 0. If the run stacks frames, the environment must return single frames.

        Raises:
            ConfigurationError: other spaces than the run's; the error names both.
            ServesNothing: the run accepts no external experience, such as an on-policy run.
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
        """Play until the run accepts no more experience, or for `steps` steps.

        If the connection breaks, the client tries to open a new session, which begins a new episode. It logs a warning
        to `squall.experience`.

        Args:
            env: the environment, which is not closed.
            steps: maximum number of steps.
            seed: seed of the first reset.

        Raises:
            ServerUnavailable: the run could not be reached again within `patience_seconds`.
            SquallError: see `open` and `ExperienceSession.step`.
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
                pause = min(2 * pause, _MAX_PAUSE_SECONDS)
        return Played(accepted, player.taken, tuple(player.returns), sessions, player.finished)


class _Player:
    """Plays an environment through one session after another."""

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
                env_action = int(action) + self._start if action.dtype.kind == "i" else action.copy()
                observation, reward, terminated, truncated, _ = self._env.step(env_action)
                self.taken += 1
                action = session.step(float(reward), bool(terminated), bool(truncated), observation)
                if (terminated or truncated) and session.episode_return is not None and not session.finished:
                    self.returns.append(session.episode_return)
            self.finished = session.finished
