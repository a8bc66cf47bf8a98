"""Access to a gRPC server: its address, token, and TLS files, and the interceptor that checks the token."""

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

TOKEN_VARIABLE = "SQUALL_GRPC_TOKEN"
LOOPBACK = "127.0.0.1"
MAX_PROBES = 64
"""Concurrent health checks without the token; further ones are rejected."""
_MIN_TOKEN_LENGTH = 16
_HEALTH_CHECK = "/grpc.health.v1.Health/Check"


def read_token(file: Path | None = None) -> str | None:
    """Return the token in `file`, else the token in SQUALL_GRPC_TOKEN, else None.

    Raises:
        ConfigurationError: the file cannot be read, or its content is not a valid token.
    """
    if file is None:
        token, source = os.environ.get(TOKEN_VARIABLE) or None, TOKEN_VARIABLE
    else:
        try:
            token, source = file.read_text().strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"cannot read a token from {file}: {error}") from error
    if token is not None and not re.fullmatch(rf"[!-~]{{{_MIN_TOKEN_LENGTH},1000}}", token):
        raise ConfigurationError(
            f"a token has {_MIN_TOKEN_LENGTH} to 1,000 printable ASCII characters without spaces, such as the output "
            f"of `openssl rand -hex 32`; the token in {source} has {len(token)} characters, or others"
        )
    return token


@dataclass(frozen=True)
class ServerConfig:
    """Configuration of a gRPC server: its address, and the credentials that it requires and presents.

    Attributes:
        address: `host:port` to listen on; port 0 selects a free port.
        token: token that every call must send, as `authorization: Bearer TOKEN`; None accepts all calls.
        tls_cert: PEM file of the server's certificate and its chain.
        tls_key: PEM file of the certificate's key.
    """

    address: str = f"{LOOPBACK}:0"
    token: str | None = field(default=None, repr=False)
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        host, _ = split_address(self.address)
        if self.token is None and not is_loopback(host):
            raise ConfigurationError(
                f"listening on {self.address}, beyond this machine's loopback, needs a token: set {TOKEN_VARIABLE}, or "
                f"pass --token-file"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigurationError("TLS takes both a certificate and its key: --tls-cert and --tls-key")

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return the credentials for TLS, or None without TLS.

        Raises:
            ConfigurationError: a file cannot be read.
        """
        if self.tls_cert is None or self.tls_key is None:
            return None
        try:
            pair = (self.tls_key.read_bytes(), self.tls_cert.read_bytes())
        except OSError as error:
            raise ConfigurationError(f"cannot read a TLS file: {error}") from error
        return grpc.ssl_server_credentials([pair])


def check_free(address: str) -> None:
    """Check that a server can listen on an address of this machine now; port 0 stands for any free port.

    Raises:
        ConfigurationError: the server cannot listen; the message has the system's reason, which gRPC's error omits.
    """
    host, port = split_address(address)
    try:
        family, kind, protocol, _, resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # The port of a server that has just ended counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(resolved)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {address}: {error.strerror or error}") from error


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[IPv6]:port`.

    Raises:
        ConfigurationError: an address of another form.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]/]+)):(\d{1,5})", address)
    if match is None or int(match[3]) > 65535:
        raise ConfigurationError(f"an address is host:port, such as {LOOPBACK}:50051, got {address!r}")
    return match[1] or match[2], int(match[3])


def is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address, which only this machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Rejects each call without the token, of any method, before any message of the call is read.

    A health check without the token is answered, because the container runtime that sends it has none.
    """

    def __init__(self, token: str, health: Any) -> None:
        self._token, self._health = token.encode(), health
        self._probes = 0
        # Handlers of streamed requests, because such a handler can answer before it reads a message. To the caller of a
        # unary method, the answers look the same.
        self._rejection: Handler = grpc.stream_stream_rpc_method_handler(self._reject)
        self._probe: Handler = grpc.stream_unary_rpc_method_handler(
            self._answer_probe, response_serializer=health_pb2.HealthCheckResponse.SerializeToString
        )

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler | None:
        """Return the call's own handler if the call has the token."""
        if self._has_token(details):
            return await continuation(details)
        return self._probe if details.method == _HEALTH_CHECK else self._rejection

    def _has_token(self, details: grpc.HandlerCallDetails) -> bool:
        values = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        if len(values) != 1:
            return False
        value = values[0] if isinstance(values[0], bytes) else values[0].encode()
        scheme, _, token = value.partition(b" ")
        return hmac.compare_digest(token.strip(), self._token) and scheme.lower() == b"bearer"

    async def _answer_probe(self, _: Any, context: Any) -> Any:
        """Return the health of the whole server without reading the request, so that no call waits for a request."""
        if self._probes >= MAX_PROBES:
            await abort(
                context, Overloaded(f"{self._probes} health checks without a token are running; try again later")
            )
        self._probes += 1
        context.add_done_callback(self._end_probe)  # the call is done once the client has received the answer
        return await self._health.Check(health_pb2.HealthCheckRequest(), context)

    def _end_probe(self, _: Any) -> None:
        self._probes -= 1

    @staticmethod
    async def _reject(_: Any, context: Any) -> None:
        code, text, trailers = to_status(Unauthenticated("this server requires a token: authorization: Bearer TOKEN"))
        await context.abort(code, text, trailers)
