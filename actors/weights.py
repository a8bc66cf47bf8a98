"""Versioned weights: the weights as one contiguous array, the weight store, and the client that fetches them.

Weights are the state of a policy: its parameters and persistent buffers. They include a hash of the tensors' names,
shapes, and dtypes, so that weights of a different network are rejected instead of loaded.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from replay.errors import LayoutMismatch
from replay.remote import RemoteActor, actor_class, is_ready
from replay.types import Array

if TYPE_CHECKING:
    from torch import nn

LONG_POLL_SECONDS = 10.0
_MAX_REQUESTS = 100_000  # concurrent long polls; they are coroutines, not threads


@dataclass(frozen=True)
class Weights:
    """One version of a policy's state.

    Attributes:
        version: number that increases by 1 or more with each publication of a run.
        layout: hash of the tensors' names, shapes, and dtypes, in order.
        data: `[bytes]` uint8, all tensors concatenated.
    """

    version: int
    layout: str
    data: Array


def parameters_hash(module: nn.Module) -> str:
    """Return a hash of the names, shapes, and dtypes of a module's state."""
    lines = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in module.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def pack(module: nn.Module, version: int) -> Weights:
    """Copy a module's state into one array."""
    import torch  # not at module level: the weight store needs no PyTorch, and starts 0.8 s faster without it

    parts = [value.detach().cpu().contiguous().view(-1).view(torch.uint8) for value in module.state_dict().values()]
    data = torch.cat(parts).numpy() if parts else np.empty(0, np.uint8)
    return Weights(version, parameters_hash(module), data)


def unpack(weights: Weights, module: nn.Module) -> None:
    """Copy weights into a module.

    Raises:
        LayoutMismatch: the weights have other names, shapes, or dtypes than the module; the module is unchanged.
    """
    import torch

    if weights.layout != parameters_hash(module):
        raise LayoutMismatch(
            f"the weights (hash {weights.layout}) do not fit this network (hash {parameters_hash(module)})"
        )
    offset = 0
    with torch.no_grad():
        for value in module.state_dict().values():
            size = value.numel() * value.element_size()
            if not size:
                continue
            # Copy, because the array may be a read-only view into the object store.
            part = torch.from_numpy(weights.data[offset : offset + size].copy())
            value.copy_(part.view(value.dtype).view(value.shape))
            offset += size


class WeightStore:
    """The weight store: keeps the newest published weights and serves them by long polling.

    The weight store itself puts each version into the object store, once. An object exists only as long as the process
    that put it there, and the weights must outlive the learner. All methods run on one event loop.
    """

    def __init__(self, put: Callable[[Weights], Any] = lambda weights: weights) -> None:
        """Start without weights.

        Args:
            put: stores weights and returns a reference to them: `ray.put` in a Ray actor.
        """
        self._put = put
        self._version = -1
        self._stored: Any = None
        self._published = asyncio.Event()

    def publish(self, weights: Weights) -> int:
        """Store `weights` if they are newer than the stored weights; return the stored version."""
        if weights.version > self._version:
            self._stored = [self._put(weights)]
            self._version = weights.version
            self._published.set()
            self._published = asyncio.Event()
        return self._version

    async def newer_than(self, version: int, within: float = LONG_POLL_SECONDS) -> Any:
        """Wait for weights newer than `version`; return `[reference]`, or None after `within` seconds."""
        try:
            async with asyncio.timeout(within):
                while self._version <= version:
                    await self._published.wait()
        except TimeoutError:
            return None
        return self._stored

    def report(self) -> dict[str, Any]:
        """Return the version of the stored weights, and this process's id and node."""
        return {"version": self._version, "pid": os.getpid(), "node": socket.gethostname()}


class WeightClient:
    """A client of the weight store that never blocks its caller; after a failed fetch the caller keeps its weights.

    The weight store replies to a request only when it has newer weights. Until then, `poll` only checks a flag.

    Attributes:
        version: version of the weights that `poll` returned last, -1 before the first.
        failed_fetches: number of failed requests.
    """

    def __init__(self, actor: RemoteActor) -> None:
        """Prepare requests to `actor`, a `WeightStore`."""
        self._actor = actor
        self._request: Future[Any] | None = None
        self._reference: Any = None  # to weights that are being fetched
        self.version = -1
        self.failed_fetches = 0

    @property
    def pending(self) -> bool:
        """Whether a request is in flight, so that a later `poll` may return weights."""
        return self._request is not None or self._reference is not None

    def poll(self) -> Weights | None:
        """Return newer weights if they have arrived, else None; send a request if none is in flight."""
        try:
            if self._reference is None:
                if self._request is None:
                    self._request = self._actor.later("newer_than", self.version).future()
                if not self._request.done():
                    return None
                stored, self._request = self._request.result(), None
                if stored is None:
                    return None
                self._reference = stored[0]
            if not is_ready(self._reference):
                return None
            weights: Weights = ray.get(self._reference)
        except (ray.exceptions.RayError, ValueError):
            self._request = self._reference = None
            self._actor.forget()
            self.failed_fetches += 1
            return None
        self._reference = None
        self.version = weights.version
        return weights


WeightStoreActor = actor_class(WeightStore, max_concurrency=_MAX_REQUESTS)
