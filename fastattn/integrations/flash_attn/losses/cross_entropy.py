"""The module of cross entropy: flash_attn.losses.cross_entropy."""

from typing import Any

import torch
from torch import nn

from ....ops.core.arguments import check_choice
from ..arguments import refuse
from ..ops.triton.cross_entropy import cross_entropy_loss


class CrossEntropyLoss(nn.Module):
    """Cross entropy with flash-attn's arguments; the loss is in float32 for logits of 16 bits.

    Args:
        ignore_index: the label of rows that do not count.
        reduction: "mean" over the rows that count, "sum" or "none".
        label_smoothing, logit_scale, lse_square_scale, inplace_backward, process_group: as in
            `cross_entropy_loss`.
        return_z_loss: return the z-loss beside the loss that it is a part of.

    Raises:
        ValueError: another reduction.
        NotImplementedError: there is a process_group.

    Source: flash_attn/losses/cross_entropy.py of flash-attn 2.8.

    Example:
        >>> CrossEntropyLoss()(torch.zeros(2, 4), torch.tensor([1, -100])).item()
        1.3862943649291992
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        check_choice("CrossEntropyLoss", "reduction", reduction, ("mean", "sum", "none"))
        refuse("CrossEntropyLoss", process_group=process_group)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(
        self,
        input: torch.Tensor,
        target: torch.Tensor,
        precomputed_lse: torch.Tensor | None = None,
    ) -> Any:
        """The loss of logits (N, V) and labels (N,), or (loss, z_loss) with return_z_loss."""
        losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
        )
        loss, z_loss = (self._reduce(x, target) for x in losses)
        return (loss, z_loss) if self.return_z_loss else loss

    def _reduce(self, losses: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total / (target != self.ignore_index).sum() if self.reduction == "mean" else total
