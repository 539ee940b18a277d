"""Bytes that the kernels move by design, beside the least possible: counted, not measured.

tests/bench/test_traffic.py holds these counts against the loads and stores that the kernels really
do in Triton's interpreter.
"""

from __future__ import annotations

import torch

from fastattn.kernels.config import Target, cdiv, norm_backward_config, norm_forward_config

from .op import BACKWARD, FORWARD, Shape, Traffic

STATISTIC = 4
"""Bytes of a float32: saved statistics and partial sums."""

SEED = 8
"""Bytes of a dropout seed."""


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
