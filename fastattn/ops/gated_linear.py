"""The fused gated linear layer: both products and the activation in one kernel."""

import math
from typing import Literal, get_args

import torch

from .. import reference
from .core.apply import call
from .core.arguments import check_choice, check_float_tensor, check_shape
from .core.backends import use_triton
from .core.catalog import Normal, Sample, operation
from .core.precision import autocast, product_precision
from .core.products import check_same_dtype, choose_engine
from .gated_linear_function import GatedLinearFunction

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "sigmoid"]

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


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
        Sample(
            "gate and up kept, biases",
            x=(3, 13, 48),
            w_gate=Normal((40, 48), scale=0.2),
            w_up=Normal((40, 48), scale=0.2),
            b_gate=(40,),
            b_up=(40,),
            activation="gelu_tanh",
            recompute=False,
        ),
        Sample(
            "gate and up kept, gpt-oss",
            x=(4, 20),
            w_gate=(3, 20),
            w_up=(3, 20),
            limit=7.0,
            alpha=1.702,
            up_offset=1.0,
            recompute=False,
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
    recompute: bool = True,
) -> torch.Tensor:
    """Two linear layers and a gated activation in one kernel.

    activation(x w_gate^T + b_gate) * (x w_up^T + b_up): with "silu" the first half of Llama's MLP.

    The forward has neither product in memory, and nothing is saved for the backward but the
    arguments: two linear layers and silu(gate) * up save three more tensors of the output's size
    (gate, silu(gate) and up). The backward computes both products again, a third more arithmetic
    than the four that its gradients take anyway, and holds the gradients of gate and up while it
    runs: in the fused kernel, or on a GPU from 1024 columns of x on by PyTorch's own products,
    which are predicted to be faster there and hold gate and up as well.

    With recompute=False the forward computes gate and up by two products, PyTorch's own on a GPU,
    and saves both, rounded to x's dtype. That is predicted to be the fastest step, for two tensors
    of the output's size. `docs/speed.md` has time and memory of each form.

    Products are summed in float32 (float64 for float64), the activation is applied to the sums, and
    the result is rounded once; of infinite sums see `swiglu`. Where gate and up are in memory, they
    are rounded there. Float32 operands multiply in full precision, or in TF32 where
    `torch.set_float32_matmul_precision` or `torch.backends.cuda.matmul.allow_tf32` say so.

    Args:
        x: (..., K), float16, bfloat16, float32 or float64. Rows with a unit last stride at one
            common distance are read in place, other layouts are copied.
        w_gate, w_up: (N, K), of x's dtype. Read in place where both have a unit stride along K, or
            both along N, as the transposes of (K, N); copied otherwise.
        b_gate, b_up: (N,), of x's dtype, or None.
        activation: "silu", "gelu", "gelu_tanh", "relu" or "sigmoid", as in `swiglu`, `geglu`,
            `reglu` and `glu`.
        limit, alpha, up_offset: as in `swiglu`, for "silu" alone.
        recompute: whether the backward computes gate and up again or finds them saved. On the
            reference PyTorch saves what it saves.

    Returns:
        (..., N), of x's dtype, or autocast's; any number of times differentiable in all tensors.

    Raises:
        TypeError: an argument is no tensor, of an unsupported dtype, or of another one than x.
        ValueError: a shape, device or value does not fit.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).

    Example:
        >>> x, (gate, up) = torch.randn(3, 8), torch.randn(2, 16, 8)
        >>> y = fastattn.gated_linear(x, gate, up)
        >>> torch.testing.assert_close(y, fastattn.swiglu(x @ gate.T, x @ up.T))
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
    arguments = (w_gate, w_up, b_gate, b_up, settings, engine, recompute)
    if x.dim() == 1:
        return call(GatedLinearFunction, x[None], *arguments)[0][0]
    return call(GatedLinearFunction, x, *arguments)[0]


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
