"""Attention over caches of keys and values, in plain PyTorch."""

from collections.abc import Sequence
from typing import Any

import torch

from .attention import attention


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    lengths: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    value_dim: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    masks: Sequence[Any] = (),
    **options: Any,
) -> Any:
    """`attention` of queries at the end of the first `lengths` keys of each sequence.

    Rounded to q's dtype, whatever keys and values of 8 bits, or their scales, are computed in.
    """
    k = read_cache(k, block_table, k_scale, q.dtype)
    values = k[..., :value_dim] if v is None else read_cache(v, block_table, v_scale, q.dtype)
    lengths = lengths.clamp(0, k.shape[2]).long()
    queries = torch.full_like(lengths, q.shape[2])
    wide = torch.promote_types(k.dtype, values.dtype)
    found = attention(
        q.to(wide),
        k.to(wide),
        values.to(wide),
        masks=masks,
        lengths=(queries, lengths),
        **options,
    )
    if isinstance(found, tuple):
        return found[0].to(q.dtype), found[1]
    return found.to(q.dtype)


def read_cache(
    cache: torch.Tensor,
    block_table: torch.Tensor | None,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What a cache holds, (B, Hkv, N, D): the pages of each sequence one after another."""
    if block_table is not None:
        # Entries beyond a sequence's keys may be anything. (B, pages, Hkv, page, D)
        pages = block_table.long().clamp(0, len(cache) - 1)
        cache = cache[pages].transpose(1, 2).flatten(2, 3)
    if not cache.is_floating_point() or cache.itemsize == 1:
        cache = cache.to(torch.promote_types(dtype, torch.float32))
    if scale is not None:
        cache = cache * scale[:, None, None]
    return cache
