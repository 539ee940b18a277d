"""RMSNorm with a gate, by groups of columns, in plain PyTorch."""

import torch
import torch.nn.functional as F

from .rms_norm import default_eps


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    group_size: int | None = None,
    gate_first: bool = False,
    activation: str = "silu",
    casting: str = "float32",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x / rms(x) of each group of columns, times weight; the activated gate comes first or last."""
    if eps is None:
        eps = default_eps(x)
    computed = torch.promote_types(x.dtype, torch.float32)
    activate = F.silu if activation == "silu" else torch.sigmoid
    activated = activate(gate.to(computed))
    y = x.to(computed)
    if gate_first:
        y = y * activated
    size = group_size or max(x.shape[-1], 1)
    groups = y.reshape(*y.shape[:-1], y.shape[-1] // size, size)
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    y = groups.reshape(y.shape)
    if casting == "llama":
        y = y.to(x.dtype).to(computed)
    if weight is not None:
        y = y * weight.to(computed)
        if casting == "llama" and not gate_first:
            y = y.to(torch.promote_types(x.dtype, weight.dtype)).to(computed)
    if not gate_first:
        y = y * activated
    return y.to(out_dtype or x.dtype)
