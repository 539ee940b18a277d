"""The norms, with a residual and with dropout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.kernels.config import Target, cdiv
from fastattn.kernels.norm.config import norm_backward_config, norm_forward_config

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic
from .common import DROPOUT, ROW_SIZES, SEED, SMALL_ROW_SIZES, STATISTIC


def norm_goal(direction: str, shape: Shape) -> float | None:
    """The share of the copy bandwidth that a norm is to reach."""
    cols = shape[-1]
    if direction == FORWARD:
        return 0.90
    if direction == BACKWARD:
        return 0.75 if cols <= 8192 else 0.60 if cols <= 16384 else 0.45
    return None


def torch_layer_norm(x: torch.Tensor, **parameters: Any) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], **parameters)


def torch_rms_norm(x: torch.Tensor, **parameters: Any) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], **parameters)


def torch_add(
    norm: Callable[..., torch.Tensor],
    x: torch.Tensor,
    residual: torch.Tensor,
    dropout_p: float = 0.0,
    **parameters: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = F.dropout(x, dropout_p) + residual
    return norm(hidden, **parameters), hidden


def liger_rms_norm() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_rms_norm  # type: ignore[import-not-found]

    # By default Liger writes gradients over dy, which a second call would then read.
    return lambda x, weight, eps: liger_rms_norm(
        x, weight, eps, casting_mode="gemma", in_place=False
    )


def liger_layer_norm() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found]
        liger_layer_norm,
    )

    return lambda x, weight, bias, eps: liger_layer_norm(x, weight, bias, eps)


def liger_add_rms_norm() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found]
        liger_fused_add_rms_norm,
    )

    return lambda x, residual, weight, eps: liger_fused_add_rms_norm(
        x, residual, weight, eps, casting_mode="gemma", in_place=False
    )


def quack_rms_norm() -> Callable[..., Any]:
    from quack import rmsnorm  # type: ignore[import-not-found]

    return lambda x, weight, eps: rmsnorm(x, weight, eps=eps)


def quack_add_rms_norm() -> Callable[..., Any]:
    from quack import rmsnorm  # type: ignore[import-not-found]

    return lambda x, residual, weight, eps: rmsnorm(
        x, weight, residual=residual, eps=eps, prenorm=True
    )


def norm(
    name: str,
    call: Callable[..., Any],
    torch: Callable[..., Any],
    *extra: str,
    rivals: Mapping[str, Callable[[], Callable[..., Any]]] | None = None,
    quick_widths: Sequence[int] = (1024, 8192, 65536),
    **options: Any,
) -> Op:
    """An entry for a norm over the last dimension with a weight and the `extra` tensors."""
    rows = 4096
    # Rows of a quarter of a warp up to rows that no register file holds. 1000 is divisible by 8 and
    # not by 16, 1023 by no power of two.
    widths = (64, 128, 1000, 1023, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 262144)

    def arguments(rows: int, cols: int) -> dict[str, Any]:
        shapes = {"residual": (rows, cols), "bias": (cols,)}
        chosen = {name: shapes[name] for name in extra}
        return {"x": (rows, cols), "weight": (cols,), "eps": 1e-5} | chosen | options

    dropout = "dropout_p" in options
    return Op(
        name,
        call,
        arguments,
        shapes=[(rows, width) for width in widths],
        quick_shapes=[(rows, width) for width in quick_widths],
        small=(8, 256),
        torch=torch,
        benchmark=Benchmark(
            ROW_SIZES,
            SMALL_ROW_SIZES,
            partial(
                norm_traffic,
                centered="layer" in name,
                bias="bias" in extra,
                residual="residual" in extra,
                dropout=dropout,
            ),
            rivals or {},
            goal=norm_goal,
            random=dropout,
        ),
    )


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


OPS = (
    norm(
        "rms_norm",
        fastattn.rms_norm,
        torch_rms_norm,
        rivals={"Liger": liger_rms_norm, "quack": quack_rms_norm},
        quick_widths=(64, 1000, 1024, 4096, 8192, 16384, 65536),
    ),
    norm(
        "layer_norm",
        fastattn.layer_norm,
        torch_layer_norm,
        "bias",
        rivals={"Liger": liger_layer_norm},
    ),
    norm(
        "add_rms_norm",
        fastattn.add_rms_norm,
        partial(torch_add, torch_rms_norm),
        "residual",
        rivals={"Liger": liger_add_rms_norm, "quack": quack_add_rms_norm},
        quick_widths=(),
    ),
    norm(
        "add_layer_norm+dropout",
        fastattn.add_layer_norm,
        partial(torch_add, torch_layer_norm),
        "residual",
        "bias",
        dropout_p=DROPOUT,
    ),
)
