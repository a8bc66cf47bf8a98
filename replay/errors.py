"""Errors that Squall raises on purpose; `services.errors` has those of the services.

    SquallError                 base class
    ├── ConfigurationError      a value that cannot work
    ├── LayoutMismatch          experience that does not fit its table
    ├── NotEnoughMemory         a replay table larger than the memory
    ├── DeadlineExceeded        a wait that reached its deadline
    ├── EnvironmentFailed       an environment that fails again and again
    ├── VideoFailed             a video that could not be completed
    └── StalePolicy             a trajectory from weights that are too old

Each class names the exit status of a command that ends with it, and the gRPC status code of a call that does. Nothing
else decides by an error's class name or text.
"""

from __future__ import annotations

from typing import ClassVar


class SquallError(Exception):
    """Base class of all errors that Squall raises on purpose.

    The text is one line that names the value and says what would be right.

    Attributes:
        exit_status: exit status of a command that ends with this error: 1 for a failure, 2 for bad input.
        grpc_code: name of the gRPC status code of a call that ends with this error.
    """

    exit_status: ClassVar[int] = 1
    grpc_code: ClassVar[str] = "INTERNAL"


class ConfigurationError(SquallError, ValueError):
    """A value that cannot work, refused before anything starts."""

    exit_status = 2
    grpc_code = "INVALID_ARGUMENT"


class LayoutMismatch(SquallError, ValueError):
    """Experience whose shapes or dtypes differ from those of the table."""

    grpc_code = "INVALID_ARGUMENT"


class NotEnoughMemory(SquallError):
    """A replay table that the machine cannot hold; the text has both sizes."""

    exit_status = 2
    grpc_code = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(SquallError, TimeoutError):
    """A wait that reached its deadline; the text says what it waited for."""

    grpc_code = "DEADLINE_EXCEEDED"


class EnvironmentFailed(SquallError):
    """An environment that fails again and again; the text has the last failure."""


class VideoFailed(SquallError):
    """A video that could not be completed."""


class StalePolicy(SquallError):
    """A trajectory older than `max_policy_lag` allows, which must not be trained on."""
