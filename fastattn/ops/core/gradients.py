"""Double backward for every op, from its reference.

A Function's backward calls the backward launcher. When autograd records the backward itself
(`create_graph=True`), the launch is wrapped in one more Function: its forward is the same launch,
so first gradients always come from the kernel, and its backward is the derivative of a formula in
plain PyTorch that means the same as the launch.
"""

from collections.abc import Callable
from typing import Any

import torch

from .apply import call


def gradients(
    launch: Callable,
    formula: Callable,
    tensors: tuple[torch.Tensor | None, ...],
    options: tuple = (),
    more: tuple = (),
) -> Any:
    """`launch(*tensors, *options)`, differentiable once more where autograd asks for it.

    Args:
        launch: computes gradients from the tensors by kernels; a tensor, or a tuple of them, None
            where absent.
        formula: the same function of the same arguments in differentiable PyTorch, with as many
            results.
        tensors: saved tensors and incoming gradients. All that derivatives go through must be here.
        options: the arguments that are no tensors.
        more: what the formula alone takes, after the options.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return call(_RecordedGradients, launch, formula, options, more, *tensors)
    return launch(*tensors, *options)


class _RecordedGradients(torch.autograd.Function):
    """The launch of a backward kernel, as an op with a derivative."""

    @staticmethod
    def forward(
        launch: Callable,
        formula: Callable,
        options: tuple,
        more: tuple,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor | tuple:
        return launch(*tensors, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _, ctx.formula, options, more, *tensors = inputs
        ctx.options = (*options, *more)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple:
        tensors = ctx.saved_tensors
        result: list[torch.Tensor | None] = [None] * len(tensors)
        if all(cotangent is None for cotangent in cotangents):
            return None, None, None, None, *result
        # Derivatives with respect to the floating-point tensors; the others are constants.
        places = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]

        def outputs_that_count(*variables: torch.Tensor) -> tuple:
            arguments = list(tensors)
            for place, variable in zip(places, variables, strict=True):
                arguments[place] = variable
            outputs = formula(*arguments, *options)
            if isinstance(outputs, torch.Tensor):
                outputs = (outputs,)
            return tuple(o for o, c in zip(outputs, cotangents, strict=True) if c is not None)

        formula, options = ctx.formula, ctx.options
        _, pullback, *_ = torch.func.vjp(outputs_that_count, *(tensors[i] for i in places))
        derivatives = pullback(tuple(c for c in cotangents if c is not None))
        for place, derivative in zip(places, derivatives, strict=True):
            result[place] = derivative
        return None, None, None, None, *result
