"""Grouped products and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.kernels.config import Target, cdiv
from fastattn.kernels.experts.config import experts_config

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic

OFFSET = 4
"""Bytes of the place where an expert's rows begin."""


def even_offsets(rows: int, experts: int) -> Callable[[Any], torch.Tensor]:
    """Where experts begin that have as many rows each, which the numbers must allow."""
    return lambda device: (
        torch.arange(experts + 1, dtype=torch.int32, device=device) * (rows // experts)
    )


def grouped_linear_arguments(rows: int, k: int, n: int, experts: int) -> dict[str, Any]:
    return {"x": (rows, k), "weight": (experts, n, k), "offsets": even_offsets(rows, experts)}


def torch_grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, **_: Any
) -> torch.Tensor:
    return F.grouped_mm(x, weight.mT, offs=offsets[1:])


def grouped_linear_flops(shape: Shape) -> dict[str, float]:
    """A product, and backward the two that give its operands' gradients."""
    rows, k, n, _ = shape
    return {FORWARD: 2.0 * rows * k * n, BACKWARD: 4.0 * rows * k * n}


def grouped_linear_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """x, the weights and their product; backward its gradient, both operands and theirs."""
    rows, k, n, experts = shape
    size, name = dtype.itemsize, str(dtype)[6:]
    x, weight, y = rows * k * size, experts * k * n * size, rows * n * size
    offsets = (experts + 1) * OFFSET

    def product(columns: int, summed: int, operand: int, result: int) -> int:
        sizes = (rows, experts, columns, summed, name, "ieee", target)
        config = experts_config("grouped_linear", *sizes)
        tiles = cdiv(rows // experts, config.block_m)
        read = cdiv(columns, config.block_n) * operand + tiles * weight
        return read + result + offsets

    config = experts_config("grouped_weight", rows, experts, n, k, name, "ieee", target)
    of_weight = cdiv(k, config.block_n) * y + cdiv(n, config.block_m) * x + weight + offsets
    return {
        FORWARD: Traffic(x + weight + y + offsets, product(n, k, x, y)),
        BACKWARD: Traffic(2 * (x + weight) + y + offsets, product(k, n, y, x) + of_weight),
    }


def spread_ids(tokens: int, slots: int, experts: int) -> Callable[[Any], torch.Tensor]:
    """Experts that all have as many tokens, neighbours going to others."""
    return lambda device: (
        torch.arange(tokens * slots, device=device).view(tokens, slots) * 7 % experts
    )


def mixture_arguments(
    tokens: int, hidden: int, inside: int, experts: int, slots: int
) -> dict[str, Any]:
    return {
        "x": (tokens, hidden),
        "ids": spread_ids(tokens, slots, experts),
        "weights": (tokens, slots),
        "w_gate_up": (experts, 2 * inside, hidden),
        "w_down": (experts, hidden, inside),
    }


def torch_mixture(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """PyTorch's own grouped products, with all that has to stand around them."""
    tokens, slots = ids.shape
    keys, order = ids.flatten().sort(stable=True)
    numbers = torch.arange(1, w_down.shape[0] + 1, device=ids.device)
    ends = torch.searchsorted(keys, numbers, out_int32=True)
    h = F.grouped_mm(x[order // slots], w_gate_up.mT, offs=ends)
    gate, up = h.chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, w_down.mT, offs=ends)
    scaled = y * weights.flatten()[order, None]
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return scaled[places].view(tokens, slots, -1).sum(1)


def liger_mixture() -> Callable[..., Any]:
    from liger_kernel.ops import LigerFusedMoEFunction  # type: ignore[import-not-found]

    def mixture(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        w_gate_up: torch.Tensor,
        w_down: torch.Tensor,
    ) -> torch.Tensor:
        return LigerFusedMoEFunction.apply(x, w_gate_up, w_down, ids.int(), weights)

    return mixture


def scattermoe_mixture() -> Callable[..., Any]:
    from scattermoe import (  # type: ignore[import-not-found]
        flatten_sort_count,
        parallel_linear,
    )

    def mixture(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        w_gate_up: torch.Tensor,
        w_down: torch.Tensor,
    ) -> torch.Tensor:
        order = flatten_sort_count(ids, num_experts=w_down.shape[0])
        h = parallel_linear(x, w_gate_up.mT, ids.shape[1], *order, grouped_out=True)
        gate, up = h.chunk(2, dim=-1)
        a = F.silu(gate) * up
        return parallel_linear(a, w_down.mT, 1, *order, grouped_in=True, gates=weights)

    return mixture


def sonic_mixture() -> Callable[..., Any]:
    from sonicmoe import moe_general_routing_inputs  # type: ignore[import-not-found]
    from sonicmoe.enums import ActivationType  # type: ignore[import-not-found]

    def mixture(
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        w_gate_up: torch.Tensor,
        w_down: torch.Tensor,
    ) -> torch.Tensor:
        tokens, slots = ids.shape
        rows = torch.arange(tokens, dtype=torch.int32, device=x.device).repeat_interleave(slots)
        return moe_general_routing_inputs(
            x,
            weights.flatten(),
            rows,
            ids.flatten().int(),
            w_gate_up.permute(1, 2, 0),
            None,
            w_down.permute(1, 2, 0),
            None,
            E=w_down.shape[0],
            stream_id=None,
            activation_type=ActivationType.SWIGLU,
            concat_layout=True,
        )[0]

    return mixture


# Written by these packages' sources, and not run: they need a GPU.
RIVALS = {"Liger": liger_mixture, "ScatterMoE": scattermoe_mixture, "sonic-moe": sonic_mixture}


def mixture_flops(shape: Shape) -> dict[str, float]:
    """Three products of I x H a token and expert, and backward six."""
    tokens, hidden, inside, _, slots = shape
    product = 2.0 * tokens * slots * hidden * inside
    return {FORWARD: 3 * product, BACKWARD: 6 * product}


def mixture_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """x, ids, weights, both products' weights and the output; backward their gradients.

    Between kernels there are h, a and y, and backward dh, sa and the rows of dx.
    """
    tokens, hidden, inside, experts, slots = shape
    size, name, rows = dtype.itemsize, str(dtype)[6:], tokens * slots
    x, w2 = tokens * hidden * size, experts * inside * hidden * size
    w1 = 2 * w2
    pairs, ids = rows * size, rows * 8
    h, a, y = 2 * rows * inside * size, rows * inside * size, rows * hidden * size
    order = 4 * rows

    def product(rule: str, n: int, k: int, weight: int, operand: int) -> int:
        config = experts_config(rule, rows, experts, n, k, name, "ieee", target)
        tiles = cdiv(cdiv(rows, experts), config.block_m)
        return cdiv(n, config.block_n) * operand + tiles * weight

    def of_weight(n: int, k: int, first: int, second: int) -> int:
        config = experts_config("grouped_weight", rows, experts, n, k, name, "ieee", target)
        result = experts * n * k * size
        return cdiv(k, config.block_n) * first + cdiv(n, config.block_m) * second + result

    sort = ids + 4 * order
    forward = product("experts_forward", inside, hidden, w1, y) + h + a
    forward += product("grouped_linear", hidden, inside, w2, a) + y
    forward += y + x + 2 * order + pairs
    backward = product("experts_backward", inside, hidden, w2, y) + 2 * h + a + 2 * order
    backward += of_weight(hidden, inside, y, a) + of_weight(2 * inside, hidden, h, y)
    backward += product("grouped_linear", hidden, 2 * inside, w1, h) + y + y + x + order
    inputs = x + w1 + w2 + pairs
    return {
        FORWARD: Traffic(inputs + ids + x, forward + sort),
        BACKWARD: Traffic(2 * inputs + x, backward),
    }


OPS = (
    Op(
        "grouped_linear",
        fastattn.grouped_linear,
        grouped_linear_arguments,
        # gate and up of Mixtral, Qwen3-30B, gpt-oss-20b and a slice of DeepSeek-V3.
        shapes=[
            (8192, 4096, 28672, 8),
            (32768, 2048, 1536, 128),
            (16384, 2880, 5760, 32),
            (32768, 7168, 4096, 32),
            (64, 2048, 1536, 128),
            (4096, 1000, 1000, 4),
            (4096, 1023, 1023, 4),
        ],
        quick_shapes=[(32768, 2048, 1536, 128), (64, 2048, 1536, 128)],
        small=(24, 40, 48, 3),
        torch=torch_grouped_linear,
        benchmark=Benchmark(
            [
                (65536, 4096, 28672, 8),
                (262144, 2048, 1536, 128),
                (131072, 2880, 5760, 32),
                (262144, 7168, 4096, 32),
                (8192, 4096, 28672, 8),
                (32768, 2048, 1536, 128),
            ],
            [(256, 256, 512, 4), (16, 512, 256, 8)],
            grouped_linear_traffic,
            flops=grouped_linear_flops,
            goal=lambda direction, shape: {FORWARD: 0.7, BACKWARD: 0.6}.get(direction),
        ),
    ),
    Op(
        "mixture",
        fastattn.mixture,
        mixture_arguments,
        # Mixtral, Qwen3-30B, gpt-oss-20b and a slice of DeepSeek-V3; few tokens; odd sizes.
        shapes=[
            (4096, 4096, 14336, 8, 2),
            (4096, 2048, 768, 128, 8),
            (4096, 2880, 2880, 32, 4),
            (4096, 7168, 2048, 32, 8),
            (16, 2048, 768, 128, 8),
            (4096, 1023, 1023, 4, 2),
        ],
        quick_shapes=[(4096, 2048, 768, 128, 8)],
        small=(24, 40, 48, 3, 2),
        torch=torch_mixture,
        benchmark=Benchmark(
            [
                (32768, 4096, 14336, 8, 2),
                (32768, 2048, 768, 128, 8),
                (32768, 2880, 2880, 32, 4),
                (32768, 7168, 2048, 32, 8),
                (4096, 4096, 14336, 8, 2),
                (4096, 2048, 768, 128, 8),
            ],
            [(128, 256, 128, 8, 2)],
            mixture_traffic,
            RIVALS,
            flops=mixture_flops,
            goal=lambda direction, shape: {FORWARD: 0.6, BACKWARD: 0.5}.get(direction),
            # PyTorch sorts, and adds up the parts of ds.
            by_kernels=False,
        ),
    ),
    Op(
        "mixture gpt-oss",
        fastattn.mixture,
        lambda tokens, hidden, inside, experts, slots: {
            "x": (tokens, hidden),
            "ids": spread_ids(tokens, slots, experts),
            "weights": (tokens, slots),
            "w_gate_up": (experts, hidden, 2 * inside),
            "w_down": (experts, inside, hidden),
            "b_gate_up": (experts, 2 * inside),
            "b_down": (experts, hidden),
            "interleaved": True,
            "transposed": True,
            "limit": 7.0,
            "alpha": 1.702,
            "up_offset": 1.0,
            "recompute": True,
        },
        shapes=[(4096, 2880, 2880, 32, 4), (16, 2880, 2880, 32, 4)],
        quick_shapes=[(4096, 2880, 2880, 32, 4)],
        small=(24, 40, 48, 3, 2),
    ),
)
