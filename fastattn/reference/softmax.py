"""softmax and log_softmax in plain PyTorch."""

import torch


def softmax(
    x: torch.Tensor,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """torch.softmax of scale * x over the kept columns; 0 in rows that keep none."""
    if dtype is None:
        dtype = x.dtype
    if scale == 1.0 and not causal and mask is None:
        return torch.softmax(x, -1, dtype=dtype)
    scores = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    if causal:
        queries, cols = x.shape[-2:]
        kept = x.new_ones((queries, cols), dtype=torch.bool).tril(cols - queries)
        scores = scores.masked_fill(~kept, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if causal or mask is not None:
        empty = (scores == float("-inf")).all(-1, keepdim=True)
        # Replaced before as well as after, so that no NaN arises whose gradient would be one.
        y = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    else:
        y = torch.softmax(scores, -1)
    return y.to(dtype)


def log_softmax(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """torch.log_softmax over the last dimension."""
    return torch.log_softmax(x, -1, dtype=x.dtype if dtype is None else dtype)
