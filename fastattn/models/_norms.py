"""RMSNorm as families round it, fused with the addition before it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn as nn

from .. import ops

Casting = Literal["float32", "llama", "gemma", "t5"]


class FamilyRMSNorm(nn.Module):
    """RMSNorm with one parameter, `weight`, and the rounding of a family.

    Args:
        columns: the columns of x.
        eps: added to the mean of squares.
        weight_offset: added to the weight; 1.0 in Gemma, whose weight starts at 0.
        casting: as in `fastattn.rms_norm`.

    The weight starts where it has no effect. `fastattn.nn.add_norm` fuses it with an addition.
    """

    def __init__(
        self,
        columns: int,
        eps: float,
        *,
        weight_offset: float = 0.0,
        casting: Casting = "llama",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight_offset = weight_offset
        self.casting: Casting = casting
        self.weight = nn.Parameter(torch.empty(columns))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to what, with the offset, is 1."""
        nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., columns), in x's dtype."""
        return ops.rms_norm(
            x,
            self.weight,
            self.eps,
            weight_offset=self.weight_offset,
            casting=self.casting,
        )

    def add_norm(
        self, branch: torch.Tensor, residual: torch.Tensor, dropout_p: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(stream), stream), the stream being dropout(branch) + residual, in one kernel."""
        return ops.add_rms_norm(
            branch,
            residual,
            self.weight,
            self.eps,
            weight_offset=self.weight_offset,
            casting=self.casting,
            dropout_p=dropout_p,
        )

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return f"{self.weight.shape[0]}, eps={self.eps}{offset}, casting={self.casting!r}"
