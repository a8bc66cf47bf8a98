"""URLs of Redis run stores."""

from __future__ import annotations

from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis

from replay.errors import ConfigurationError

SCHEMES = "redis://[:password@]host:port[/db], rediss://... (TLS) or unix:///path/to/socket[?db=N]"
_OPTIONS = {"unix": ("db",), "redis": (), "rediss": ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")}


def hide_password(url: str) -> str:
    """Return a store's URL without user and password, and without options, which may contain a password too."""
    scheme, _, rest = url.partition(":")
    _, at, location = rest.rpartition("@")
    return f"{scheme}:{'//***@' if at else ''}{location}".partition("?")[0]


def parse_url(url: str) -> tuple[type[Any], dict[str, Any], tuple[str, ...]]:
    """Return the connection class of a URL, the options of the connection, and the texts that no error may contain.

    Raises:
        ConfigurationError: a URL that names no Redis store, or an unknown option.
    """
    invalid = ConfigurationError(f"a Redis store is {SCHEMES}, got {hide_password(url)!r}")
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
    except ValueError:
        raise invalid from None  # the cause may contain a part of the password
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    allowed = _OPTIONS.get(parts.scheme, ())
    if not set(options) <= set(allowed):
        raise ConfigurationError(f"a {parts.scheme}:// store takes {', '.join(allowed) or 'nothing'} after '?'")
    db = options.pop("db", "0") if parts.scheme == "unix" else parts.path.strip("/") or "0"
    if not db.isdecimal() or parts.fragment or parts.scheme not in _OPTIONS or not _server(parts):
        raise invalid
    arguments: dict[str, Any] = {"db": int(db), **options}
    if parts.username:
        arguments["username"] = unquote(parts.username)
    if parts.password:
        arguments["password"] = unquote(parts.password)
    secrets = tuple({text for text in (parts.password, arguments.get("password")) if text})
    if parts.scheme == "unix":
        return redis.UnixDomainSocketConnection, {**arguments, "path": _server(parts)}, secrets
    connection_class = redis.SSLConnection if parts.scheme == "rediss" else redis.Connection
    return connection_class, {**arguments, "host": _server(parts), "port": port, "socket_keepalive": True}, secrets


def _server(parts: SplitResult) -> str:
    """Return the socket file or the host name."""
    return unquote(parts.path) if parts.scheme == "unix" else parts.hostname or ""
