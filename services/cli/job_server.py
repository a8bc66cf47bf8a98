"""`squall submit`: hands a squall command to a cluster's job server, passes its log on, and ends as it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import shlex
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from replay.errors import ConfigurationError, SquallError
from services.errors import JobServerUnavailable

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
ENV_FILE = Path(".env")
# Beside what .gitignore, .rayignore and Ray itself leave out of an upload.
NEVER_UPLOADED = [".env", "/runs/"]
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 30.0
UPLOAD_SECONDS = 600.0
AWAY_SECONDS = 120.0
DRAIN_SECONDS = 5.0
LOOK_SECONDS = 2.0

# As docker compose reads: a quoted value ends at its quote, another before a blank and a #.
_ASSIGNMENT = re.compile(
    r"""\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*
    (?: '([^']*)'\s*(?:\#.*)? | "([^"]*)"\s*(?:\#.*)? | (.*?)\s*(?:(?<=\s)\#.*)? )$""",
    re.VERBOSE,
)
_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
_TERMINATED = 143
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Job:
    """A job as it was last seen.

    Attributes:
        id: the job server's name for it.
        address: the job server's.
        status: `PENDING`, `RUNNING`, `STOPPED`, `SUCCEEDED` or `FAILED`.
        exit_status: the command's, None while it goes on.
        message: the job server's word about it.
    """

    id: str
    address: str
    status: str
    exit_status: int | None = None
    message: str = ""

    @property
    def advice(self) -> str:
        """How to follow it and to stop it, in two lines."""
        return (
            f"  follow it: ray job logs --address {self.address} --follow {self.id}\n"
            f"  stop it:   ray job stop --address {self.address} {self.id}"
        )


