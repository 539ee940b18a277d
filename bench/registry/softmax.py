"""Softmax and log-softmax, masked and not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.kernels.config import Target
from fastattn.kernels.softmax import softmax_backward_config, softmax_forward_config

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic, goal_either_way
from .common import ROW_SIZES, SMALL_ROW_SIZES


def softmax(name: str, call: Callable[..., Any], torch: Callable[..., Any], log: bool) -> Op:
    """An entry for a normalization by exponentials over the last dimension."""
    widths = (64, 1000, 1023, 1024, 4096, 8192, 16384, 32768, 131072)
    return Op(
        name,
        call,
        lambda rows, cols: {"x": (rows, cols)},
        shapes=[(4096, width) for width in widths],
        quick_shapes=[(4096, width) for width in (64, 1024, 32768)],
        small=(8, 256),
        torch=torch,
        benchmark=Benchmark(
            ROW_SIZES,
            SMALL_ROW_SIZES,
            partial(softmax_traffic, log=log),
            goal=goal_either_way(0.85),
        ),
    )


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


OPS = (
    softmax("softmax", fastattn.softmax, lambda x: F.softmax(x, -1), log=False),
    softmax("log_softmax", fastattn.log_softmax, lambda x: F.log_softmax(x, -1), log=True),
    Op(
        "softmax causal",
        fastattn.softmax,
        lambda heads, queries, cols: {"x": (heads, queries, cols), "causal": True, "scale": 0.125},
        shapes=[(16, 128, 128), (16, 1024, 1024), (2, 4096, 4096), (1, 64, 32768)],
        quick_shapes=[(16, 1024, 1024)],
        small=(2, 16, 64),
    ),
    Op(
        "softmax masked",
        fastattn.softmax,
        lambda heads, queries, cols: {
            "x": (heads, queries, cols),
            "mask": lambda device: torch.ones(queries, cols, dtype=torch.bool, device=device),
        },
        shapes=[(16, 128, 128), (16, 1024, 1024), (2, 4096, 4096), (1, 64, 32768)],
        quick_shapes=[(16, 1024, 1024)],
        small=(2, 16, 64),
    ),
)
