"""URL."""

from __future__ import annotations

from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import redis

from replay.errors import ConfigurationError

SCHEMES = "redis://[:password@]host:port[/db], rediss://... (TLS) or unix:///path/to/socket[?db=N]"


_OPTIONS = {"unix": ("db",), "redis": (), "rediss": ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")}


def hide_password(url: str) -> str:
    """Return a store's URL without user and password, and without options, which may hold one too."""
    scheme, _, rest = url.partition(":")
    _, at, place = rest.rpartition("@")
    return f"{scheme}:{'//***@' if at else ''}{place}".partition("?")[0]


def parse_url(url: str) -> tuple[type[Any], dict[str, Any], tuple[str, ...]]:
    """Return the class of connection, its options, and what must not be shown."""
    refused = ConfigurationError(f"a Redis store is {SCHEMES}, got {hide_password(url)!r}")
    try:
        parts = urlsplit(url)
        port = parts.port or 6379
    except ValueError:
        raise refused from None  # the cause may show a piece of the password
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    allowed = _OPTIONS.get(parts.scheme, ())
    if not set(options) <= set(allowed):
        raise ConfigurationError(f"a {parts.scheme}:// store takes {', '.join(allowed) or 'nothing'} after '?'")
    db = options.pop("db", "0") if parts.scheme == "unix" else parts.path.strip("/") or "0"
    if not db.isdecimal() or parts.fragment or parts.scheme not in _OPTIONS or not _place(parts):
        raise refused
    made: dict[str, Any] = {"db": int(db), **options}
    if parts.username:
        made["username"] = unquote(parts.username)
    if parts.password:
        made["password"] = unquote(parts.password)
    hidden = tuple({text for text in (parts.password, made.get("password")) if text})
    if parts.scheme == "unix":
        return redis.UnixDomainSocketConnection, {**made, "path": _place(parts)}, hidden
    connection_class = redis.SSLConnection if parts.scheme == "rediss" else redis.Connection
    return connection_class, {**made, "host": _place(parts), "port": port, "socket_keepalive": True}, hidden


def _place(parts: SplitResult) -> str:
    return unquote(parts.path) if parts.scheme == "unix" else parts.hostname or ""
