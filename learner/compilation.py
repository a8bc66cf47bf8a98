"""Compiled updates: the loss of a batch and its gradients as one program of `torch.compile`.

On a CPU the program makes fewer calls and passes over memory. On a GPU it is a CUDA graph: one launch per update.
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
_ADVICE = "It needs a C++ compiler and Python's headers, such as Debian's g++ and python3-dev."


def find_compiler() -> None:
    """Check that this machine has the C++ compiler that compiles programs for a CPU.

    Raises:
        ConfigurationError: the compiler is not installed.
    """
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise ConfigurationError(f"compile_updates: there is no {name} on this machine. {_ADVICE}")


def compile_backward(losses: LossFunction, parameters: Sequence[nn.Parameter]) -> LossFunction:
    """Return a function that stores the gradients of a batch's loss in `parameters` and returns the detached results.

    The first call compiles the function, which takes 3 to 15 seconds; PyTorch caches compiled programs on disk. The
    results are those of `losses` up to rounding, except that random numbers come from another sequence.

    Args:
        losses: function that returns tensors by name, among them the scalar `loss`. It may read tensors of the batch
            and of modules, and must have no side effects. A number that it reads causes a recompilation whenever the
            number changes.
        parameters: parameters on one device that the loss depends on. Their existing gradients are overwritten.

    Raises:
        ConfigurationError: PyTorch cannot compile on this machine. The returned function raises this error.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # importing the compiler takes a second
    from torch._inductor.exc import CppCompileError, GPUTooOldForTriton, InvalidCxxCompiler, TritonMissing

    on_gpu = parameters[0].is_cuda
    torch._dynamo.config.trace_autograd_ops = True  # otherwise `autograd.grad` splits the program in two
    if not on_gpu:
        # Worker processes would stay alive, and do not pay off for a few kernels.
        torch._inductor.config.compile_threads = 1

    def differentiate(batch: TransitionBatch) -> tuple[list[Tensor], dict[str, Tensor]]:
        results = losses(batch)
        # Fused optimizers need gradients with the strides of their parameters, as `backward` makes them.
        gradients = [
            gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
            for gradient, parameter in zip(torch.autograd.grad(results["loss"], parameters), parameters, strict=True)
        ]
        return gradients, {name: tensor.detach() for name, tensor in results.items()}

    program = torch.compile(differentiate, fullgraph=True, mode="reduce-overhead" if on_gpu else "default")

    def backward(batch: TransitionBatch) -> dict[str, Tensor]:
        if on_gpu:  # this call of the CUDA graph overwrites the tensors that the last call returned
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
                f"compile_updates: PyTorch cannot compile on the learner's machine: {reason.strip()}{advice}"
            ) from error
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return {name: tensor.clone() for name, tensor in results.items()} if on_gpu else results

    return backward
