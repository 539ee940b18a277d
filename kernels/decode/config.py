"""How decode attention is cut: its tiles, and in how many parts the keys of a sequence are."""

import functools

import torch
import triton

from ..attention.config import AttentionConfig, find_kind
from ..config import Target, cdiv

ROWS = (16, 32, 64)
"""Rows that a tile may have: a row is a query of one of the heads that share a key head."""

INVARIANT_KEYS = 1024
"""Keys of a part where results shall not depend on the batch: then its number hangs on nothing."""

MOST_PARTS = 128

BUSY = 0.8
"""The share of the multiprocessors from which on parts would cost more than they bring."""

FEW_BLOCKS = 4
"""Blocks of keys that are not worth being parted."""


def _rule(
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    precision: str,
    term_class: str,
    target: Target,
    rows: int,
) -> AttentionConfig:
    if target.backend == "interpreter":
        return AttentionConfig(16, 16, 4, 1)
    width = triton.next_power_of_2(max(key_dim, value_dim))
    rows = min(rows, 64 if width <= 128 else 32 if width <= 256 else 16)
    block_n = 64 if width <= 128 else 32
    if find_kind(target) == "gfx11" and width > 64:
        # Each operand is there twice as an operand of the matrix units.
        block_n = 16
    # Wide heads hold so much that eight warps share it.
    num_warps = 8 if width > 512 or (dtype.itemsize > 2 and width > 256) else 4
    row_bytes = (key_dim + value_dim) * dtype.itemsize
    for num_stages in (3, 2, 1):
        if num_stages * block_n * row_bytes + rows * key_dim * dtype.itemsize <= _room(target):
            return AttentionConfig(rows, block_n, num_warps, num_stages)
    return AttentionConfig(rows, 16, num_warps, 1)


def _room(target: Target) -> int:
    """Of shared memory, what leaves two programs a multiprocessor room beside each other."""
    return target.shared_memory * 3 // 4


decode_rules = {rows: functools.partial(_rule, rows=rows) for rows in ROWS}
"""The rule of the configuration, for tiles of at most so many rows."""


def choose_rows(rows: int, batch_invariant: bool) -> int:
    """How many rows a tile has, of those that share a key head."""
    if batch_invariant:
        return ROWS[0]
    return next((height for height in ROWS if height >= rows), ROWS[-1])


@functools.lru_cache
def part_keys(programs: int, keys: int, block_n: int, target: Target) -> int:
    """In how many parts the keys of each sequence go, so that all multiprocessors have work.

    The fewest parts with which the last round of programs is nearly as full as with any number.

    Args:
        programs: how many there are if keys are not parted.
        keys: how many a sequence has room for.
        block_n: keys of a block.
        target: the device.
    """
    blocks = cdiv(keys, block_n)
    if target.backend == "interpreter":
        return min(3, max(blocks, 1))
    if programs >= BUSY * target.multiprocessors or blocks <= FEW_BLOCKS:
        return 1
    fullness = []
    for parts in range(1, min(MOST_PARTS, blocks) + 1):
        rounds = programs * parts / target.multiprocessors
        fullness.append(rounds / cdiv(programs * parts, target.multiprocessors))
    most = max(fullness)
    return next(place + 1 for place, full in enumerate(fullness) if full >= 0.85 * most)
