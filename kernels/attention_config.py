"""Block sizes of attention: for each kernel the largest tiles that its target holds.

A rule walks a list of candidates, best first, and takes the first whose tiles fit into shared
memory. The lists hold what compiles without spills (`python -m bench.compiled` shows it).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from .config import Target

NARROWEST_HEAD = 16
"""Columns that a product needs at least."""


@dataclass(frozen=True)
class AttentionConfig:
    """How one of attention's kernels is cut."""

    block_m: int
    """Queries of a tile."""
    block_n: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int


@functools.cache
def head_chunks(dim: int) -> tuple[int, int]:
    """The widths of the one or two chunks, powers of two, that hold a head of `dim` columns.

    80 columns are held as 64 and 16. Where a second chunk would save nothing over one that is
    padded, as with 112, it is 0.
    """
    padded = max(NARROWEST_HEAD, triton.next_power_of_2(dim))
    width = padded // 2
    tail = max(NARROWEST_HEAD, triton.next_power_of_2(dim - width))
    return (width, tail) if width >= NARROWEST_HEAD and width + tail < padded else (padded, 0)


Candidates = Sequence[tuple[int, int, int, int]]

# (block_m, block_n, num_warps, num_stages) by the widest head they serve.
FORWARD: dict[int, Candidates] = {
    64: [(128, 64, 4, 3), (128, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 1)],
    128: [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1)],
    256: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)],
    512: [(64, 32, 8, 2), (64, 16, 8, 2), (32, 32, 4, 1), (16, 16, 4, 1)],
    1024: [(64, 16, 8, 1), (32, 16, 8, 1), (16, 16, 4, 1)],
}

KEYS_BACKWARD: dict[int, Candidates] = {
    64: [(64, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 1)],
    128: [(32, 128, 8, 2), (32, 64, 4, 2), (32, 64, 4, 1), (16, 64, 4, 1)],
    256: [(32, 64, 8, 1), (16, 64, 8, 1), (16, 32, 4, 1)],
    512: [(16, 32, 8, 1), (16, 16, 4, 1)],
    1024: [(16, 16, 8, 1)],
}

QUERIES_BACKWARD: dict[int, Candidates] = {
    64: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 1)],
    128: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 4, 1), (32, 32, 4, 1)],
    256: [(128, 32, 8, 1), (64, 32, 8, 1), (32, 32, 4, 1), (32, 16, 4, 1)],
    512: [(32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)],
    1024: [(16, 16, 8, 1)],
}

# Small, so that short sequences have several blocks there, and unequal, so that none passes for
# another.
INTERPRETED_FORWARD = AttentionConfig(64, 32, 4, 1)
INTERPRETED_KEYS_BACKWARD = AttentionConfig(32, 64, 4, 1)
INTERPRETED_QUERIES_BACKWARD = AttentionConfig(64, 32, 4, 1)


@functools.cache
def attention_forward_config(
    key_dim: int, value_dim: int, dtype: torch.dtype, target: Target
) -> AttentionConfig:
    """The configuration of the forward: q stays, and num_stages tiles of k and v are under way."""
    if target.backend == "interpreter":
        return INTERPRETED_FORWARD

    def elements(block_m: int, block_n: int, stages: int) -> int:
        return block_m * key_dim + stages * block_n * (key_dim + value_dim)

    return _largest(FORWARD, key_dim, value_dim, dtype, target, elements)


@functools.cache
def attention_keys_backward_config(
    key_dim: int, value_dim: int, dtype: torch.dtype, target: Target
) -> AttentionConfig:
    """The configuration of the gradients of k and v: these stay, and q and do pass."""
    if target.backend == "interpreter":
        return INTERPRETED_KEYS_BACKWARD

    def elements(block_m: int, block_n: int, stages: int) -> int:
        passing = block_m * (key_dim + value_dim)
        return block_n * (key_dim + value_dim) + stages * passing + 2 * block_m * block_n

    return _largest(KEYS_BACKWARD, key_dim, value_dim, dtype, target, elements)


@functools.cache
def attention_queries_backward_config(
    key_dim: int, value_dim: int, dtype: torch.dtype, target: Target
) -> AttentionConfig:
    """The configuration of the gradient of q: q and do stay, and k and v pass."""
    if target.backend == "interpreter":
        return INTERPRETED_QUERIES_BACKWARD

    def elements(block_m: int, block_n: int, stages: int) -> int:
        passing = block_n * (key_dim + value_dim)
        return block_m * (key_dim + value_dim) + stages * passing + block_m * block_n

    return _largest(QUERIES_BACKWARD, key_dim, value_dim, dtype, target, elements)


def _largest(candidates, key_dim, value_dim, dtype, target, elements) -> AttentionConfig:
    """The first candidate whose tiles fit."""
    widest = max(key_dim, value_dim)
    for limit, configs in candidates.items():
        if widest > limit:
            continue
        for block_m, block_n, num_warps, num_stages in configs:
            if elements(block_m, block_n, num_stages) * dtype.itemsize <= target.shared_memory:
                return AttentionConfig(block_m, block_n, num_warps, num_stages)
    raise ValueError(f"attention: no tile of heads of {widest} columns fits into {target}")
