"""Matrix products and linear layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.kernels.config import Target, cdiv
from fastattn.kernels.matmul.config import matmul_config
from fastattn.kernels.matmul.linear_backward import ROWS as BIAS_ROWS

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic, goal_either_way
from .common import STATISTIC

SIZES = [(4096, 4096, 4096), (8192, 8192, 8192), (8192, 4096, 14336), (8192, 14336, 4096)]
SMALL_SIZES = [(256, 256, 256), (16, 2048, 512)]


def torch_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, **_: Any
) -> torch.Tensor:
    return F.gelu(F.linear(x, weight, bias)) + residual


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


# Beside each op, which leaves plain products to cuBLAS, its kernels alone.
OPS = (
    Op(
        "matmul",
        fastattn.matmul,
        lambda m, k, n: {"a": (m, k), "b": (k, n)},
        shapes=[
            (4096, 4096, 4096),
            (16, 4096, 4096),
            (1, 4096, 14336),
            (300, 1000, 1000),
            (64, 65536, 64),
            (1023, 1023, 1023),
        ],
        quick_shapes=[(4096, 4096, 4096), (16, 4096, 4096)],
        small=(24, 40, 48),
        torch=lambda a, b: torch.matmul(a, b),
        benchmark=Benchmark(
            SIZES,
            SMALL_SIZES,
            matmul_traffic,
            {"kernel": lambda: fastattn.backend("triton")(fastattn.matmul)},
            flops=product_flops,
            goal=goal_either_way(0.9),
        ),
    ),
    Op(
        "matmul batch",
        fastattn.matmul,
        lambda batch, m, k, n: {"a": (batch, 8, m, k), "b": (batch, 1, k, n)},
        shapes=[(4, 1024, 128, 1024), (4, 1024, 1024, 128)],
        quick_shapes=[(4, 1024, 128, 1024)],
        small=(2, 24, 16, 40),
    ),
    Op(
        "linear",
        fastattn.linear,
        lambda rows, k, n: {
            "x": (rows, k),
            "weight": (n, k),
            "bias": (n,),
            "activation": "gelu",
            "residual": (rows, n),
        },
        shapes=[(4096, 4096, 4096), (16, 4096, 4096), (4096, 1000, 1000), (4096, 1023, 1023)],
        quick_shapes=[(4096, 4096, 4096)],
        small=(24, 40, 48),
        torch=torch_linear,
        benchmark=Benchmark(
            SIZES,
            SMALL_SIZES,
            linear_traffic,
            {"kernel": lambda: fastattn.backend("triton")(fastattn.linear)},
            flops=product_flops,
            goal=goal_either_way(0.9),
        ),
    ),
    Op(
        "linear relu",
        fastattn.linear,
        lambda rows, k, n: {"x": (rows, k), "weight": (n, k), "bias": (n,), "activation": "relu"},
        shapes=[(4096, 4096, 4096), (16, 4096, 4096)],
        quick_shapes=[(4096, 4096, 4096)],
        small=(24, 40, 48),
    ),
)
