"""InfoNCE: every row belongs to one row of the other side, and to none of the others."""

from typing import Any

import torch

from ..ops.linear_cross_entropy import linear_cross_entropy


def info_nce(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor | float = 1.0,
    *,
    symmetric: bool = True,
    negatives: torch.Tensor | None = None,
    group: Any = None,
) -> torch.Tensor:
    """The cross entropy of finding y_i by x_i, and the mean of it and the reverse if symmetric.

    Similarities are scale x y^T; the matrix of all of them never exists.

    Args:
        x, y: (B, D), row by row what belongs together; normalised by the caller where cosines are
            meant.
        scale: a positive number, 1 over a temperature, or a tensor of one, which gets a gradient.
        symmetric: find x_i by y_i as well, as CLIP does.
        negatives: (N, D), further rows that belong to no x_i; the reverse does not see them.
        group: a process group: the y, and x for the reverse, of all its ranks are candidates, see
            `gather_rows`. Every rank has as many rows. Its rows' loss is a rank's own, and the
            gradients of all ranks' rows are those of the sum of all ranks' losses.

    Returns:
        A scalar in the dtype of x.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding"
        (2018); Radford et al., "Learning Transferable Visual Models" (2021).

    Example:
        >>> fastattn.losses.info_nce(torch.eye(4), torch.eye(4), scale=100.0).item() < 1e-6
        True
    """
    if x.dim() != 2 or x.shape != y.shape:
        raise ValueError(
            f"info_nce: x and y must be (B, D) alike, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    first = 0 if group is None else torch.distributed.get_rank(group) * x.shape[0]
    target = torch.arange(first, first + x.shape[0], device=x.device)
    candidates = y if group is None else gather_rows(y, group)
    if negatives is not None:
        candidates = torch.cat((candidates, negatives))
    loss = linear_cross_entropy(x * scale, candidates, target)
    if not symmetric:
        return loss
    reverse = linear_cross_entropy(y * scale, x if group is None else gather_rows(x, group), target)
    return 0.5 * (loss + reverse)


def gather_rows(x: torch.Tensor, group: Any = None) -> torch.Tensor:
    """The rows of all ranks, one rank's after the other, with their gradients.

    A rank's rows get the sum of what all ranks send them.

    Args:
        x: (B, ...), of one shape on every rank.
        group: the process group, None for the default one.
    """
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x.contiguous(), group or torch.distributed.group.WORLD))
