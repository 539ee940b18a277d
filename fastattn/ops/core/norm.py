"""What LayerNorm and RMSNorm share: the registered launchers, the Function, the checks."""

from typing import TYPE_CHECKING, Any, Literal

import torch

from ... import reference
from .apply import call
from .arguments import check_choice, check_float_tensor, check_probability, check_seed, check_shape
from .gradients import gradients
from .lazy_imports import lazy_module
from .random import draw_seed
from .registration import kernel_op
from .sharding import rowwise

if TYPE_CHECKING:
    from ...kernels.norm import backward, forward
else:
    backward = lazy_module("fastattn.kernels.norm.backward")
    forward = lazy_module("fastattn.kernels.norm.forward")

Casting = Literal["float32", "llama", "gemma", "t5"]
CASTINGS = ("float32", "llama", "gemma", "t5")


@kernel_op(forward.norm_forward, sharding=rowwise(rows_in=(0, 1), rows_out=(0, 1, 2)))
def norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    dropout_p: float,
    hidden_dtype: torch.dtype,
    out_dtype: torch.dtype,
    centered: bool,
    casting: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(y, hidden, statistics of the rows), see norm_forward in kernels/norm/forward.py."""
    hidden = None if residual is None else x.new_empty(x.shape, dtype=hidden_dtype)
    shape = (*x.shape[:-1], 2 if centered else 1)
    statistics = x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape, dtype=out_dtype), hidden, statistics


@kernel_op(
    backward.norm_backward,
    sharding=rowwise(rows_in=(2, 0, 1, 4), rows_out=(0, 1), summed_out=(2, 3)),
)
def norm_backward(
    dy: torch.Tensor,
    dhidden: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    statistics: torch.Tensor,
    seed: torch.Tensor | None,
    weight_offset: float,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx, dresidual, dweight, dbias), see norm_backward in kernels/norm/backward.py."""
    cols = hidden.shape[-1:]
    return (
        hidden.new_empty(hidden.shape, dtype=x_dtype),
        None if residual_dtype is None else hidden.new_empty(hidden.shape, dtype=residual_dtype),
        None if weight_dtype is None else hidden.new_empty(cols, dtype=weight_dtype),
        None if bias_dtype is None else hidden.new_empty(cols, dtype=bias_dtype),
    )


