"""gated_linear's launchers as registered ops, and the Function around them.

There are three ways to have gate and up, of which the second and third go the same way in the
backward, by products of their own and the kernels of gated_activation:

    the fused kernel computes them, forward and backward, and they are never in memory
    the backward computes them again by products of their own
    the forward does, and they are saved
"""

from typing import TYPE_CHECKING, Any

import torch

from .. import reference
from .core.gradients import gradients
from .core.lazy_imports import lazy_module
from .core.linear_launchers import (
    apply_linear,
    linear_backward,
    multiply_weight,
    shard_rows_or_features,
    sum_over_rows,
)
from .core.products import Engine, recomputes_by_cublas
from .core.registration import kernel_op
from .gated_activation import gated_activation_backward, gated_activation_forward

if TYPE_CHECKING:
    from ..kernels.matmul import gated_linear as kernels
else:
    kernels = lazy_module("fastattn.kernels.matmul.gated_linear")


@kernel_op(
    kernels.gated_linear_forward,
    sharding=shard_rows_or_features((0,), (1, 2, 3, 4), outputs=(0,), sums=()),
    flops=lambda x, w_gate, *_: 4 * x.numel() * w_gate.shape[0],
)
def gated_linear_forward(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    limit: float | None,
    alpha: float,
    up_offset: float,
    # An int and no bool: DTensor hears integers and what follows one, see `sharding.check_order`.
    tf32: int,
    activation: str,
    batch_invariant: bool,
) -> torch.Tensor:
    """y, see gated_linear_forward in kernels/matmul/gated_linear.py."""
    return x.new_empty((*x.shape[:-1], w_gate.shape[0]))


@kernel_op(
    kernels.gated_linear_backward,
    sharding=shard_rows_or_features((0, 1), (0, 2, 3, 4, 5), outputs=(0, 1), sums=()),
    flops=lambda dy, x, w_gate, *_: 4 * x.numel() * w_gate.shape[0],
)
def gated_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    limit: float | None,
    alpha: float,
    up_offset: float,
    # An int and no bool: DTensor hears integers and what follows one, see `sharding.check_order`.
    tf32: int,
    activation: str,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup), see gated_linear_backward in kernels/matmul/gated_linear.py."""
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape)


class GatedLinearFunction(torch.autograd.Function):
    """(y, gate, up), the last two None with `recompute`.

    `settings` are the arguments of gated_linear_forward that are no tensors, in its order.
    """

    returned = 1

    @staticmethod
    def forward(
        x: torch.Tensor,
        w_gate: torch.Tensor,
        w_up: torch.Tensor,
        b_gate: torch.Tensor | None,
        b_up: torch.Tensor | None,
        settings: tuple,
        engine: Engine,
        recompute: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if recompute:
            return gated_linear_forward(x, w_gate, w_up, b_gate, b_up, *settings), None, None
        gate = apply_linear(x, w_gate, b_gate, engine)
        up = apply_linear(x, w_up, b_up, engine)
        return gated_activation_forward(gate, up, *_of_activation(settings)), gate, up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.settings, ctx.engine, _ = inputs
        _, *kept = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(tensor for tensor in kept if tensor is not None))
        ctx.save_for_backward(*tensors, *kept)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        options = (ctx.needs_input_grad[:5], ctx.settings, ctx.engine)
        tensors = (dy, *ctx.saved_tensors)
        found = gradients(_backward, _backward_formula, tensors, options)
        return *found, None, None, None


def _of_activation(settings: tuple) -> tuple:
    """The settings of the gated activation among those of gated_linear."""
    limit, alpha, up_offset, _, activation, _ = settings
    return limit, alpha, up_offset, int(False), activation


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    needed: tuple[bool, ...],
    settings: tuple,
    engine: Engine,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, both weights and both biases, None where they are not needed."""
    if gate is None and engine == "auto" and recomputes_by_cublas(x.shape[-1]):
        gate = apply_linear(x, w_gate, b_gate, engine)
        up = apply_linear(x, w_up, b_up, engine)
    if gate is None:
        dgate, dup = gated_linear_backward(dy, x, w_gate, w_up, b_gate, b_up, *settings)
    else:
        dgate, dup = gated_activation_backward(dy, gate, up, *_of_activation(settings))
        assert dup is not None
        del gate, up
    dx = None
    if needed[0]:
        dx = multiply_weight(dup, w_up, engine, total=multiply_weight(dgate, w_gate, engine))
    return (
        dx,
        sum_over_rows(dgate, x, engine) if needed[1] else None,
        sum_over_rows(dup, x, engine) if needed[2] else None,
        _sum_of_rows(dgate) if needed[3] else None,
        _sum_of_rows(dup) if needed[4] else None,
    )


def _sum_of_rows(x: torch.Tensor) -> torch.Tensor:
    """The sum of x (..., columns) over its rows: the gradient of a bias.

    By linear's kernel and not by torch, which Inductor would turn into a sum of another order.
    """
    _, total = linear_backward(x, None, x.dtype, 1, 0, None)
    assert total is not None
    return total.to(x.dtype)


def _backward_formula(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    needed: tuple[bool, ...],
    settings: tuple,
    engine: Engine,
) -> tuple[torch.Tensor | None, ...]:
    """What _backward computes, in PyTorch; gate and up are functions of the inputs here."""
    limit, alpha, up_offset, _, activation, _ = settings
    given = (x, w_gate, w_up, b_gate, b_up)
    places = [place for place in range(5) if needed[place]]

    def forward(*variables: torch.Tensor) -> torch.Tensor:
        inputs: list[Any] = list(given)
        for place, variable in zip(places, variables, strict=True):
            inputs[place] = variable
        return reference.gated_linear(
            *inputs,
            activation=activation,
            limit=limit,
            alpha=alpha,
            up_offset=up_offset,
        )

    _, pullback, *_ = torch.func.vjp(forward, *(given[place] for place in places))
    found = dict(zip(places, pullback(dy), strict=True))
    return tuple(found.get(place) for place in range(5))
