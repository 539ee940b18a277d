"""The fused gated linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.kernels.config import Target, cdiv
from fastattn.kernels.matmul.gated_linear_config import gated_linear_config

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic
from .products import product_reads


def arguments(rows: int, k: int, n: int) -> dict[str, Any]:
    return {"x": (rows, k), "w_gate": (n, k), "w_up": (n, k)}


def torch_gated_linear(
    x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor, **_: Any
) -> torch.Tensor:
    return F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)


def linears_and_swiglu() -> Callable[..., torch.Tensor]:
    """What the fused kernel has to beat: PyTorch's products, and our activation of both."""
    return lambda x, w_gate, w_up, **_: fastattn.swiglu(F.linear(x, w_gate), F.linear(x, w_up))


def gated_linear_goal(direction: str, shape: Shape) -> float | None:
    """The share of a plain product's speed: 0.95 of what the products and swiglu take together.

    The backward is counted without the products that it computes again, a third of what it does.
    """
    return {FORWARD: 0.9, BACKWARD: 0.6}.get(direction)


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

    # dy gives the gradients of gate and up.
    before = tiles_read(backward=True) + 3 * out
    return {
        FORWARD: Traffic(x + 2 * weight + out, tiles_read(backward=False) + out),
        BACKWARD: Traffic(
            2 * (x + 2 * weight) + out, before + products_after(shape, dtype, target)
        ),
    }


def kept_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """The same where gate and up are written, read by the activation, and read once more."""
    m, k, n = shape
    x, weight, out = (size * dtype.itemsize for size in (m * k, k * n, m * n))
    products = 2 * (product_reads(m, n, k, dtype, target, "kk") + out)
    return {
        FORWARD: Traffic(x + 2 * weight + out, products + 3 * out),
        BACKWARD: Traffic(
            2 * (x + 2 * weight) + out, 5 * out + products_after(shape, dtype, target)
        ),
    }


def products_after(shape: Shape, dtype: torch.dtype, target: Target) -> int:
    """Bytes of the four products that the gradients of gate and up go into."""
    m, k, n = shape
    x, weight = m * k * dtype.itemsize, k * n * dtype.itemsize
    # The second product of dx is added to the first.
    dx = product_reads(m, k, n, dtype, target, "kn")
    dx_added = product_reads(m, k, n, dtype, target, "kn", fused=True)
    dweight = product_reads(n, k, m, dtype, target, "mn") + weight
    return dx + dx_added + 3 * x + 2 * dweight


OPS = (
    Op(
        "gated_linear",
        fastattn.gated_linear,
        arguments,
        shapes=[
            (8192, 4096, 11008),
            (16, 4096, 11008),
            (4096, 1000, 1000),
            (4096, 1023, 1023),
            (64, 64, 64),
        ],
        quick_shapes=[(8192, 4096, 11008), (16, 4096, 11008)],
        small=(24, 40, 48),
        torch=torch_gated_linear,
        benchmark=Benchmark(
            [(8192, 4096, 11008), (16384, 4096, 14336), (4096, 8192, 28672), (16, 4096, 14336)],
            [(256, 256, 512), (16, 512, 1024)],
            gated_linear_traffic,
            {"linears and swiglu": linears_and_swiglu},
            flops=gated_linear_flops,
            goal=gated_linear_goal,
        ),
    ),
    Op(
        "gated_linear, gate and up kept",
        fastattn.gated_linear,
        lambda *shape: {**arguments(*shape), "recompute": False},
        # Its kernels are those of linear and swiglu, which have entries of their own.
        shapes=[],
        quick_shapes=[],
        small=(24, 40, 48),
        torch=torch_gated_linear,
        benchmark=Benchmark(
            [(8192, 4096, 11008), (4096, 8192, 28672)],
            [(256, 256, 512)],
            kept_traffic,
            {"linears and swiglu": linears_and_swiglu},
            flops=gated_linear_flops,
            goal=gated_linear_goal,
        ),
    ),
    Op(
        "gated_linear gelu, biases, transposed",
        fastattn.gated_linear,
        lambda rows, k, n: {
            "x": (rows, k),
            "w_gate": lambda device: torch.zeros(k, n, dtype=torch.bfloat16, device=device).t(),
            "w_up": lambda device: torch.zeros(k, n, dtype=torch.bfloat16, device=device).t(),
            "b_gate": (n,),
            "b_up": (n,),
            "activation": "gelu",
        },
        shapes=[(8192, 4096, 11008), (16, 4096, 11008)],
        quick_shapes=[(8192, 4096, 11008)],
        small=(24, 40, 48),
        dtypes=(torch.bfloat16,),
    ),
)
