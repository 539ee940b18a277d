"""Merging attention over parts of the keys, in plain PyTorch."""

import torch


def merge_attention(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of outputs (S, ..., D) and logsumexps (S, ...) of S parts those of all keys together."""
    some = (lse != float("-inf")).any(0)
    # A part without keys counts for nothing, whatever its output is; a query without any has none.
    finite = torch.where(some, lse, 0.0)
    total = finite.logsumexp(0)
    weights = torch.where(some, (finite - total).exp(), 0.0)[..., None]
    parts = torch.where(weights > 0.0, o.to(lse.dtype), 0.0)
    merged = (weights * parts).sum(0).to(o.dtype)
    return merged, torch.where(some, total, float("-inf"))
