"""RMSNorm in plain PyTorch."""

import torch

from . import torch_functions as F
from .residual import add_residual


def default_eps(x: torch.Tensor) -> float:
    """The eps of torch.nn.RMSNorm(eps=None): the machine epsilon of the dtype computed in."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    bias: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    casting: str = "float32",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset) + bias over the last dimension."""
    out_dtype = out_dtype or x.dtype
    if eps is None:
        eps = default_eps(x)
    as_torch = bias is None and weight_offset == 0.0 and casting in ("float32", "gemma")
    if as_torch and out_dtype is x.dtype and (weight is None or weight.dtype is x.dtype):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    computed = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(computed)
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if casting == "llama":
        normalized = normalized.to(x.dtype).to(computed)
    elif casting == "t5" and weight is not None and weight.dtype.itemsize == 2:
        normalized = normalized.to(weight.dtype).to(computed)
    if weight is not None:
        normalized = normalized * (weight.to(computed) + weight_offset)
    if bias is not None:
        normalized = normalized + bias.to(computed)
    return normalized.to(out_dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    bias: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    casting: str = "float32",
    dropout_p: float = 0.0,
    residual_dtype: torch.dtype | None = None,
    seed: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden = dropout(x) + residual; returns (rms_norm(hidden) in out_dtype or x's, hidden)."""
    if eps is None:
        eps = default_eps(x)
    hidden = add_residual(x, residual, dropout_p, residual_dtype, seed)
    y = rms_norm(
        hidden,
        weight,
        eps,
        bias=bias,
        weight_offset=weight_offset,
        casting=casting,
        out_dtype=out_dtype or x.dtype,
    )
    return y, hidden
