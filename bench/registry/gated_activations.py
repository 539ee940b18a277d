"""The gated activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.kernels.config import Target

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic, goal_either_way
from .common import ROW_SIZES, SMALL_ROW_SIZES


def gated(
    name: str,
    call: Callable[..., Any],
    torch: Callable[..., Any],
    *,
    packed: bool = False,
    rivals: Mapping[str, Callable[[], Callable[..., Any]]] | None = None,
    **options: Any,
) -> Op:
    """An entry for a gated activation; a shape counts the columns of its output."""

    def arguments(rows: int, cols: int) -> dict[str, Any]:
        given = {"gate": (rows, 2 * cols)} if packed else {"gate": (rows, cols), "up": (rows, cols)}
        return given | options

    widths = (64, 1000, 1023, 4096, 11008, 16384)
    return Op(
        name,
        call,
        arguments,
        shapes=[(4096, width) for width in widths],
        quick_shapes=[(4096, width) for width in (64, 11008)],
        small=(8, 256),
        torch=torch,
        benchmark=Benchmark(
            ROW_SIZES,
            SMALL_ROW_SIZES,
            gated_traffic,
            rivals or {},
            goal=goal_either_way(0.85),
        ),
    )


def torch_gpt_oss(
    gate: torch.Tensor, interleaved: bool, limit: float, alpha: float, up_offset: float
) -> torch.Tensor:
    gate, up = gate[..., ::2].clamp(max=limit), gate[..., 1::2].clamp(-limit, limit)
    return (up + up_offset) * (gate * torch.sigmoid(gate * alpha))


def liger_swiglu() -> Callable[..., Any]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


def liger_geglu() -> Callable[..., Any]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction  # type: ignore[import-not-found]

    return lambda gate, up, approximate: LigerGELUMulFunction.apply(gate, up)


def gated_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """gate, up and y; backward gate, up, dy and the gradients of both."""
    rows, cols = shape
    matrix = rows * cols * dtype.itemsize
    return {
        FORWARD: Traffic(3 * matrix, 3 * matrix),
        BACKWARD: Traffic(5 * matrix, 5 * matrix),
    }


OPS = (
    gated(
        "swiglu",
        fastattn.swiglu,
        lambda gate, up: F.silu(gate) * up,
        rivals={"Liger": liger_swiglu},
    ),
    gated(
        "swiglu packed",
        fastattn.swiglu,
        lambda gate: F.silu(gate.chunk(2, -1)[0]) * gate.chunk(2, -1)[1],
        packed=True,
    ),
    gated(
        "swiglu of gpt-oss",
        fastattn.swiglu,
        torch_gpt_oss,
        packed=True,
        interleaved=True,
        limit=7.0,
        alpha=1.702,
        up_offset=1.0,
    ),
    gated("geglu", fastattn.geglu, lambda gate, up: F.gelu(gate) * up),
    gated(
        "geglu tanh",
        fastattn.geglu,
        lambda gate, up, approximate: F.gelu(gate, approximate=approximate) * up,
        approximate="tanh",
        rivals={"Liger": liger_geglu},
    ),
    gated("reglu", fastattn.reglu, lambda gate, up: F.relu(gate) * up),
    gated("glu", fastattn.glu, lambda gate, up: torch.sigmoid(gate) * up),
)
