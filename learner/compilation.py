"""Compiled updates: the loss of a batch and its gradients as one program of torch.compile's.

On a CPU that saves calls and passes over memory, on a GPU it is a CUDA graph: one launch for a whole update.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from learner.batches import TransitionBatch
from replay.errors import ConfigurationError

LossFunction = Callable[[TransitionBatch], dict[str, Tensor]]
NOT_SCALED = "compile_updates works in the precisions 32-true and bf16-mixed, not in 16-mixed"
_ADVICE = "It needs a C++ compiler and Python's headers there, such as Debian's g++ and python3-dev."


def find_compiler() -> None:
    """Look for the C++ compiler that a CPU's programs are compiled by.

    Raises:
        ConfigurationError: there is none on this machine.
    """
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise ConfigurationError(f"compile_updates: there is no {name} on this machine. {_ADVICE}")


def compile_backward(losses: LossFunction, parameters: Sequence[nn.Parameter]) -> LossFunction:
    """Return a function of a batch that leaves the loss's gradients in `parameters`, and returns what was found.

    It is compiled at its first call, which takes 3 to 15 seconds; PyTorch keeps what it compiled on disk. Random
    numbers are drawn from another sequence than uncompiled, and results agree up to rounding.

    Args:
        losses: returns tensors by name, among them `loss`, a scalar. It may read tensors, in the batch and in
            modules, and must change nothing; a number that it reads is a reason to compile anew when it changes.
        parameters: the loss depends on each of them; they are on one device. What gradients they hold is lost.

    Raises:
        ConfigurationError: from the returned function, if PyTorch cannot compile on this machine.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # the compiler takes a second to import
    from torch._inductor.exc import CppCompileError, GPUTooOldForTriton, InvalidCxxCompiler, TritonMissing

    on_gpu = parameters[0].is_cuda
    torch._dynamo.config.trace_autograd_ops = True  # or `autograd.grad` ends the program
    if not on_gpu:
        torch._inductor.config.compile_threads = 1  # a few kernels are not worth processes that stay behind

    def differentiate(batch: TransitionBatch) -> tuple[list[Tensor], dict[str, Tensor]]:
        results = losses(batch)
        # Fused optimizers read a gradient as its parameter lies; `backward` would see to that.
        gradients = [
            gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
            for gradient, parameter in zip(torch.autograd.grad(results["loss"], parameters), parameters, strict=True)
        ]
        return gradients, {name: tensor.detach() for name, tensor in results.items()}

    program = torch.compile(differentiate, fullgraph=True, mode="reduce-overhead" if on_gpu else "default")

    def backward(batch: TransitionBatch) -> dict[str, Tensor]:
        if on_gpu:  # what the last update's graph returned is overwritten by this one's
            for parameter in parameters:
                parameter.grad = None
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            gradients, results = program(batch)
        except (BackendCompilerFailed, GPUTooOldForTriton, TritonMissing) as error:
            cause = getattr(error, "inner_exception", error)
            lines = str(cause).strip().splitlines() or [type(cause).__name__]
            reason = next((line for line in lines if "error:" in line), lines[0])
            advice = f" {_ADVICE}" if isinstance(cause, CppCompileError | InvalidCxxCompiler) else ""
            raise ConfigurationError(
                f"compile_updates: PyTorch cannot compile where the learner runs: {reason.strip()}{advice}"
            ) from error
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return {name: tensor.clone() for name, tensor in results.items()} if on_gpu else results

    return backward
