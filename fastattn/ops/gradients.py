"""Double backward for every op, from its reference.

A Function's backward calls the backward launcher. When autograd records the backward itself
(`create_graph=True`), the launch is wrapped in one more Function: its forward is the same launch, so
first gradients always come from the kernel, and its backward is the derivative of a formula in
plain PyTorch that means the same as the launch.
"""

from collections.abc import Callable
from typing import Any

import torch

from .registration import call


def gradients(launch: Callable, formula: Callable, *tensors: torch.Tensor | None) -> tuple:
    """`launch(*tensors)`, differentiable once more where autograd asks for it.

    Args:
        launch: computes the gradients from the tensors by kernels; a tuple, None where absent.
        formula: the same function of the same tensors in differentiable PyTorch.
        tensors: saved tensors and incoming gradients. All that derivatives go through must be here.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return call(_RecordedGradients, launch, formula, *tensors)
    return launch(*tensors)


class _RecordedGradients(torch.autograd.Function):
    """The launch of a backward kernel, as an op with a derivative."""

    @staticmethod
    def forward(launch: Callable, formula: Callable, *tensors: torch.Tensor | None) -> tuple:
        return launch(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _, ctx.formula, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple:
        tensors = ctx.saved_tensors
        # Derivatives with respect to the floating-point tensors; the others are constants.
        places = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]

        def outputs_that_count(*variables: torch.Tensor) -> tuple:
            arguments = list(tensors)
            for place, variable in zip(places, variables, strict=True):
                arguments[place] = variable
            outputs = formula(*arguments)
            return tuple(o for o, c in zip(outputs, cotangents, strict=True) if c is not None)

        formula = ctx.formula
        _, pullback = torch.func.vjp(outputs_that_count, *(tensors[i] for i in places))
        derivatives = pullback(tuple(c for c in cotangents if c is not None))
        result: list[torch.Tensor | None] = [None] * len(tensors)
        for place, derivative in zip(places, derivatives, strict=True):
            result[place] = derivative
        return None, None, *result
