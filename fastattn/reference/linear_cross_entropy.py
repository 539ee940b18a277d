"""Linear cross entropy in plain PyTorch."""

import torch

from . import torch_functions as F
from .cross_entropy import cross_entropy


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_lse: bool = False,
    chunk_rows: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """cross_entropy of the logits of all rows at once, which chunk_rows does not change.

    Not even NaN in an ignored row gets anywhere: with 0 for a gradient it would make the weight's.
    """
    hidden = hidden_rows(x, target == ignore_index, return_lse)
    logits = F.linear(x.masked_fill(hidden[..., None], 0.0), weight, bias)
    outputs = cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        target,
        weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_scale=logit_scale,
        softcap=softcap,
        return_lse=return_lse,
    )
    if isinstance(outputs, tuple):
        loss, lse = outputs
        return loss.to(x.dtype), lse.masked_fill(hidden, float("nan"))
    return outputs.to(x.dtype)


def hidden_rows(x: torch.Tensor, ignored: torch.Tensor, with_lse: bool) -> torch.Tensor:
    """The rows of x that zeros stand for: those ignored, of which lse, if wanted, is not finite."""
    return ignored & ~x.detach().isfinite().all(-1) if with_lse else ignored
