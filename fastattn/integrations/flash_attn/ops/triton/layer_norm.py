"""Norms with the addition before them: flash_attn.ops.triton.layer_norm."""

from typing import Any

import torch
from torch import nn

from .....ops import add_layer_norm, add_rms_norm, dropout, layer_norm, rms_norm
from ...arguments import refuse


def layer_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    x1: torch.Tensor | None = None,
    weight1: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
) -> Any:
    """LayerNorm of dropout(x) + residual, and that sum, in one kernel.

    Args:
        x: (..., cols), float16, bfloat16, float32 or float64.
        weight: (cols,), of any float dtype.
        bias: (cols,), or None for zeros.
        residual: shaped like x, of any float dtype, or None.
        eps: added to the variance.
        dropout_p: the probability, in [0, 1), that an element of x is zeroed.
        prenorm: return the sum as well.
        residual_in_fp32: without a residual the sum is returned in float32; with one it has the
            residual's dtype.
        zero_centered_weight: 1 is added to the weight.
        is_rms_norm: the norm is that of `rms_norm_fn`.
        x1, weight1, bias1, rowscale, return_dropout_mask, out, residual_out: must be left out.
        out_dtype: the dtype of y; None for that of x.

    Returns:
        y, shaped like x; with prenorm (y, sum). All is differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit, as in `fastattn.add_layer_norm`.
        NotImplementedError: an argument that must be left out is given; the message names it.

    Source: flash_attn/ops/triton/layer_norm.py of flash-attn 2.8.

    Example:
        >>> x, weight = torch.tensor([[1.0, 3.0]]), torch.ones(2)
        >>> y, total = layer_norm_fn(x, weight, None, residual=x, eps=0.0, prenorm=True)
        >>> y.tolist(), total.tolist()
        ([[-1.0, 1.0]], [[2.0, 6.0]])
    """
    op = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    refuse(
        op,
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        rowscale=rowscale,
        return_dropout_mask=return_dropout_mask,
        out=out,
        residual_out=residual_out,
    )
    options: dict[str, Any] = {"eps": eps, "bias": bias, "out_dtype": out_dtype}
    if is_rms_norm:
        norm, add_norm = rms_norm, add_rms_norm
        options["weight_offset"] = float(zero_centered_weight)
    else:
        norm, add_norm = layer_norm, add_layer_norm
        if zero_centered_weight:
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1.0
    if residual is None:
        total = dropout(x, dropout_p) if dropout_p > 0.0 else x
        y = norm(total, weight, **options)
        total = total.float() if residual_in_fp32 else total
    else:
        options |= {"dropout_p": dropout_p, "residual_dtype": residual.dtype}
        y, total = add_norm(x, residual, weight, **options)
    return (y, total) if prenorm else y


def rms_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    x1: torch.Tensor | None = None,
    weight1: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
) -> Any:
    """RMSNorm of dropout(x) + residual, and that sum, in one kernel: see `layer_norm_fn`.

    Args:
        x: (..., cols), float16, bfloat16, float32 or float64.
        weight: (cols,), of any float dtype.
        bias: (cols,), or None for zeros.
        residual: shaped like x, of any float dtype, or None.
        eps: added to the mean of squares.
        dropout_p, prenorm, residual_in_fp32, zero_centered_weight, out_dtype: as in
            `layer_norm_fn`.
        x1, weight1, bias1, rowscale, return_dropout_mask, out, residual_out: must be left out.

    Returns:
        y, shaped like x; with prenorm (y, sum). All is differentiable.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `layer_norm_fn`.

    Source: as `layer_norm_fn`.

    Example:
        >>> rms_norm_fn(torch.tensor([[1.0, 1.0]]), torch.ones(2), None, eps=3.0).tolist()
        [[0.5, 0.5]]
    """
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


class RMSNorm(nn.Module):
    """RMSNorm with flash-attn's arguments and parameters.

    Args:
        hidden_size: the number of columns.
        eps: added to the mean of squares.
        dropout_p: the probability that an element is zeroed before the addition, in training.
        zero_centered_weight: 1 is added to the weight, which begins as zeros then.
        device, dtype: of the weight.

    Raises:
        TypeError, ValueError: as in `rms_norm_fn`, when called.

    Source: as `layer_norm_fn`.

    Example:
        >>> RMSNorm(2, eps=3.0)(torch.tensor([[1.0, 1.0]])).tolist()
        [[0.5, 0.5]]
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.zero_centered_weight = zero_centered_weight
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the weight what it begins as: ones, or zeros where 1 is added to it."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """`rms_norm_fn` of x (..., hidden_size)."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )
