"""The fused gated linear layer: both products and the activation in one kernel."""

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from .. import reference
from .core.apply import call
from .core.arguments import check_choice, check_float_tensor, check_shape
from .core.backends import use_triton
from .core.catalog import Normal, Sample, operation
from .core.gradients import gradients
from .core.lazy_imports import lazy_module
from .core.linear_launchers import (
    linear_backward,
    multiply_weight,
    shard_rows_or_features,
    sum_over_rows,
)
from .core.precision import autocast, product_precision
from .core.products import Engine, check_same_dtype, choose_engine
from .core.registration import kernel_op

if TYPE_CHECKING:
    from ..kernels.matmul import gated_linear as kernels
else:
    kernels = lazy_module("fastattn.kernels.matmul.gated_linear")

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "sigmoid"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


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
    """gated_linear_forward; `settings` are its arguments that are no tensors, in its order."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        w_gate: torch.Tensor,
        w_up: torch.Tensor,
        b_gate: torch.Tensor | None,
        b_up: torch.Tensor | None,
        settings: tuple,
        engine: Engine,
    ) -> torch.Tensor:
        return gated_linear_forward(x, w_gate, w_up, b_gate, b_up, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        *tensors, ctx.settings, ctx.engine = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        options = (ctx.needs_input_grad[:5], ctx.settings, ctx.engine)
        tensors = (dy, *ctx.saved_tensors)
        return *gradients(_backward, _backward_formula, tensors, options), None, None


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    needed: tuple[bool, ...],
    settings: tuple,
    engine: Engine,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, both weights and both biases, None where they are not needed."""
    dgate, dup = gated_linear_backward(dy, x, w_gate, w_up, b_gate, b_up, *settings)
    dx = None
    if needed[0]:
        # One product would need both weights in one tensor, and a copy to have them there.
        dx = multiply_weight(dgate, w_gate, engine) + multiply_weight(dup, w_up, engine)
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
    needed: tuple[bool, ...],
    settings: tuple,
    engine: Engine,
) -> tuple[torch.Tensor | None, ...]:
    """What _backward computes, in PyTorch."""
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


