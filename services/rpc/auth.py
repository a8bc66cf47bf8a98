"""Auth."""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from replay.errors import ConfigurationError
from services.errors import Overloaded, Unauthenticated
from services.rpc.errors import to_status
from services.rpc.interceptors import Continuation, Handler, abort

TOKEN = "SQUALL_GRPC_TOKEN"


LOOPBACK = "127.0.0.1"


MOST_PROBES = 64
"""Of those, health checks without the token."""


_SHORTEST_TOKEN = 16


_HEALTH_CHECK = "/grpc.health.v1.Health/Check"


def read_token(file: Path | None = None) -> str | None:
    """Return the token in `file`, else in SQUALL_GRPC_TOKEN, else None.

    Raises:
        ConfigurationError: the file cannot be read, or what it holds is no token.
    """
    if file is None:
        token, where = os.environ.get(TOKEN) or None, TOKEN
    else:
        try:
            token, where = file.read_text().strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"cannot read a token from {file}: {error}") from error
    if token is not None and not re.fullmatch(rf"[!-~]{{{_SHORTEST_TOKEN},1000}}", token):
        raise ConfigurationError(
            f"a token has {_SHORTEST_TOKEN} to 1,000 printable ASCII characters without spaces, which `openssl rand "
            f"-hex 32` makes; that in {where} has {len(token)} characters or others"
        )
    return token


@dataclass(frozen=True)
class ServerConfig:
    """Where a server listens, and whom it lets in.

    Attributes:
        address: `host:port`; port 0 takes any that is free.
        token: what a caller must show, as `authorization: Bearer TOKEN`; None lets everybody in.
        tls_cert: PEM file of the server's certificate and its chain.
        tls_key: PEM file of its key.
    """

    address: str = f"{LOOPBACK}:0"
    token: str | None = field(default=None, repr=False)
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        host, _ = split_address(self.address)
        if self.token is None and not is_loopback(host):
            raise ConfigurationError(
                f"listening on {self.address}, beyond this machine's loopback, needs a token: set {TOKEN}, or name a "
                f"--token-file"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigurationError("TLS takes both a certificate and its key: --tls-cert and --tls-key")

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return what TLS needs, or None without it.

        Raises:
            ConfigurationError: a file cannot be read.
        """
        if self.tls_cert is None or self.tls_key is None:
            return None
        try:
            pair = (self.tls_key.read_bytes(), self.tls_cert.read_bytes())
        except OSError as error:
            raise ConfigurationError(f"cannot read what TLS needs: {error}") from error
        return grpc.ssl_server_credentials([pair])


def check_free(address: str) -> None:
    """Refuse an address of this machine that nothing can listen on now; a port of 0 is any that is free.

    Raises:
        ConfigurationError: with the system's reason, which gRPC's own error leaves out.
    """
    host, port = split_address(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that ended a moment ago is no server
            probe.bind(where)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {address}: {error.strerror or error}") from error


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[IPv6]:port`.

    Raises:
        ConfigurationError: it is neither.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/]+)):(\d{1,5})", address)
    if match is None or int(match[3]) > 65535:
        raise ConfigurationError(f"an address is host:port, such as {LOOPBACK}:50051, got {address!r}")
    return match[1] or match[2], int(match[3])


def is_loopback(host: str) -> bool:
    """Whether a host is this machine as seen from itself alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Turns away whoever does not know the token, whatever the method, before anything that was sent is looked at."""

    def __init__(self, token: str, health: Any) -> None:
        self._token, self._health = token.encode(), health
        self._probes = 0
        # Of these kinds because they read no message; a caller of any other kind understands the answer.
        self._denial: Handler = grpc.stream_stream_rpc_method_handler(self._deny)
        self._probe: Handler = grpc.stream_unary_rpc_method_handler(
            self._answer_probe, response_serializer=health_pb2.HealthCheckResponse.SerializeToString
        )

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler | None:
        """Let a call with the token through, and answer a health check without it."""
        if self._is_known(details):
            return await continuation(details)
        # The probe of whoever runs the container has no token.
        return self._probe if details.method == _HEALTH_CHECK else self._denial

    def _is_known(self, details: grpc.HandlerCallDetails) -> bool:
        shown = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        if len(shown) != 1:
            return False
        value = shown[0] if isinstance(shown[0], bytes) else shown[0].encode()
        scheme, _, token = value.partition(b" ")
        return hmac.compare_digest(token.strip(), self._token) and scheme.lower() == b"bearer"

    async def _answer_probe(self, _: Any, context: Any) -> Any:
        """Tell how the server as a whole is, whatever was asked: who never sends the question holds no call with it."""
        if self._probes >= MOST_PROBES:
            await abort(context, Overloaded(f"{self._probes} health checks without a token are under way already"))
        self._probes += 1
        context.add_done_callback(self._probed)  # later than this answers, where the caller does not take the answer
        return await self._health.Check(health_pb2.HealthCheckRequest(), context)

    def _probed(self, _: Any) -> None:
        self._probes -= 1

    @staticmethod
    async def _deny(_: Any, context: Any) -> None:
        code, text, trailers = to_status(Unauthenticated("this server wants a token: authorization: Bearer TOKEN"))
        await context.abort(code, text, trailers)
