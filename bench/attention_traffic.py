"""Bytes that attention's kernels move by design: every tile reads the keys that it sees again."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastattn.kernels.attention.config import (
    AttentionConfig,
    attention_forward_config,
    attention_keys_backward_config,
    attention_queries_backward_config,
)
from fastattn.kernels.config import Target, cdiv

from .op import BACKWARD, FORWARD, Shape, Traffic

STATISTIC = 4
"""Bytes of a query's lse or delta."""

WIDEST_WINDOW = 1024


def window_of(length: int) -> int:
    """The keys before its own that a query sees in a window: half of a short length."""
    return min(WIDEST_WINDOW, length // 2)


def attention_traffic(
    shape: Shape,
    dtype: torch.dtype,
    target: Target,
    *,
    causal: bool,
    windowed: bool = False,
    parts: int = 1,
    masked: bool = False,
) -> dict[str, Traffic]:
    """Attention of as many queries as keys; with `masked` under a mask that all heads share.

    `parts` is how many packed sequences the length has.
    """
    batch, heads, key_heads, length, key_dim, value_dim = shape
    sequences, own = batch * parts, length // parts
    window = window_of(length) if windowed else None
    size = dtype.itemsize
    queries = sequences * own * heads
    q, o = queries * key_dim * size, queries * value_dim * size
    k, v = (sequences * own * key_heads * dim * size for dim in (key_dim, value_dim))
    statistics = queries * STATISTIC
    mask = length * length * masked
    lengths = 2 * 4 * (sequences + 1) * (parts > 1)
    term_class = "tensor" if masked else "index" if windowed else "plain"
    features = (key_dim, value_dim, dtype, "ieee", term_class)

    def keys_read(config: AttentionConfig) -> int:
        """The bytes of keys and values that all tiles of queries read."""
        seen = sum(end - first for first, end in _keys_seen(config, own, causal, window))
        return sequences * heads * seen * (key_dim + value_dim) * size

    forward = q + o + statistics + keys_read(attention_forward_config(*features, target))
    by_queries = attention_queries_backward_config(*features, target)
    by_keys = attention_keys_backward_config(*features, target)
    delta = 2 * o + statistics
    dq = 2 * q + o + 2 * statistics + keys_read(by_queries)
    seen = sum(end - first for first, end in _queries_seen(by_keys, own, causal, window))
    dkv = 2 * (k + v) + sequences * heads * seen * ((key_dim + value_dim) * size + 2 * STATISTIC)
    read_masks = masked * sequences * heads * own * own
    least = q + k + v + o + mask + lengths
    return {
        FORWARD: Traffic(least, forward + read_masks + lengths),
        BACKWARD: Traffic(
            2 * (q + k + v) + o + mask, delta + dq + dkv + 2 * read_masks + 2 * lengths
        ),
    }


def _keys_seen(
    config: AttentionConfig, length: int, causal: bool, window: int | None
) -> Iterator[tuple[int, int]]:
    """The keys that each tile of queries reads."""
    for first in range(0, length, config.block_m):
        last = min(first + config.block_m, length) - 1
        begin = 0 if window is None else max(0, first - window)
        yield begin, last + 1 if causal else length


def _queries_seen(
    config: AttentionConfig, length: int, causal: bool, window: int | None
) -> Iterator[tuple[int, int]]:
    """The queries that each tile of keys reads, from the first of a block on."""
    for first in range(0, length, config.block_n):
        last = min(first + config.block_n, length) - 1
        begin = first // config.block_m * config.block_m if causal else 0
        end = length
        if window is not None:
            blocks = cdiv(last + window + 1 - begin, config.block_m)
            end = min(length, begin + blocks * config.block_m)
        yield begin, end