@operation(
    reference=reference.gated_linear,
    samples=(
        Sample("smallest", x=(2, 3), w_gate=(2, 3), w_up=(2, 3)),
        Sample(
            "several tiles, biases",
            x=(3, 13, 48),
            w_gate=Normal((40, 48), scale=0.2),
            w_up=Normal((40, 48), scale=0.2),
            b_gate=(40,),
            b_up=(40,),
        ),
        Sample(
            "whole tiles, gelu",
            x=(64, 64),
            w_gate=Normal((64, 64), scale=0.2),
            w_up=Normal((64, 64), scale=0.2),
            activation="gelu",
        ),
        Sample(
            "odd sizes, tanh gelu",
            x=(37, 45),
            w_gate=Normal((35, 45), scale=0.2),
            w_up=Normal((35, 45), scale=0.2),
            activation="gelu_tanh",
        ),
        Sample(
            "relu, one bias",
            x=(5, 33),
            w_gate=(13, 33),
            w_up=(13, 33),
            b_up=(13,),
            activation="relu",
        ),
        Sample(
            "one dimension, sigmoid",
            x=(9,),
            w_gate=(50, 9),
            w_up=(50, 9),
            activation="sigmoid",
        ),
        Sample(
            "gpt-oss",
            x=(4, 20),
            w_gate=(3, 20),
            w_up=(3, 20),
            limit=7.0,
            alpha=1.702,
            up_offset=1.0,
        ),
        Sample(
            "long sums",
            x=(3, 300),
            w_gate=Normal((5, 300), scale=0.05),
            w_up=Normal((5, 300), scale=0.05),
        ),
        Sample("one feature", x=(33, 1), w_gate=(1, 1), w_up=(1, 1)),
        Sample("nothing to sum", x=(3, 0), w_gate=(4, 0), w_up=(4, 0), b_gate=(4,), b_up=(4,)),
        Sample("no features", x=(3, 4), w_gate=(0, 4), w_up=(0, 4)),
        Sample("no rows", x=(0, 5), w_gate=(4, 5), w_up=(4, 5), b_gate=(4,)),
    ),
)
def gated_linear(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None = None,
    b_up: torch.Tensor | None = None,
    *,
    activation: Activation = "silu",
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """Two linear layers and a gated activation in one kernel.

    activation(x w_gate^T + b_gate) * (x w_up^T + b_up): with "silu" the first half of Llama's MLP.

    Neither product is ever in memory. Nothing is saved for the backward but the arguments: two
    linear layers and silu(gate) * up save three more tensors of the output's size (gate, silu(gate)
    and up). The backward computes both products again, a third more arithmetic than the four that
    its gradients take anyway, and holds the gradients of gate and up while it runs.

    Products are summed in float32 (float64 for float64), the activation is applied to the sums, and
    the result is rounded once; of infinite sums see `swiglu`. Float32 operands multiply in full
    precision, or in TF32 where `torch.set_float32_matmul_precision` or
    `torch.backends.cuda.matmul.allow_tf32` say so.

    Args:
        x: (..., K), float16, bfloat16, float32 or float64. Rows with a unit last stride at one
            common distance are read in place, other layouts are copied.
        w_gate, w_up: (N, K), of x's dtype. Read in place where both have a unit stride along K, or
            both along N, as the transposes of (K, N); copied otherwise.
        b_gate, b_up: (N,), of x's dtype, or None.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "sigmoid", as in `swiglu`, `geglu`,
            `reglu` and `glu`.
        limit, alpha, up_offset: as in `swiglu`, for "silu" alone.

    Returns:
        (..., N), of x's dtype, or autocast's; any number of times differentiable in all tensors.

    Raises:
        TypeError: an argument is no tensor, of an unsupported dtype, or of another one than x.
        ValueError: a shape, device or value does not fit.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    _check(x, w_gate, w_up, b_gate, b_up)
    _check_settings(activation, limit, alpha, up_offset)
    x, w_gate, w_up, b_gate, b_up = autocast(x, w_gate, w_up, b_gate, b_up)
    for name, tensor in (("w_gate", w_gate), ("w_up", w_up), ("b_gate", b_gate), ("b_up", b_up)):
        if tensor is not None:
            check_same_dtype("gated_linear", name, tensor, "x", x)
    if not use_triton(x):
        return reference.gated_linear(
            x,
            w_gate,
            w_up,
            b_gate,
            b_up,
            activation=activation,
            limit=limit,
            alpha=alpha,
            up_offset=up_offset,
        )
    engine = choose_engine(x)
    tf32 = int(product_precision(x.dtype) == "tf32")
    settings = (limit, alpha, up_offset, tf32, activation, engine == "invariant")
    arguments = (w_gate, w_up, b_gate, b_up, settings, engine)
    if x.dim() == 1:
        return call(GatedLinearFunction, x[None], *arguments)[0]
    return call(GatedLinearFunction, x, *arguments)


def _check(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
) -> None:
    op = "gated_linear"
    check_float_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    check_float_tensor(op, "w_gate", w_gate, like=x)
    if w_gate.dim() != 2 or w_gate.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: w_gate must have shape (N, {x.shape[-1]}) for an x of shape {tuple(x.shape)}, "
            f"got {tuple(w_gate.shape)}"
        )
    check_float_tensor(op, "w_up", w_up, like=x)
    check_shape(op, "w_up", w_up, w_gate.shape)
    for name, bias in (("b_gate", b_gate), ("b_up", b_up)):
        if bias is not None:
            check_float_tensor(op, name, bias, like=x)
            check_shape(op, name, bias, w_gate.shape[:1])


def _check_settings(activation: str, limit: float | None, alpha: float, up_offset: float) -> None:
    op = "gated_linear"
    check_choice(op, "activation", activation, ACTIVATIONS)
    if activation != "silu" and (limit, alpha, up_offset) != (None, 1.0, 0.0):
        raise ValueError(
            f"{op}: limit, alpha and up_offset belong to the activation 'silu', got {activation!r}"
        )
    if limit is not None and not limit > 0.0:
        raise ValueError(f"{op}: limit must be positive, got {limit}")
    for name, value in (("alpha", alpha), ("up_offset", up_offset)):
        if not math.isfinite(value):
            raise ValueError(f"{op}: {name} must be finite, got {value}")
