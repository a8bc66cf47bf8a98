"""Compiled updates: the loss of a batch and its gradients as one program of torch.compile's.

On a CPU that saves calls and passes over memory, on a GPU it is a CUDA graph: one launch for a whole update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from replay.types import ConfigurationError

Objective = Callable[..., dict[str, Tensor]]
Gradients = Callable[..., tuple[tuple[Tensor, ...], dict[str, Tensor]]]


def compile_gradients(objective: Objective, parameters: Sequence[nn.Parameter]) -> Gradients:
    """Return a function of `objective`'s arguments that returns the loss's gradients, and all that `objective` found.

    It is compiled at its first call, which takes 3 to 30 seconds; PyTorch keeps what it compiled on disk. Random
    numbers are drawn from another sequence than uncompiled, and results agree up to rounding.

    Args:
        objective: returns tensors by name, among them `loss`, a scalar. It may read tensors in its arguments and in
            modules, and must change nothing.
        parameters: those that the loss depends on, on one device.

    Raises:
        ConfigurationError: from the returned function, if PyTorch cannot compile on this machine.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # the compiler takes a second to import

    torch._dynamo.config.trace_autograd_ops = True  # or `autograd.grad` ends the program
    torch._inductor.config.compile_threads = 1  # a few kernels are not worth processes that stay behind
    on_gpu = parameters[0].is_cuda

    def differentiate(*arguments: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        found = objective(*arguments)
        gradients = torch.autograd.grad(found["loss"], parameters)
        return gradients, {name: tensor.detach() for name, tensor in found.items()}

    program = torch.compile(differentiate, fullgraph=True, mode="reduce-overhead" if on_gpu else "default")

    def gradients_of(*arguments: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        if on_gpu:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            gradients, found = program(*arguments)
        except BackendCompilerFailed as error:
            reason = f"{type(error.inner_exception).__name__}: {error.inner_exception}".splitlines()[0]
            raise ConfigurationError(
                "compile_updates: PyTorch cannot compile here. It needs a C++ compiler and Python's headers, such as "
                f"Debian's g++ and python3-dev, where the learner runs. It says: {reason}"
            ) from error
        # The next update overwrites what a CUDA graph returned; gradients are used up by then.
        return gradients, {name: tensor.clone() for name, tensor in found.items()} if on_gpu else found

    return gradients_of
