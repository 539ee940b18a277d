"""Norms modulated by sample, in plain PyTorch."""

import torch


def modulated_layer_norm(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """LayerNorm without parameters, times 1 + scale, plus shift; rounded once."""
    computed = x.to(torch.promote_types(x.dtype, torch.float32))
    return _modulate(computed - computed.mean(-1, keepdim=True), shift, scale, eps).to(x.dtype)


def modulated_rms_norm(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """RMSNorm without a weight, times 1 + scale, plus shift; rounded once."""
    computed = x.to(torch.promote_types(x.dtype, torch.float32))
    return _modulate(computed, shift, scale, eps).to(x.dtype)


def _modulate(
    hidden: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float
) -> torch.Tensor:
    normalized = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    # Each sample's between its own dimension and the last.
    shape = (scale.shape[0], *(1,) * (hidden.dim() - 2), hidden.shape[-1])
    shift, scale = (t.to(hidden.dtype).reshape(shape) for t in (shift, scale))
    return normalized * (1.0 + scale) + shift
