"""torch's losses of class indices or probabilities, on fastattn's ops."""

from typing import Any

import torch

from .. import ops
from ..kernels import private
from ..ops.core.tensor_kinds import is_foreign, is_plain
from ..reference import torch_functions as F
from .choice import is_for_torch


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy`: see `fastattn.cross_entropy`.

    As in torch, the classes are dimension 1 of an input with more than one dimension; the kernels
    have them last, so an input with more than two is copied unless they lie innermost in memory.
    NaN and infinity where the target is `ignore_index` reach nothing, unlike in torch.

    Example:
        >>> loss = fastattn.functional.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> torch.testing.assert_close(loss, torch.tensor(4.0).log())
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn.CrossEntropyLoss(None, size_average, -100, reduce).reduction
    # In 16 bits torch's own rounds between its steps.
    if is_for_torch(input, weight) and (input.element_size() > 2 or is_foreign(input)):
        if not is_foreign(input):
            input = _clear_ignored(input, target, ignore_index)
        return F.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    classes = 1 if input.dim() > 1 else 0
    return ops.cross_entropy(
        input.movedim(classes, -1),
        target.movedim(classes, -1) if target.is_floating_point() else target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _clear_ignored(input: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Logits (N, C, ...) or (C,) without what torch would make NaN of in the backward."""
    if not (input.requires_grad and torch.is_grad_enabled()) or target.is_floating_point():
        return input
    places = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if target.shape != places:  # torch says what is wrong with it.
        return input
    ignored = target == ignore_index
    # Most often nothing is wrong, and a copy can be spared where looking makes nobody wait.
    seen = input.is_cpu and is_plain((input, target)) and not private.are_transforms_active()
    classes = 1 if input.dim() > 1 else 0
    if seen and not ignored.any():
        return input
    if seen and input.detach().movedim(classes, -1)[ignored].sum().isfinite():
        return input
    return input.masked_fill(ignored.unsqueeze(classes), 0.0)


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.linear_cross_entropy`: see `fastattn.linear_cross_entropy`.

    The logits are held a chunk at a time whether there are `options` or not; of these, which steer
    torch's own chunks, batch_chunk_size is the most rows of a chunk. Class probabilities and
    weights with more than two dimensions need all logits at once. `z_loss`, `logit_scale` and
    `softcap` are ours.

    Example:
        >>> x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(100, 8)
        >>> target = torch.randint(100, (6,))
        >>> fastattn.functional.linear_cross_entropy(x, weight, target).backward()
    """
    settings: dict[str, Any] = {
        "ignore_index": -100 if ignore_index is None else ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "logit_scale": logit_scale,
        "softcap": softcap,
    }
    in_chunks = linear_weight.dim() == 2 and not target.is_floating_point()
    if in_chunks and not is_foreign(linear_weight):
        chunk_rows = None if options is None else options.batch_chunk_size
        return ops.linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias,
            class_weight=weight,
            chunk_rows=chunk_rows,
            **settings,
        )
    bias = None if linear_bias is None else linear_bias.flatten()
    if not target.is_floating_point():
        hidden = (target == settings["ignore_index"])[..., None].flatten(input.dim() - 1).all(-1)
        input = input.masked_fill(hidden[..., None], 0.0)
    logits = F.linear(input, linear_weight.flatten(0, -2), bias)
    classes = input.dim() - 1
    logits = logits.unflatten(-1, linear_weight.shape[:-1]).movedim(classes, -1)
    if target.is_floating_point():
        target = target.movedim(classes, -1)
    return ops.cross_entropy(logits, target, weight=weight, **settings)
