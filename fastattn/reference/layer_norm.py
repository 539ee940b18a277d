"""LayerNorm in plain PyTorch."""

import torch

from . import torch_functions as F
from .residual import add_residual


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension."""
    x = _zero_constant_rows(x)
    out_dtype = out_dtype or x.dtype
    if out_dtype is x.dtype and all(p is None or p.dtype is x.dtype for p in (weight, bias)):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    # PyTorch takes mixed dtypes on some devices only; in float32 they mean the same everywhere.
    computed = torch.promote_types(x.dtype, torch.float32)
    weight = None if weight is None else weight.to(computed)
    bias = None if bias is None else bias.to(computed)
    return F.layer_norm(x.to(computed), x.shape[-1:], weight, bias, eps).to(out_dtype)


def _zero_constant_rows(x: torch.Tensor) -> torch.Tensor:
    """x with zeros for rows of one number, of which nothing is left anyway.

    PyTorch on a CPU computes x / std - mean / std, which there is a difference of large numbers.
    What is subtracted is a constant: the norm's gradient of it is 0.
    """
    first = x.detach()[..., :1]
    constant = (x.detach() == first).all(-1, keepdim=True)
    return x - first.where(constant, 0.0)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    seed: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden = dropout(x) + residual; returns (layer_norm(hidden) in out_dtype or x's, hidden)."""
    hidden = add_residual(x, residual, dropout_p, residual_dtype, seed)
    return layer_norm(hidden, weight, bias, eps, out_dtype=out_dtype or x.dtype), hidden
