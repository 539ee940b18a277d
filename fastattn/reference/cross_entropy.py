"""Cross entropy in plain PyTorch."""

from collections.abc import Callable
from functools import partial

import torch

from . import torch_functions as F
from .softcap import softcapped


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """torch's cross entropy of scaled and capped logits, with z_loss * lse^2 in every row's loss.

    Where the logits of an ignored row are not finite torch's gives them NaN for a gradient, so such
    rows are blanked.
    """
    computed = torch.promote_types(logits.dtype, torch.float32)
    x = logits.to(computed)
    if weight is not None:
        weight = weight.to(computed)
    classes = x.shape[-1]
    of_indices = not target.is_floating_point()
    ignored = x.new_zeros((), dtype=torch.bool)
    lse = None
    scale_and_cap = partial(_scale_and_cap, logit_scale=logit_scale, softcap=softcap)
    if of_indices:
        ignored = target == ignore_index
        if return_lse:
            lse = _lse_of_all(x, scale_and_cap, ignored)
        x = x.masked_fill(ignored[..., None], 0.0)
    x = scale_and_cap(x)
    if lse is None and (return_lse or z_loss != 0.0):
        lse = torch.logsumexp(x, -1)
    losses = F.cross_entropy(
        x.reshape(-1, classes),
        target.reshape(-1) if of_indices else target.reshape(-1, classes).to(computed),
        weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    ).reshape(x.shape[:-1])

    row_weight = torch.ones_like(losses)
    if of_indices:
        if weight is not None:
            row_weight = weight[torch.where(ignored, 0, target)]
        row_weight = row_weight.masked_fill(ignored, 0.0)
    if lse is not None and z_loss != 0.0:
        losses = losses + row_weight * torch.where(ignored, 0.0, z_loss * lse.square())

    if reduction == "mean":
        losses = losses.sum() / row_weight.sum()
    elif reduction == "sum":
        losses = losses.sum()
    loss = losses.to(logits.dtype)
    return (loss, lse) if return_lse else loss  # type: ignore[return-value]


def _scale_and_cap(x: torch.Tensor, logit_scale: float, softcap: float | None) -> torch.Tensor:
    x = x if logit_scale == 1.0 else x * logit_scale
    return x if softcap is None else softcapped(x, softcap)


def _lse_of_all(
    x: torch.Tensor, scale_and_cap: Callable[[torch.Tensor], torch.Tensor], ignored: torch.Tensor
) -> torch.Tensor:
    """logsumexp of all rows; of ignored ones NaN, without a gradient, if it is not finite."""
    # NaN and infinity are the largest of their row.
    endless = ignored & ~scale_and_cap(x.detach()).amax(-1).isfinite()
    lse = scale_and_cap(x.masked_fill(endless[..., None], 0.0)).logsumexp(-1)
    return lse.masked_fill(endless, float("nan"))