def read_env_file(path: Path) -> dict[str, str]:
    """Return the assignments in a file such as docker compose reads; nothing of it is expanded.

    Raises:
        ConfigurationError: it cannot be read.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    found = (_ASSIGNMENT.match(line) for line in lines)
    return {m[1]: next((text for text in m.groups()[1:] if text is not None), "") for m in found if m is not None}


class JobServer:
    """A cluster's job server.

    Attributes:
        address: its URL.
        env_file: the file that its token is read from, unless the environment has it.
    """

    def __init__(self, address: str | None = None, env_file: Path | None = None) -> None:
        """Reach the job server.

        Args:
            address: its URL; None for RAY_API_SERVER_ADDRESS, or port 8265 of this machine.
            env_file: where its token is, unless the environment has one; None for `.env` here, if there is one.

        Raises:
            ConfigurationError: an address or a file that cannot be.
            JobServerUnavailable: nobody answers there, or not to us.
            SquallError: the extra `cluster` is not installed.
        """
        self.address = _checked(address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS)
        self.env_file = env_file or ENV_FILE
        if env_file is not None or ENV_FILE.exists():
            for name, value in read_env_file(self.env_file).items():
                if name in _TOKEN_VARIABLES:
                    os.environ.setdefault(name, value)
        os.environ[ADDRESS_VARIABLE] = self.address  # Ray takes RAY_ADDRESS before the address that it is given
        self._client = self._connect()

    def _connect(self) -> JobSubmissionClient:
        try:
            import aiohttp  # noqa: F401
            import requests  # noqa: F401
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise SquallError(
                f"submitting needs more than is installed: pip install 'squall[cluster]' ({error})"
            ) from error
        url = urlsplit(self.address)
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            socket.create_connection((url.hostname or "", port), CONNECT_SECONDS).close()
        except OSError as error:
            raise JobServerUnavailable(
                f"there is no job server at {self.address}: {error}; start a cluster (docker compose up -d), "
                f"or name another --address"
            ) from error
        return self._ask(lambda: JobSubmissionClient(self.address), "a first answer")

    def submit(self, command: Sequence[str], working_dir: Path) -> Job:
        """Upload a folder and start `squall` with these arguments in it.

        Raises:
            ConfigurationError: there is no such folder.
            JobServerUnavailable: it did not take the job.
        """
        if not working_dir.is_dir():
            raise ConfigurationError(f"there is no folder {working_dir} to submit")
        environment = {"working_dir": str(working_dir.absolute()), "excludes": NEVER_UPLOADED}
        entrypoint = shlex.join(["squall", *command])

        def call() -> str:
            return self._client.submit_job(entrypoint=entrypoint, runtime_env=environment)

        hint = f"; if {working_dir} is larger than 100 MiB, name in .rayignore what to leave out"
        return Job(self._ask(call, "taking the job", UPLOAD_SECONDS, hint), self.address, "PENDING")

    def look(self, job: Job) -> Job:
        """Return the job as it is now.

        Raises:
            JobServerUnavailable: no answer.
        """
        details = self._ask(lambda: self._client.get_job_info(job.id), f"an answer about job {job.id}")
        return Job(job.id, job.address, str(details.status), _exit_status(details), details.message or "")

    def follow(self, job: Job, write: Callable[[str], object]) -> Job:
        """Pass the job's log on until it ends, and return it as it is then.

        Raises:
            JobServerUnavailable: no answer for two minutes; a head that was restarted is back by then.
        """
        return asyncio.run(self._follow(job, write))

    async def _follow(self, job: Job, write: Callable[[str], object]) -> Job:
        log = _Log(write)
        answered = time.monotonic()
        tail: asyncio.Task[None] | None = None
        try:
            while True:
                tail = tail or asyncio.create_task(self._tail(job, log))
                await asyncio.wait({tail}, timeout=LOOK_SECONDS)
                try:
                    job = self.look(job)
                except JobServerUnavailable:
                    if time.monotonic() - answered > AWAY_SECONDS:
                        raise
                    await asyncio.sleep(LOOK_SECONDS)
                    continue
                answered = time.monotonic()
                if job.exit_status is not None:
                    await asyncio.wait({tail}, timeout=DRAIN_SECONDS)
                    return job
                if tail.done():  # the connection broke, and the job goes on
                    tail = None
                    await asyncio.sleep(LOOK_SECONDS)
        finally:
            if tail is not None:
                tail.cancel()

    async def _tail(self, job: Job, log: _Log) -> None:
        import aiohttp

        log.begin()
        with contextlib.suppress(RuntimeError, OSError, aiohttp.ClientError):  # `_follow` looks what became of the job
            async for text in self._client.tail_job_logs(job.id):
                log.take(text)

    def _ask(self, call: Callable[[], _Answer], what: str, seconds: float = ANSWER_SECONDS, hint: str = "") -> _Answer:
        """Call within a deadline; Ray's client has none, so a thread of our own does the waiting."""
        import requests
        from ray.exceptions import AuthenticationError

        answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put((call(), None))
            except Exception as error:
                answers.put((None, error))

        threading.Thread(target=ask, name="job-server", daemon=True).start()
        try:
            answer, failure = answers.get(timeout=seconds)
        except queue.Empty:
            failure = TimeoutError(f"waited {seconds:.0f} s for {what}")
        if failure is None:
            return answer  # type: ignore[no-any-return]
        if isinstance(failure, AuthenticationError):
            raise JobServerUnavailable(
                f"the job server at {self.address} does not take our token: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
                f"must be the cluster's, in the environment or in {self.env_file}"
            ) from failure
        if isinstance(failure, RuntimeError | OSError | requests.RequestException):
            line = (str(failure).splitlines() or [repr(failure)])[0]
            raise JobServerUnavailable(f"the job server at {self.address}: {line}{hint}") from failure
        raise failure


class _Log:
    """A job's log. Each connection sends it from its beginning; what was passed on before is left out."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._passed_on = self._come = 0

    def begin(self) -> None:
        self._come = 0

    def take(self, text: str) -> None:
        new = text[max(0, self._passed_on - self._come) :]
        self._come += len(text)
        if new:
            self._passed_on += len(new)
            self._write(new)


def _checked(address: str) -> str:
    url = urlsplit(address)
    try:
        good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigurationError(f"a job server's address is such as {DEFAULT_ADDRESS}, got {address!r}")
    return address.rstrip("/")


def _exit_status(details: JobDetails) -> int | None:
    if not details.status.is_terminal():
        return None
    code = details.driver_exit_code
    if code is not None:
        return code if code >= 0 else 128 - code
    return {"SUCCEEDED": 0, "STOPPED": _TERMINATED}.get(str(details.status), 1)
