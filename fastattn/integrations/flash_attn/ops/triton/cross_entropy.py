"""Cross entropy of each row: flash_attn.ops.triton.cross_entropy."""

from typing import Any

import torch

from .....ops import cross_entropy
from ...arguments import refuse


def cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    precomputed_lse: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each row of logits, and the part of it that is its z-loss.

    Logits of 16 bits are copied in float32, for flash-attn's losses are not rounded;
    `fastattn.cross_entropy` reads them in place.

    Args:
        logits: (N, V), float16, bfloat16, float32 or float64.
        labels: (N,) int64. One that is no class is an error on a CPU and NaN on a GPU, where
            flash-attn has 0.
        precomputed_lse: is computed again all the same.
        label_smoothing: in [0, 1], spread over all classes.
        logit_scale: the logits are multiplied by it first; positive.
        lse_square_scale: the factor of lse^2 in every row's loss.
        ignore_index: the label of rows whose losses are 0.
        inplace_backward: write the gradient over the logits: see `fastattn.cross_entropy`. Where
            they are copied, over the copy.
        process_group: must be None: classes over several processes are not supported.

    Returns:
        (losses, z_losses), (N,) and (N,) in float32 (float64 for float64); z_losses have no
        gradient, being a part of losses.

    Raises:
        TypeError, ValueError: an argument does not fit, as in `fastattn.cross_entropy`.
        NotImplementedError: there is a process_group.

    Source: flash_attn/ops/triton/cross_entropy.py of flash-attn 2.8.

    Example:
        >>> losses, z_losses = cross_entropy_loss(torch.zeros(2, 4), torch.tensor([1, -100]))
        >>> losses.tolist(), z_losses.tolist()
        ([1.3862943649291992, 0.0], [0.0, 0.0])
    """
    refuse("cross_entropy_loss", process_group=process_group)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses, lse = cross_entropy(
        logits,
        labels,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
        z_loss=lse_square_scale,
        logit_scale=logit_scale,
        return_lse=True,
        inplace_backward=inplace_backward,
    )
    z_losses = lse_square_scale * lse.detach().square()
    return losses, z_losses.masked_fill(labels == ignore_index, 0.0)