class NormFunction(torch.autograd.Function):
    """(y, hidden, statistics) of norm_forward, of which y and hidden are differentiable.

    `settings` are the arguments of norm_forward that are no tensors, in its order.
    """

    returned = 2

    @staticmethod
    def forward(
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        seed: torch.Tensor | None,
        settings: tuple,
    ) -> tuple:
        return norm_forward(x, residual, weight, bias, seed, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, residual, weight, bias, seed, settings = inputs
        _, hidden, statistics = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(x if hidden is None else hidden, weight, statistics, seed)
        residual_dtype = None if residual is None else residual.dtype
        bias_dtype = None if bias is None else bias.dtype
        ctx.kept = settings, x.dtype, residual_dtype, bias_dtype

    @staticmethod
    def backward(
        ctx: Any, dy: torch.Tensor | None, dhidden: torch.Tensor | None, *_: None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, statistics, seed = ctx.saved_tensors
        settings, x_dtype, residual_dtype, bias_dtype = ctx.kept
        eps, weight_offset, dropout_p, _, out_dtype, centered, casting = settings
        _, needs_residual, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        if dy is None:
            if dhidden is None:
                return (None,) * 6
            dy = torch.zeros_like(dhidden, dtype=out_dtype)
        # Without dropout the two addends have one gradient, unless their dtypes differ.
        shared = seed is None and residual_dtype is x_dtype
        options = (
            weight_offset,
            dropout_p,
            x_dtype,
            residual_dtype if needs_residual and not shared else None,
            weight.dtype if needs_weight else None,
            bias_dtype if needs_bias else None,
            centered,
        )
        dx, dresidual, dweight, dbias = gradients(
            norm_backward,
            _norm_backward_formula,
            (dy, dhidden, hidden, weight, statistics, seed),
            options,
            (eps, casting),
        )
        if needs_residual and shared:
            dresidual = dx
        return dx, dresidual, dweight, dbias, None, None


def _norm_backward_formula(
    dy: torch.Tensor,
    dhidden: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    statistics: torch.Tensor,
    seed: torch.Tensor | None,
    weight_offset: float,
    dropout_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    centered: bool,
    eps: float,
    casting: str,
) -> tuple[torch.Tensor | None, ...]:
    """What norm_backward computes, in PyTorch; statistics are functions of hidden here."""
    variables: list[torch.Tensor] = [hidden]
    if weight is not None and weight_dtype is not None:
        variables.append(weight)
    if bias_dtype is not None:
        variables.append(hidden.new_zeros(hidden.shape[-1], dtype=bias_dtype))

    def norm(*variables: torch.Tensor) -> torch.Tensor:
        rest = list(variables)
        h = rest.pop(0)
        w = rest.pop(0) if weight_dtype is not None else weight
        b = rest.pop(0) if bias_dtype is not None else None
        if centered:
            return reference.layer_norm(h, w, b, eps, out_dtype=dy.dtype)
        options = {"weight_offset": weight_offset, "casting": casting, "out_dtype": dy.dtype}
        return reference.rms_norm(h, w, eps, bias=b, **options)

    _, pullback, *_ = torch.func.vjp(norm, *variables)
    dh, *parameter_gradients = pullback(dy)
    dweight = parameter_gradients.pop(0) if weight_dtype is not None else None
    dbias = parameter_gradients.pop(0) if bias_dtype is not None else None
    if dhidden is not None:
        dh = dh + dhidden
    dx = dh if seed is None else reference.dropout(dh, dropout_p, seed=seed)
    dresidual = None if residual_dtype is None else dh.to(residual_dtype)
    return dx.to(x_dtype), dresidual, dweight, dbias


def fused_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    centered: bool,
    residual: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    casting: str = "float32",
    dropout_p: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    seed: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, Any]:
    """Run the kernels: y, and the new residual, which is None without a residual."""
    hidden_dtype = x.dtype
    if residual is not None:
        hidden_dtype = residual_dtype or torch.promote_types(x.dtype, residual.dtype)
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = draw_seed(x)
    # A number's type is part of what a kernel is compiled for.
    numbers = (float(eps), float(weight_offset), dropout_p)
    settings = (*numbers, hidden_dtype, out_dtype or x.dtype, centered, casting)
    outputs = call(NormFunction, x, residual, weight, bias, seed, settings)
    return outputs[0], outputs[1]


def check_norm(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
) -> None:
    """The arguments that every norm has."""
    check_float_tensor(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    dtype, device, cols = x.dtype, x.device, x.shape[-1]
    if weight is not None and not _is_usual(weight, dtype, device, cols):
        _check_parameter(op, "weight", weight, x)
    if bias is not None and not _is_usual(bias, dtype, device, cols):
        _check_parameter(op, "bias", bias, x)
    if eps is not None and not eps >= 0.0:
        raise ValueError(f"{op}: eps must be non-negative, got {eps}")


def _is_usual(parameter: Any, dtype: torch.dtype, device: torch.device, cols: int) -> bool:
    """Whether a parameter is as nearly all are: all checks of one take three times as long."""
    return (
        isinstance(parameter, torch.Tensor)
        and parameter.dtype is dtype
        and parameter.ndim == 1
        and parameter.numel() == cols
        and parameter.device == device
    )


def _check_parameter(op: str, name: str, parameter: torch.Tensor, x: torch.Tensor) -> None:
    check_float_tensor(op, name, parameter, like=x)
    check_shape(op, name, parameter, x.shape[-1:])


def check_residual(
    op: str,
    x: torch.Tensor,
    residual: torch.Tensor,
    dropout_p: float,
    residual_dtype: torch.dtype | None,
    seed: torch.Tensor | None,
) -> None:
    """The arguments that the fused addition brings."""
    check_float_tensor(op, "residual", residual, like=x)
    check_shape(op, "residual", residual, x.shape)
    check_probability(op, "dropout_p", dropout_p)
    if seed is not None:
        check_seed(op, seed, like=x)
    check_dtype(op, "residual_dtype", residual_dtype, x)


def check_dtype(op: str, name: str, dtype: torch.dtype | None, x: torch.Tensor) -> None:
    """The dtype of a result, or None."""
    if dtype is not None:
        check_float_tensor(op, name, x.new_empty(0, dtype=dtype), like=x)


def check_casting(op: str, casting: str) -> None:
    """One of the casting modes of RMSNorm."""
    check_choice(op, "casting", casting, CASTINGS)
