"""Matrix products and linear layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastattn

from ..op import Benchmark, Op, goal_either_way
from ..traffic import linear_traffic, matmul_traffic, product_flops

SIZES = [(4096, 4096, 4096), (8192, 8192, 8192), (8192, 4096, 14336), (8192, 14336, 4096)]
SMALL_SIZES = [(256, 256, 256), (16, 2048, 512)]


def torch_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, **_: Any
) -> torch.Tensor:
    return F.gelu(F.linear(x, weight, bias)) + residual


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
