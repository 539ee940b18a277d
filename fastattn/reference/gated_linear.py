"""The fused gated linear layer in plain PyTorch."""

import torch

from . import torch_functions as F
from .gated_activation import geglu, glu, reglu, swiglu


def gated_linear(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None = None,
    b_up: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    recompute: bool = True,
) -> torch.Tensor:
    """activation(x w_gate^T + b_gate) * (x w_up^T + b_up); what is saved is PyTorch's affair."""
    gate, up = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
    if activation == "silu":
        return swiglu(gate, up, limit=limit, alpha=alpha, up_offset=up_offset)
    if activation == "relu":
        return reglu(gate, up)
    if activation == "sigmoid":
        return glu(gate, up)
    return geglu(gate, up, approximate="tanh" if activation == "gelu_tanh" else "none")
