"""Attention in plain PyTorch: any scores and masks, a sequence a batch element or packed ones.

Terms are objects with `score(score, m, n, queries, keys)` or `keep(m, n, queries, keys)`: m (M, 1)
and n (N,) are the indices of queries and keys; queries and keys are their numbers, (B, 1, 1, 1)
where sequences differ; results broadcast to (B, H, M, N).
"""

from collections.abc import Sequence
from typing import Any

import torch

from . import torch_functions as F
from .dropout import dropout_mask


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scores: Sequence[Any] = (),
    masks: Sequence[Any] = (),
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    lengths: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Any:
    """softmax(terms(scale q k^T)) v, 0 for queries without keys, and their logsumexp.

    `lengths` (B,) and (B,) say how many queries and keys of a batch element there are.
    """
    keep = _find_kept(q, k, masks, lengths)
    # What no query sees may be anything, also NaN.
    seen = keep.any(2)[..., None]
    group = q.shape[1] // k.shape[1]
    k, v = (torch.where(seen, x.repeat_interleave(group, 1), 0) for x in (k, v))
    # PyTorch's fused one has no second derivative.
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    plain = not scores and sinks is None and dropout_p == 0.0
    if plain and not (return_lse or recorded) and keep.shape[-1] > 0:
        return F.scaled_dot_product_attention(q, k, v, keep, scale=scale)

    score = _scores(q, k, scores, keep, scale, lengths)
    if sinks is not None:
        sink = sinks.to(score.dtype)[:, None, None].expand(*score.shape[:3], 1)
        score = torch.cat((score, sink), -1)
    some = (score != float("-inf")).any(-1, keepdim=True)
    score = score.masked_fill(~some, 0.0)
    weights = torch.where(some, score.softmax(-1), 0)[..., : k.shape[2]]
    if dropout_p > 0.0 and dropout_seed is not None:
        factor = 1.0 / (1.0 - int(dropout_p * 2**31) / 2**31)
        kept = dropout_mask(dropout_seed, weights.shape, dropout_p)
        weights = torch.where(kept, weights * factor, 0.0)
    o = weights.to(v.dtype) @ v
    if not return_lse:
        return o
    lse = torch.where(some, score.logsumexp(-1, keepdim=True), float("-inf")).squeeze(-1)
    return o, lse.expand(q.shape[:3])


def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    scores: Sequence[Any] = (),
    masks: Sequence[Any] = (),
    scale: float | None = None,
) -> torch.Tensor:
    """exp(terms(scale q k^T) - lse): (B, H, M, N)."""
    keep = _find_kept(q, k, masks, None)
    k = torch.where(keep.any(2)[..., None], k.repeat_interleave(q.shape[1] // k.shape[1], 1), 0)
    score = _scores(q, k, scores, keep, scale, None)
    some = (lse != float("-inf"))[..., None]
    weights = (score - torch.where(some, lse[..., None], 0.0)).exp()
    return torch.where(keep & some, weights, 0.0).to(q.dtype)


def _find_kept(
    q: torch.Tensor,
    k: torch.Tensor,
    masks: Sequence[Any],
    lengths: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Which scores count, by all masks together; broadcasts to (B, H, M, N)."""
    m, n, queries, keys = _indices(q, k, lengths)
    keep = torch.ones((1, 1, q.shape[2], k.shape[2]), dtype=torch.bool, device=q.device)
    if lengths is not None:
        keep = keep & (m < queries) & (n < keys)
    for mask in masks:
        keep = keep & mask.keep(m, n, queries, keys)
    return keep


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    terms: Sequence[Any],
    keep: torch.Tensor,
    scale: float | None,
    lengths: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """The scores after all terms, -inf where they do not count; k has a head for each of q's."""
    indices = _indices(q, k, lengths)
    computed = torch.promote_types(q.dtype, torch.float32)
    score = (q.to(computed) @ k.to(computed).mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    for term in terms:
        score = term.score(score, *indices)
    return torch.where(keep, score, float("-inf"))


def _indices(
    q: torch.Tensor, k: torch.Tensor, lengths: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[Any, Any, Any, Any]:
    """m, n, and the numbers of queries and keys, as terms take them."""
    m = torch.arange(q.shape[2], device=q.device)[:, None]
    n = torch.arange(k.shape[2], device=q.device)
    if lengths is None:
        return m, n, q.shape[2], k.shape[2]
    queries, keys = (length[:, None, None, None] for length in lengths)
    return m, n, queries, keys


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """`attention` of sequences packed in q (T, H, Dk), k and v, each with its own keys alone."""

    def unpack(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 0:
            # There must be a row to take, though it does not count.
            x = torch.cat((x, x.new_zeros((1, *x.shape[1:]))))
        return x[places.clamp(max=x.shape[0] - 1)].transpose(1, 2)

    places_q, lengths_q = _places(cu_seqlens_q, max_seqlen_q)
    places_k, lengths_k = _places(cu_seqlens_k, max_seqlen_k)
    o, lse = attention(
        unpack(q, places_q),
        unpack(k, places_k),
        unpack(v, places_k),
        lengths=(lengths_q, lengths_k),
        return_lse=True,
        **options,
    )
    # What stands beyond the end of a sequence goes to one row more, which is then cut off.
    inside = torch.arange(max_seqlen_q, device=q.device) < lengths_q[:, None]
    places = torch.where(inside, places_q, q.shape[0]).flatten()

    def packed(x: torch.Tensor, missing: float) -> torch.Tensor:
        rows = x.flatten(0, 1)
        result = rows.new_full((q.shape[0] + 1, *rows.shape[1:]), missing)
        return result.index_put((places,), rows)[:-1]

    o = packed(o.transpose(1, 2), 0.0)
    return (o, packed(lse.transpose(1, 2), float("-inf")).T) if return_lse else o


def _places(cumulative: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of each sequence as (B, longest), and the lengths (B,)."""
    cumulative = cumulative.long()
    steps = torch.arange(longest, device=cumulative.device)
    return cumulative[:-1, None] + steps, cumulative.diff()
