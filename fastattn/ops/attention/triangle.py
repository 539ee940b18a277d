"""Attention of pairs along one of their two dimensions, as structure prediction has it."""

import torch

from .attention import attention


def triangle_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Triangle attention: rows of pairs attend to themselves, with a bias that all rows share.

    The bias is never copied, and its gradient is summed over the rows in its kernel.

    Args:
        q: (B, N, H, Q, D), or without B: rows of pairs, by any strides with a unit last one.
        k: (B, N, H, K, D).
        v: (B, N, H, K, Dv).
        bias: broadcasts to (B, N, H, Q, K), as (B, 1, H, Q, K) does; of any float dtype.
        mask: booleans, True where a query sees a key, that broadcast to (B, N, H, Q, K), as
            (B, N, 1, 1, K) does. None if all count. A query without keys gets 0.
        scale: D^-0.5 if None.

    Returns:
        (B, N, H, Q, Dv) in the dtype of q, any number of times differentiable in q, k, v and bias.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape or device does not fit.

    Source: Jumper et al., "Highly accurate protein structure prediction with AlphaFold" (2021).

    Example:
        >>> import fastattn, torch
        >>> q = k = v = torch.randn(1, 6, 4, 6, 32)
        >>> bias = torch.randn(1, 1, 4, 6, 6)
        >>> fastattn.triangle_attention(q, k, v, bias).shape
        torch.Size([1, 6, 4, 6, 32])
    """
    if isinstance(q, torch.Tensor) and q.dim() not in (4, 5):
        raise ValueError(
            f"triangle_attention: q must be (B, N, H, Q, D) or (N, H, Q, D), got {tuple(q.shape)}"
        )
    return attention(q, k, v, bias=bias, mask=mask, scale=scale)
