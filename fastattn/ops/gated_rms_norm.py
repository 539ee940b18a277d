"""RMSNorm with a gate, by groups of columns."""

from typing import TYPE_CHECKING, Any, Literal

import torch

from ..reference.gated_rms_norm import gated_rms_norm as reference
from ..reference.rms_norm import default_eps
from .core.apply import call
from .core.arguments import check_choice, check_float_tensor, check_shape
from .core.backends import use_triton
from .core.catalog import Normal, Sample, operation
from .core.gradients import gradients
from .core.lazy_imports import lazy_module
from .core.norm import check_dtype, check_norm
from .core.registration import kernel_op
from .core.sharding import rowwise

if TYPE_CHECKING:
    from ..kernels.norm import gated_backward, gated_forward
else:
    gated_backward = lazy_module("fastattn.kernels.norm.gated_backward")
    gated_forward = lazy_module("fastattn.kernels.norm.gated_forward")

GateActivation = Literal["silu", "sigmoid"]
GatedCasting = Literal["float32", "llama"]


@kernel_op(gated_forward.gated_norm_forward, sharding=rowwise(rows_in=(0, 1), rows_out=(0, 1)))
def gated_norm_forward(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    group_size: int,
    out_dtype: torch.dtype,
    eps: float,
    gate_first: bool,
    activation: str,
    casting: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd of the groups), see gated_norm_forward in kernels/norm/gated_forward.py."""
    shape = (*x.shape[:-1], x.shape[-1] // max(group_size, 1))
    rstd = x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape, dtype=out_dtype), rstd


@kernel_op(
    gated_backward.gated_norm_backward,
    sharding=rowwise(rows_in=(0, 1, 2, 4), rows_out=(0, 1), summed_out=(2,)),
)
def gated_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    group_size: int,
    weight_dtype: torch.dtype | None,
    gate_first: bool,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dx, dgate, dweight), see gated_norm_backward in kernels/norm/gated_backward.py."""
    dweight = None if weight_dtype is None else x.new_empty(x.shape[-1:], dtype=weight_dtype)
    return x.new_empty(x.shape), gate.new_empty(gate.shape), dweight


