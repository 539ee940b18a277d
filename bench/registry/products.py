"""Matrix products and linear layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

import fastattn

from ..op import Benchmark, Op, Shape
from ..traffic import linear_traffic, matmul_traffic, product_flops

SIZES = [(4096, 4096, 4096), (8192, 8192, 8192), (8192, 4096, 14336), (8192, 14336, 4096)]
SMALL_SIZES = [(256, 256, 256), (16, 2048, 512)]


def product_goal(direction: str, shape: Shape) -> float:
    """The share of a plain product's speed that every product is to reach."""
    return 0.9


def torch_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, **_: Any
) -> torch.Tensor:
    return F.gelu(F.linear(x, weight, bias)) + residual


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
        torch=torch.matmul,
        benchmark=Benchmark(
            SIZES, SMALL_SIZES, matmul_traffic, flops=product_flops, goal=product_goal
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
            SIZES, SMALL_SIZES, linear_traffic, flops=product_flops, goal=product_goal
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
