"""The exceptions of Squall; `services.errors` adds the exceptions of the services.

    SquallError                 base class
    ├── ConfigurationError      invalid configuration value
    ├── LayoutMismatch          experience that does not fit its table, or weights that do not fit their network
    ├── NotEnoughMemory         replay table larger than the available memory
    ├── DeadlineExceeded        wait that reached its deadline
    ├── EnvironmentFailed       environment that fails repeatedly
    ├── VideoFailed             video that could not be completed
    └── StalePolicy             trajectory from weights that are too old

Each class defines the exit status of a command and the gRPC status code of a call that end with this error. Code
distinguishes errors by their class, never by the name of the class or by the text of the error.
"""

from __future__ import annotations

from typing import ClassVar


class SquallError(Exception):
    """Base class of all exceptions that Squall raises on purpose.

    The message is one line that names the invalid value and states which values are valid.

    Attributes:
        exit_status: exit status of a command that ends with this error: 1 for a failure, 2 for bad input.
        grpc_code: name of the gRPC status code of a call that ends with this error.
    """

    exit_status: ClassVar[int] = 1
    grpc_code: ClassVar[str] = "INTERNAL"


class ConfigurationError(SquallError, ValueError):
    """An invalid configuration value, rejected before any process starts."""

    exit_status = 2
    grpc_code = "INVALID_ARGUMENT"


class LayoutMismatch(SquallError, ValueError):
    """Experience whose shapes or dtypes differ from the table's layout, or weights of a different network."""

    grpc_code = "INVALID_ARGUMENT"


class NotEnoughMemory(SquallError):
    """A replay table larger than the available memory; the message contains both sizes."""

    exit_status = 2
    grpc_code = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(SquallError, TimeoutError):
    """A wait that reached its deadline; the message states the awaited event."""

    grpc_code = "DEADLINE_EXCEEDED"


class EnvironmentFailed(SquallError):
    """An environment that fails repeatedly; the message contains the last failure."""


class VideoFailed(SquallError):
    """A video that could not be completed."""


class StalePolicy(SquallError):
    """A trajectory whose weights are older than `max_policy_lag` allows, so that no update may use it."""
