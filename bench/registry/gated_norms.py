"""The gated norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.kernels.config import Target, cdiv
from fastattn.kernels.norm.config import gated_norm_backward_config, gated_norm_forward_config

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic
from .common import ROW_SIZES, SMALL_ROW_SIZES, STATISTIC


def torch_gated_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps) * F.silu(gate)


def mamba_ssm_gated_norm() -> Callable[..., Any]:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn  # type: ignore[import-not-found]

    return lambda x, gate, weight, eps: rmsnorm_fn(
        x, weight, None, z=gate, eps=eps, norm_before_gate=True
    )


def gated_norm_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """One group a row and the gate after the norm, all gradients wanted."""
    rows, cols = shape
    matrix = rows * cols * dtype.itemsize
    row = cols * dtype.itemsize
    statistics = rows * STATISTIC

    # x, gate and y; a wide row's x once more, and its rstd written and read.
    least = 3 * matrix + row
    moved = least + statistics
    if not gated_norm_forward_config(cols, target).whole_row:
        moved += matrix + statistics
    forward = Traffic(least, moved)

    # dy, x, gate and the gradients of the last two
    least = 5 * matrix + 2 * row
    config = gated_norm_backward_config(cols, 1, target)
    programs = min(cdiv(rows, config.block_m), config.most_programs)
    moved = least + statistics + 2 * programs * cols * STATISTIC
    if not config.whole_row:
        # Everything that is read once more, for the mean, which is written and read.
        moved += 3 * matrix + row + 3 * statistics
    return {FORWARD: forward, BACKWARD: Traffic(least, moved)}


def arguments(rows: int, cols: int, **options: Any) -> dict[str, Any]:
    return {"x": (rows, cols), "gate": (rows, cols), "weight": (cols,), "eps": 1e-6, **options}


OPS = (
    Op(
        "gated_rms_norm",
        fastattn.gated_rms_norm,
        arguments,
        # Rows of one head, as Qwen3-Next's; 1023 is divisible by no power of two.
        shapes=[(4096, width) for width in (64, 128, 1000, 1023, 4096, 8192, 16384)],
        quick_shapes=[(4096, width) for width in (128, 4096, 16384)],
        small=(8, 256),
        torch=torch_gated_norm,
        benchmark=Benchmark(
            ROW_SIZES,
            SMALL_ROW_SIZES,
            gated_norm_traffic,
            {"mamba_ssm": mamba_ssm_gated_norm},
        ),
    ),
    Op(
        "gated_rms_norm of groups, gate first",
        fastattn.gated_rms_norm,
        lambda rows, cols: arguments(
            rows, cols, group_size=cols // 8, gate_first=True, casting="llama"
        ),
        # Nemotron-H's and Mamba 2's; groups of 640.
        shapes=[(4096, width) for width in (1024, 5120, 8192, 32768, 131072)],
        quick_shapes=[(4096, 8192)],
        small=(8, 256),
    ),
)
