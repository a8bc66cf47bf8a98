"""Client of a Ray cluster's job server, for `squall submit`: submits a squall command and follows its log."""

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
# In addition to the files that .gitignore, .rayignore, and Ray itself exclude from an upload.
NEVER_UPLOADED = [".env", "/runs/"]
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 30.0
UPLOAD_SECONDS = 600.0
UNREACHABLE_SECONDS = 120.0
DRAIN_SECONDS = 5.0
POLL_SECONDS = 2.0

# The syntax of docker compose: a quoted value ends at its quote, an unquoted one before a blank and a #.
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
    """A job and its last known status.

    Attributes:
        id: id that the job server gave to the job.
        address: URL of the job server.
        status: `PENDING`, `RUNNING`, `STOPPED`, `SUCCEEDED`, or `FAILED`.
        exit_status: exit status of the command; None while it runs.
        message: the job server's message about the job.
    """

    id: str
    address: str
    status: str
    exit_status: int | None = None
    message: str = ""

    @property
    def advice(self) -> str:
        """The commands that follow and stop the job, in two lines."""
        return (
            f"  to follow it: ray job logs --address {self.address} --follow {self.id}\n"
            f"  to stop it:   ray job stop --address {self.address} {self.id}"
        )


def read_env_file(path: Path) -> dict[str, str]:
    """Return the assignments in a `.env` file of docker compose's syntax; variables in it are not expanded.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    matches = (_ASSIGNMENT.match(line) for line in lines)
    return {m[1]: next((text for text in m.groups()[1:] if text is not None), "") for m in matches if m is not None}


class JobServer:
    """Client of a cluster's job server.

    Attributes:
        address: URL of the job server.
        env_file: file with the token, which is read unless the environment has the token.
    """

    def __init__(self, address: str | None = None, env_file: Path | None = None) -> None:
        """Connect to the job server.

        Args:
            address: URL of the job server; None takes RAY_API_SERVER_ADDRESS, or port 8265 of this machine.
            env_file: file with the token, unless the environment has one; None takes `.env` in this folder, if any.

        Raises:
            ConfigurationError: the address is not a URL, or the file cannot be read.
            JobServerUnavailable: the job server cannot be reached, or refuses the token.
            SquallError: the extra `cluster` is not installed.
        """
        self.address = _check_address(address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS)
        self.env_file = env_file or ENV_FILE
        if env_file is not None or ENV_FILE.exists():
            for name, value in read_env_file(self.env_file).items():
                if name in _TOKEN_VARIABLES:
                    os.environ.setdefault(name, value)
        os.environ[ADDRESS_VARIABLE] = self.address  # Ray prefers RAY_ADDRESS to the address argument
        self._client = self._connect()

    def _connect(self) -> JobSubmissionClient:
        try:
            import aiohttp  # noqa: F401
            import requests  # noqa: F401
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise SquallError(f"squall submit needs more packages: pip install 'squall[cluster]' ({error})") from error
        url = urlsplit(self.address)
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            socket.create_connection((url.hostname or "", port), CONNECT_SECONDS).close()
        except OSError as error:
            raise JobServerUnavailable(
                f"there is no job server at {self.address}: {error}; start a cluster (docker compose up -d), "
                f"or use another --address"
            ) from error
        return self._call(lambda: JobSubmissionClient(self.address), "the connection")

    def submit(self, command: Sequence[str], working_dir: Path) -> Job:
        """Upload a folder, and start a squall command in it on the cluster.

        Args:
            command: arguments of `squall`.
            working_dir: folder to upload.

        Raises:
            ConfigurationError: there is no such folder.
            JobServerUnavailable: the job server did not accept the job.
        """
        if not working_dir.is_dir():
            raise ConfigurationError(f"there is no folder {working_dir} to submit")
        environment = {"working_dir": str(working_dir.absolute()), "excludes": NEVER_UPLOADED}
        entrypoint = shlex.join(["squall", *command])

        def call() -> str:
            return self._client.submit_job(entrypoint=entrypoint, runtime_env=environment)

        hint = f"; if {working_dir} is larger than 100 MiB, exclude files in .rayignore"
        return Job(self._call(call, "the upload", UPLOAD_SECONDS, hint), self.address, "PENDING")

    def refresh(self, job: Job) -> Job:
        """Return the job with its current status.

        Raises:
            JobServerUnavailable: the job server did not answer.
        """
        details = self._call(lambda: self._client.get_job_info(job.id), f"the status of job {job.id}")
        return Job(job.id, job.address, str(details.status), _exit_status(details), details.message or "")

    def follow(self, job: Job, write: Callable[[str], object]) -> Job:
        """Write the job's log until the job ends; return the job with its last status.

        Args:
            job: the job.
            write: called with each new part of the log.

        Raises:
            JobServerUnavailable: no answer for `UNREACHABLE_SECONDS`, in which a head node can restart.
        """
        return asyncio.run(self._follow(job, write))

    async def _follow(self, job: Job, write: Callable[[str], object]) -> Job:
        log = _LogStream(write)
        answered = time.monotonic()
        tail: asyncio.Task[None] | None = None
        try:
            while True:
                tail = tail or asyncio.create_task(self._tail(job, log))
                await asyncio.wait({tail}, timeout=POLL_SECONDS)
                try:
                    job = self.refresh(job)
                except JobServerUnavailable:
                    if time.monotonic() - answered > UNREACHABLE_SECONDS:
                        raise
                    await asyncio.sleep(POLL_SECONDS)
                    continue
                answered = time.monotonic()
                if job.exit_status is not None:
                    await asyncio.wait({tail}, timeout=DRAIN_SECONDS)
                    return job
                if tail.done():  # the connection broke, but the job still runs
                    tail = None
                    await asyncio.sleep(POLL_SECONDS)
        finally:
            if tail is not None:
                tail.cancel()

    async def _tail(self, job: Job, log: _LogStream) -> None:
        import aiohttp

        log.restart()
        with contextlib.suppress(RuntimeError, OSError, aiohttp.ClientError):  # `_follow` checks the job's status
            async for text in self._client.tail_job_logs(job.id):
                log.receive(text)

    def _call(
        self, call: Callable[[], _Answer], result: str, seconds: float = ANSWER_SECONDS, hint: str = ""
    ) -> _Answer:
        """Return what `call` returns within a deadline. It runs in a thread, because Ray's client has no deadlines.

        Args:
            call: the call.
            result: name of the result, for the error text.
            seconds: deadline of the call.
            hint: added to the text of an error that the call raises.
        """
        import requests
        from ray.exceptions import AuthenticationError

        answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answers.put((call(), None))
            except Exception as error:
                answers.put((None, error))

        threading.Thread(target=run, name="job-server", daemon=True).start()
        try:
            answer, failure = answers.get(timeout=seconds)
        except queue.Empty:
            failure = TimeoutError(f"waited {seconds:.0f} s for {result}")
        if failure is None:
            return answer  # type: ignore[no-any-return]
        if isinstance(failure, AuthenticationError):
            raise JobServerUnavailable(
                f"the job server at {self.address} refuses the token: set RAY_AUTH_MODE=token and the cluster's "
                f"RAY_AUTH_TOKEN in the environment or in {self.env_file}"
            ) from failure
        if isinstance(failure, RuntimeError | OSError | requests.RequestException):
            line = (str(failure).splitlines() or [repr(failure)])[0]
            raise JobServerUnavailable(f"the job server at {self.address}: {line}{hint}") from failure
        raise failure


class _LogStream:
    """Writes a job's log once, although each connection sends the log from its beginning."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._written = self._received = 0  # characters: of the log, and of the current connection

    def restart(self) -> None:
        self._received = 0

    def receive(self, text: str) -> None:
        new = text[max(0, self._written - self._received) :]
        self._received += len(text)
        if new:
            self._written += len(new)
            self._write(new)


def _check_address(address: str) -> str:
    url = urlsplit(address)
    try:
        valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigurationError(f"a job server's address must be a URL such as {DEFAULT_ADDRESS}, got {address!r}")
    return address.rstrip("/")


def _exit_status(details: JobDetails) -> int | None:
    if not details.status.is_terminal():
        return None
    code = details.driver_exit_code
    if code is not None:
        return code if code >= 0 else 128 - code
    return {"SUCCEEDED": 0, "STOPPED": _TERMINATED}.get(str(details.status), 1)
