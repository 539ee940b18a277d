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
from fastattn.kernels.matmul.config import matmul_config
from fastattn.kernels.matmul.gated_linear_config import gated_linear_config
from fastattn.kernels.matmul.linear_backward import ROWS as BIAS_ROWS
from fastattn.ops.linear_cross_entropy_chunks import chunk_rows_for

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


def gated_linear_flops(shape: Shape) -> dict[str, float]:
    """Two products; backward the two that give dx, and those of the weights' gradients."""
    m, k, n = shape
    return {FORWARD: 4.0 * m * k * n, BACKWARD: 8.0 * m * k * n}


def gated_linear_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """x, both weights and y; backward dy, and x and the weights with their gradients."""
    m, k, n = shape
    x, weight, out = (size * dtype.itemsize for size in (m * k, k * n, m * n))

    def tiles_read(backward: bool) -> int:
        config = gated_linear_config(m, n, k, str(dtype)[6:], "ieee", backward, target)
        return cdiv(n, config.block_n) * x + cdiv(m, config.block_m) * 2 * weight

    # dy gives the gradients of gate and up, each of which goes into two products.
    before = tiles_read(backward=True) + 3 * out
    dx = product_reads(m, k, n, dtype, target, "kn") + x
    dweight = product_reads(n, k, m, dtype, target, "mn") + weight
    return {
        FORWARD: Traffic(x + 2 * weight + out, tiles_read(backward=False) + out),
        BACKWARD: Traffic(2 * (x + 2 * weight) + out, before + 2 * (dx + dweight)),
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


def linear_cross_entropy_traffic(
    shape: Shape, dtype: torch.dtype, target: Target
) -> dict[str, Traffic]:
    """The forward computes the gradients too, from chunks of logits; the backward scales them."""
    rows, columns, classes = shape
    x, weight, logits = (
        size * dtype.itemsize for size in (rows * columns, columns * classes, rows * classes)
    )
    sums = columns * classes * STATISTIC
    chunks = cdiv(rows, chunk_rows_for(classes, dtype.itemsize, "auto"))
    least = x + weight + rows * TARGET + dtype.itemsize
    # Every chunk writes its logits, reads them for the loss, reads them again and writes their
    # gradient, and reads that in two products, with the weight in two, and x in two. It writes dx,
    # and adds to the sums of dweight.
    moved = least + 6 * logits + (2 * chunks - 1) * weight + 2 * x + (2 * chunks - 1) * sums
    written = x + weight + dtype.itemsize
    return {FORWARD: Traffic(least, moved), BACKWARD: Traffic(written, written + x + sums)}


def linear_cross_entropy_flops(shape: Shape) -> dict[str, float]:
    """The product of the logits, and the two of their gradient, where the definition has them."""
    rows, columns, classes = shape
    product = 2.0 * rows * columns * classes
    return {FORWARD: product, BACKWARD: 2.0 * product}


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


def product_flops(shape: Shape) -> dict[str, float]:
    """A product (m, k) x (k, n), and backward the two that give its operands' gradients."""
    m, k, n = shape
    return {FORWARD: 2.0 * m * k * n, BACKWARD: 4.0 * m * k * n}


def product_reads(
    m: int, n: int, k: int, dtype: torch.dtype, target: Target, units: str, fused: bool = False
) -> int:
    """Bytes that the tiles of one product read of its operands, and of sums where it is split."""
    config = matmul_config(m, n, k, 1, str(dtype)[6:], "ieee", units, fused, target)
    rows, cols = cdiv(m, config.block_m), cdiv(n, config.block_n)
    sums = 2 * config.splits * m * n * STATISTIC if config.splits > 1 else 0
    return (cols * m * k + rows * k * n) * dtype.itemsize + sums


def matmul_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """a, b and their product; backward the product's gradient, a and b, and their gradients."""
    m, k, n = shape
    a, b, out = (size * dtype.itemsize for size in (m * k, k * n, m * n))
    moved = product_reads(m, n, k, dtype, target, "kn") + out
    da = product_reads(m, k, n, dtype, target, "nn") + a
    db = product_reads(k, n, m, dtype, target, "mn") + b
    return {
        FORWARD: Traffic(a + b + out, moved),
        BACKWARD: Traffic(2 * (a + b) + out, da + db),
    }


def linear_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """A linear layer with bias, activation and residual; the pre-activation is kept."""
    m, k, n = shape
    x, weight, out = (size * dtype.itemsize for size in (m * k, k * n, m * n))
    bias = n * dtype.itemsize
    forward = product_reads(m, n, k, dtype, target, "kk", fused=True) + bias + 3 * out
    # dy and the pre-activation give dpre, and the bias's gradient by partial rows.
    before = 3 * out + cdiv(m, BIAS_ROWS) * n * STATISTIC
    dx = product_reads(m, k, n, dtype, target, "kn") + x
    dweight = product_reads(n, k, m, dtype, target, "mn") + weight
    return {
        FORWARD: Traffic(x + weight + bias + 2 * out, forward),
        BACKWARD: Traffic(2 * (x + weight) + bias + out, before + dx + dweight),
    }
