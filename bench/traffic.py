"""Bytes that the kernels move by design, beside the least possible: counted, not measured.

tests/bench/test_traffic.py holds these counts against the loads and stores that the kernels really
do in Triton's interpreter.
"""

from __future__ import annotations

import torch

from fastattn.kernels.config import (
    Target,
    cdiv,
    cross_entropy_forward_config,
    norm_backward_config,
    norm_forward_config,
    rotary_config,
    softmax_backward_config,
    softmax_forward_config,
)

from .op import BACKWARD, FORWARD, Shape, Traffic

STATISTIC = 4
"""Bytes of a float32: saved statistics and partial sums."""

SEED = 8
"""Bytes of a dropout seed."""

TARGET = 8
"""Bytes of a class index."""


def norm_traffic(
    shape: Shape,
    dtype: torch.dtype,
    target: Target,
    *,
    centered: bool = False,
    bias: bool = False,
    residual: bool = False,
    dropout: bool = False,
) -> dict[str, Traffic]:
    """LayerNorm (centered) or RMSNorm with a weight, all gradients wanted."""
    rows, cols = shape
    matrix = rows * cols * dtype.itemsize
    row = cols * dtype.itemsize
    statistics = rows * STATISTIC * (1 + centered)
    seed = SEED * dropout

    # x and y; the residual and the new residual
    least = matrix * (2 + 2 * residual) + row * (1 + bias) + seed
    second_read = 0 if norm_forward_config(cols, target).whole_row else matrix
    forward = Traffic(least, least + statistics + second_read)

    # dy, h and dx; the new residual's gradient; the residual's own where it is not dx
    matrices = 3 + residual + (residual and dropout)
    least = matrix * matrices + row * (2 + bias) + seed
    config = norm_backward_config(cols, target)
    row_tiles = cdiv(rows, config.block_m if config.whole_row else config.weight_block_m)
    programs = min(row_tiles, config.most_programs)
    partial_sums = 2 * programs * cols * STATISTIC * (1 + bias)
    moved = least + statistics + partial_sums
    if not config.whole_row:
        # dy and h again for the output, and in the launch that sums the weight's gradient.
        moved += 4 * matrix + statistics
    return {FORWARD: forward, BACKWARD: Traffic(least, moved)}


def dropout_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """One tensor read and one written, in either direction."""
    rows, cols = shape
    least = 2 * rows * cols * dtype.itemsize + SEED
    return {FORWARD: Traffic(least, least), BACKWARD: Traffic(least, least)}


def gated_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """gate, up and y; backward gate, up, dy and the gradients of both."""
    rows, cols = shape
    matrix = rows * cols * dtype.itemsize
    return {
        FORWARD: Traffic(3 * matrix, 3 * matrix),
        BACKWARD: Traffic(5 * matrix, 5 * matrix),
    }


def cross_entropy_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """Logits and targets, and a mean; backward the gradient. Saved are lse and its error."""
    rows, cols = shape
    matrix = rows * cols * dtype.itemsize
    targets = rows * TARGET
    # The last row fills up the last tile. The logit of each target is read once more, and each
    # row's loss and weight are written beside what is saved.
    config = cross_entropy_forward_config(cols, target)
    read = cdiv(rows, config.block_m) * config.block_m * (cols + 1) * dtype.itemsize
    forward = Traffic(matrix + targets + dtype.itemsize, read + targets + rows * 4 * STATISTIC)
    # The gradient of each row's loss is read beside what was saved.
    least = 2 * matrix + targets
    return {FORWARD: forward, BACKWARD: Traffic(least, least + rows * 3 * STATISTIC)}


def softmax_traffic(
    shape: Shape, dtype: torch.dtype, target: Target, *, log: bool = False
) -> dict[str, Traffic]:
    """x and y; backward y, dy and dx. The sum of a wide row's log_softmax needs dy alone."""
    rows, cols = shape
    matrix = rows * cols * dtype.itemsize
    second_read = 0 if softmax_forward_config(cols, target).whole_row else matrix
    forward = Traffic(2 * matrix, 2 * matrix + second_read)
    second_read = 0 if softmax_backward_config(cols, target).whole_row else (2 - log) * matrix
    return {FORWARD: forward, BACKWARD: Traffic(3 * matrix, 3 * matrix + second_read)}


def rotary_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """q and k read and written, in either direction; float32 tables, once for several heads."""
    tokens, width = shape
    head_dim = rotary_head_dim(width)
    half = head_dim // 2
    matrices = 4 * tokens * width * dtype.itemsize
    tables = 2 * tokens * half * STATISTIC
    reads = 2 * cdiv(width // head_dim, rotary_config(half, target).heads)
    if tokens * half <= max(shape):
        # So small that programs find it in the cache.
        reads = 1
    traffic = Traffic(matrices + tables, matrices + tables * reads)
    return {FORWARD: traffic, BACKWARD: traffic}


def rotary_head_dim(width: int) -> int:
    """The head dim that a rotary entry splits its width into."""
    return next(head_dim for head_dim in (128, 96, 80, 72, 50, 16, 2) if width % head_dim == 0)
