"""The losses of heads: of every token, without holding all logits, and of whole sequences."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import ops
from ..nn.mlp import is_only_linear

IGNORED = -100
"""The label of a token that has none."""


def token_loss(
    features: torch.Tensor,
    head: nn.Linear,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The mean cross entropy of head(features), without holding all logits.

    It is a float32 scalar, or a float64 one for features in float64.

    Args:
        features: (B, S, C), what the head is applied to.
        head: the linear layer to (B, S, V); one that another module has taken the place of, or that
            has hooks, is called, and then all logits exist.
        labels: (B, S) integers, `IGNORED` where there is none.
        bias: (V,), added to the logits beside the head's own; None for no more than that.
        softcap: the logits are softcap * tanh(logits / softcap).
        items: what the sum is divided by, where it is not the number of labels here: those of all
            batches whose gradients are added up before a step.
    """
    if items is not None:
        total = _reduced_loss(features, head, labels, bias, softcap, "sum")
        return total / (items.to(total.device) if isinstance(items, torch.Tensor) else items)
    return _reduced_loss(features, head, labels, bias, softcap, "mean")


def _reduced_loss(
    features: torch.Tensor,
    head: nn.Linear,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    reduction: str,
) -> torch.Tensor:
    labels = labels.long()
    options: dict[str, Any] = {
        "ignore_index": IGNORED,
        "softcap": softcap,
        "reduction": reduction,
    }
    if not is_only_linear(head):
        logits = head(features)
        logits = logits if bias is None else logits + bias
        return ops.cross_entropy(_wide(logits), labels, **options)
    if bias is None or head.bias is None:
        bias = head.bias if bias is None else bias
    else:
        bias = head.bias + bias
    if features.dtype not in (torch.float16, torch.bfloat16):
        return ops.linear_cross_entropy(features, head.weight, labels, bias, **options)
    if features.is_meta:
        # Autocast knows no such device.
        return ops.linear_cross_entropy(features, head.weight, labels, bias, **options).float()
    # The loss has the dtype of what is given, and autocast that of the products.
    with torch.autocast(features.device.type, dtype=features.dtype):
        return ops.linear_cross_entropy(features.float(), head.weight, labels, bias, **options)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def next_token_labels(labels: torch.Tensor) -> torch.Tensor:
    """(B, S) labels moved to the token before each, which predicts it; the last one has none."""
    # Padded first, so that labels of no tokens are none either.
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def sequence_loss(config: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of (B, num_labels) logits, of the kind that transformers would choose.

    `config.problem_type` says which; if it is None, one label is a regression (mean squared error),
    integers are classes (cross entropy), and other numbers the probabilities of several labels that
    may hold at once (binary cross entropy).
    """
    problem = config.problem_type
    if problem is None:
        classes = "multi" if labels.is_floating_point() else "single"
        problem = "regression" if config.num_labels == 1 else f"{classes}_label_classification"
    logits = _wide(logits)
    if problem == "regression":
        return F.mse_loss(logits, labels.to(logits).view_as(logits))
    if problem == "single_label_classification":
        return ops.cross_entropy(logits, labels.view(-1).long())
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits))