class GatedNormFunction(torch.autograd.Function):
    """(y, rstd) of gated_norm_forward, of which y is differentiable.

    `settings` are the arguments of gated_norm_forward that are no tensors, in its order.
    """

    returned = 1

    @staticmethod
    def forward(
        x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor | None, settings: tuple
    ) -> tuple:
        return gated_norm_forward(x, gate, weight, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.settings = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        x, gate, weight, rstd = ctx.saved_tensors
        group_size, _, eps, gate_first, activation, casting = ctx.settings
        weight_dtype = weight.dtype if ctx.needs_input_grad[2] else None
        found = gradients(
            gated_norm_backward,
            _gated_norm_backward_formula,
            (dy, x, gate, weight, rstd),
            (group_size, weight_dtype, gate_first, activation),
            (eps, casting),
        )
        return *found, None


def _gated_norm_backward_formula(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    group_size: int,
    weight_dtype: torch.dtype | None,
    gate_first: bool,
    activation: str,
    eps: float,
    casting: str,
) -> tuple[torch.Tensor | None, ...]:
    """What gated_norm_backward computes, in PyTorch; rstd is a function of x and gate here."""

    def norm(x: torch.Tensor, gate: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return reference(
            x,
            gate,
            given[0] if given else weight,
            eps,
            group_size=group_size,
            gate_first=gate_first,
            activation=activation,
            casting=casting,
            out_dtype=dy.dtype,
        )

    variables = [x, gate] if weight is None or weight_dtype is None else [x, gate, weight]
    _, pullback, *_ = torch.func.vjp(norm, *variables)
    dx, dgate, *rest = pullback(dy)
    return dx, dgate, rest[0] if rest else None


@operation(
    reference=reference,
    samples=(
        Sample("smallest", x=(2, 6), gate=(2, 6), weight=(6,), eps=1e-3, group_size=3),
        Sample("gate after", x=(3, 7, 64), gate=(3, 7, 64), weight=(64,), eps=1e-6),
        Sample(
            "gate first, groups of an odd width",
            x=(37, 130),
            gate=(37, 130),
            weight=(130,),
            eps=1e-5,
            group_size=65,
            gate_first=True,
        ),
        Sample(
            "Mamba 2's casting",
            x=(9, 144),
            gate=(9, 144),
            weight=(144,),
            eps=1e-6,
            group_size=48,
            gate_first=True,
            casting="llama",
        ),
        Sample(
            "Qwen3-Next's casting", x=(9, 72), gate=(9, 72), weight=(72,), eps=1e-6, casting="llama"
        ),
        Sample(
            "sigmoid, float32 weight",
            x=(9, 40),
            gate=(9, 40),
            weight=Normal((40,), torch.float32),
            eps=1e-6,
            activation="sigmoid",
        ),
        Sample(
            "float32 gate and result",
            x=(9, 40),
            gate=Normal((9, 40), torch.float32),
            weight=(40,),
            eps=1e-6,
            gate_first=True,
            out_dtype=torch.float32,
        ),
        Sample("no weight, one dimension", x=(33,), gate=(33,), eps=1e-5, gate_first=True),
        Sample("groups of one", x=(5, 3), gate=(5, 3), weight=(3,), eps=0.1, group_size=1),
        Sample("many groups", x=(40, 512), gate=(40, 512), weight=(512,), eps=1e-6, group_size=16),
        Sample(
            "wide, gate first",
            x=(3, 9000),
            gate=(3, 9000),
            weight=(9000,),
            eps=1e-6,
            gate_first=True,
        ),
        Sample(
            "wide groups, gate after",
            x=(2, 18002),
            gate=(2, 18002),
            weight=(18002,),
            eps=1e-6,
            group_size=9001,
        ),
        Sample(
            "large gates",
            x=(4, 50),
            gate=Normal((4, 50), scale=100.0),
            weight=(50,),
            eps=1e-6,
            gate_first=True,
        ),
        Sample("no rows", x=(0, 16), gate=(0, 16), weight=(16,), eps=1e-6, group_size=4),
    ),
)
def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    group_size: int | None = None,
    gate_first: bool = False,
    activation: GateActivation = "silu",
    casting: GatedCasting = "float32",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """RMSNorm of groups of columns, multiplied by an activated gate before or after it.

    With n(z) = z / sqrt(mean(z^2) + eps) of each group of a row, y is n(x) * weight *
    activation(gate), or with gate_first n(x * activation(gate)) * weight: the norm at the end of a
    state space or linear attention layer. Computed in float32 (float64 for float64) whatever the
    inputs' dtype; autocast does not change it. Only the inputs and a number a group are saved.

    Args:
        x: (..., cols), float16, bfloat16, float32 or float64. Any strides; rows with a unit last
            stride at one common distance, as a slice of a wider product has, are read in place,
            other layouts are copied.
        gate: shaped like x, of any float dtype and strides.
        weight: (cols,), of any float dtype, or None for ones.
        eps: added to the mean of squares; None is the machine epsilon of the dtype computed in.
        group_size: columns that are normalized together, which divide cols; None for all.
        gate_first: whether the gate multiplies x before the norm (Mamba 2, Bamba, Zamba 2,
            Nemotron-H) or the result of it (Qwen3-Next, Kimi Linear).
        activation: "silu" or "sigmoid".
        casting: what is rounded on the way: "float32" nothing (Falcon-H1, Kimi Linear), "llama" the
            normalized x to x's dtype and, with the gate after it, its product with the weight to
            the dtype of both (Mamba 2, Qwen3-Next).
        out_dtype: the dtype of y; None is x's.

    Returns:
        y, shaped like x, any number of times differentiable in x, gate and weight.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Example:
        >>> x, gate = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        >>> fastattn.gated_rms_norm(x, gate, torch.ones(8), 1e-6, group_size=4).shape
        torch.Size([2, 5, 8])

    Source: Dao and Gu, "Transformers are SSMs" (2024), for the gate before the norm.
    """
    op = "gated_rms_norm"
    check_norm(op, x, weight, None, eps)
    check_float_tensor(op, "gate", gate, like=x)
    check_shape(op, "gate", gate, x.shape)
    check_choice(op, "activation", activation, ("silu", "sigmoid"))
    check_choice(op, "casting", casting, ("float32", "llama"))
    check_dtype(op, "out_dtype", out_dtype, x)
    cols = x.shape[-1]
    if group_size is None:
        group_size = cols
    elif group_size < 1 or cols % group_size:
        raise ValueError(f"{op}: group_size must divide the {cols} columns of x, got {group_size}")
    if eps is None:
        eps = default_eps(x)
    out_dtype = out_dtype or x.dtype
    if not use_triton(x):
        return reference(
            x,
            gate,
            weight,
            eps,
            group_size=group_size,
            gate_first=gate_first,
            activation=activation,
            casting=casting,
            out_dtype=out_dtype,
        )
    settings = (group_size, out_dtype, float(eps), bool(gate_first), activation, casting)
    y, *_ = call(GatedNormFunction, x, gate, weight, settings)
    return y
