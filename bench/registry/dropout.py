"""Dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastattn
from fastattn.kernels.config import Target

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic
from .common import DROPOUT, SEED, SMALL_ROW_SIZES


def dropout_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """One tensor read and one written, in either direction."""
    rows, cols = shape
    least = 2 * rows * cols * dtype.itemsize + SEED
    return {FORWARD: Traffic(least, least), BACKWARD: Traffic(least, least)}


OPS = (
    Op(
        "dropout",
        fastattn.dropout,
        lambda rows, columns: {"x": (rows, columns), "p": DROPOUT},
        shapes=[(4096, 4096)],
        quick_shapes=[(4096, 4096)],
        small=(8, 256),
        torch=lambda x, p: F.dropout(x, p),
        benchmark=Benchmark(
            [(2**26 // cols, cols) for cols in (4096, 1024, 65536)],
            SMALL_ROW_SIZES,
            dropout_traffic,
            random=True,
        ),
    ),
)
