"""Gated activations in plain PyTorch.

At infinity they are what PyTorch's own are, NaN for some where the limit is 0, by the CPU.
"""

from collections.abc import Callable

import torch

from . import torch_functions as F


def swiglu(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """silu(gate) * up; with an alpha, gate * sigmoid(alpha * gate) * (up + up_offset)."""

    def silu(gate: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) if alpha == 1.0 else gate * torch.sigmoid(alpha * gate)

    return _apply_gate(silu, gate, up, interleaved, limit, up_offset)


def geglu(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
    approximate: str = "none",
) -> torch.Tensor:
    """gelu(gate) * up."""
    return _apply_gate(lambda gate: F.gelu(gate, approximate=approximate), gate, up, interleaved)


def reglu(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, interleaved: bool = False
) -> torch.Tensor:
    """relu(gate) * up."""
    return _apply_gate(F.relu, gate, up, interleaved)


def glu(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, interleaved: bool = False
) -> torch.Tensor:
    """sigmoid(gate) * up."""
    return _apply_gate(torch.sigmoid, gate, up, interleaved)


def _apply_gate(
    activation: Callable[[torch.Tensor], torch.Tensor],
    gate: torch.Tensor,
    up: torch.Tensor | None,
    interleaved: bool,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """activation(gate) * (up + up_offset), computed in at least float32 and rounded once."""
    dtype = gate.dtype
    computed = torch.promote_types(dtype, torch.float32)
    if up is None:
        packed = gate
        gate, up = (
            (packed[..., 0::2], packed[..., 1::2]) if interleaved else packed.chunk(2, dim=-1)
        )
    gate, up = gate.to(computed), up.to(computed)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (activation(gate) * (up + up_offset)).to(dtype)
