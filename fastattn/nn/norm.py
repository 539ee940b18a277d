"""LayerNorm, RMSNorm and RMSNorm with a gate as modules."""

from typing import Any

import torch
import torch.nn as nn

from .. import functional, ops
from .tracing import one_node


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` on fastattn's kernels: same arguments, parameters and state_dict.

    Example:
        >>> fastattn.nn.LayerNorm(8)(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize the last `len(normalized_shape)` dimensions of `input`; its dtype is kept."""
        shape = self.normalized_shape
        return functional.layer_norm(input, shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` on fastattn's kernels: same arguments, parameters and state_dict.

    Example:
        >>> fastattn.nn.RMSNorm(8, eps=1e-6)(torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last `len(normalized_shape)` dimensions of `x`; its dtype is kept."""
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm with a gate, as at the end of Mamba 2's mixer or Qwen3-Next's linear attention.

    Args:
        hidden_size: the columns of a row.
        eps: added to the mean of squares.
        group_size, gate_first, activation, casting: as in `fastattn.gated_rms_norm`.
        device, dtype: of the weight, (hidden_size,), which begins as ones.

    Example:
        >>> norm = fastattn.nn.GatedRMSNorm(8, group_size=4)
        >>> norm(torch.randn(2, 8), torch.randn(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        group_size: int | None = None,
        gate_first: bool = False,
        activation: Any = "silu",
        casting: Any = "float32",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps = eps
        self.group_size = group_size
        self.gate_first = gate_first
        self.activation = activation
        self.casting = casting

    @one_node
    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Normalize x (..., hidden_size) by groups and multiply by the gate; x's dtype is kept."""
        return ops.gated_rms_norm(
            x,
            gate,
            self.weight,
            self.eps,
            group_size=self.group_size,
            gate_first=self.gate_first,
            activation=self.activation,
            casting=self.casting,
        )

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return (
            f"{self.weight.shape[0]}, eps={self.eps}, group_size={self.group_size}, "
            f"gate_first={self.gate_first}, activation={self.activation}, casting={self.casting}"
        )
