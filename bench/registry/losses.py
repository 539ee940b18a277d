"""The losses, on given logits and on those of a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.kernels.config import Target, cdiv
from fastattn.kernels.cross_entropy_config import cross_entropy_forward_config
from fastattn.ops.core.catalog import Normal
from fastattn.ops.linear_cross_entropy_chunks import choose_chunk_rows

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic, goal_either_way
from .common import STATISTIC, TARGET


def targets(rows: int, classes: int) -> Callable[[Any], torch.Tensor]:
    """Class indices all over the vocabulary."""
    return lambda device: torch.arange(rows, device=device) * 7919 % classes


def quack_cross_entropy() -> Callable[..., Any]:
    from quack import cross_entropy  # type: ignore[import-not-found]

    return lambda logits, target: cross_entropy(logits, target, reduction="mean")


def linear_arguments(rows: int, columns: int, classes: int) -> dict[str, Any]:
    """Logits of order one."""
    return {
        "x": (rows, columns),
        "weight": Normal((classes, columns), scale=columns**-0.5),
        "target": targets(rows, classes),
    }


def torch_linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """The plain way, which holds the logits of all rows."""
    return F.cross_entropy(F.linear(x, weight), target)


def torch_chunks() -> Callable[..., Any]:
    try:
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy
    except ImportError as error:
        raise ImportError("torch has linear_cross_entropy from 2.13 on") from error
    options = LinearCrossEntropyOptions(allow_retain_graph=True)
    return lambda x, weight, target: linear_cross_entropy(x, weight, target, options=options)


def liger_linear_cross_entropy() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import (  # type: ignore[import-not-found]
        liger_fused_linear_cross_entropy,
    )

    return lambda x, weight, target: liger_fused_linear_cross_entropy(x, weight, target)


def cross_entropy_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """Logits and targets, and a mean; backward the gradient. Saved are lse and its error."""
    rows, cols = shape
    matrix = rows * cols * dtype.itemsize
    targets = rows * TARGET
    # The last row fills up the last tile. The logit of each target is read once more, and each
    # row's loss and weight are written beside what is saved.
    config = cross_entropy_forward_config(cols, target)
    read = cdiv(rows, config.block_m) * config.block_m * (cols + 1) * dtype.itemsize
    forward = Traffic(matrix + targets + dtype.itemsize, read + targets + rows * 4 * STATISTIC)
    # The gradient of each row's loss is read beside what was saved.
    least = 2 * matrix + targets
    return {FORWARD: forward, BACKWARD: Traffic(least, least + rows * 3 * STATISTIC)}


def linear_cross_entropy_traffic(
    shape: Shape, dtype: torch.dtype, target: Target
) -> dict[str, Traffic]:
    """The forward computes the gradients too, from chunks of logits; the backward scales them."""
    rows, columns, classes = shape
    x, weight, logits = (
        size * dtype.itemsize for size in (rows * columns, columns * classes, rows * classes)
    )
    sums = columns * classes * STATISTIC
    chunks = cdiv(rows, choose_chunk_rows(classes, dtype.itemsize, "auto"))
    least = x + weight + rows * TARGET + dtype.itemsize
    # Every chunk writes its logits, reads them for the loss, reads them again and writes their
    # gradient, and reads that in two products, with the weight in two, and x in two. It writes dx,
    # and adds to the sums of dweight.
    moved = least + 6 * logits + (2 * chunks - 1) * weight + 2 * x + (2 * chunks - 1) * sums
    written = x + weight + dtype.itemsize
    return {FORWARD: Traffic(least, moved), BACKWARD: Traffic(written, written + x + sums)}


def linear_cross_entropy_flops(shape: Shape) -> dict[str, float]:
    """The product of the logits, and the two of their gradient, where the definition has them."""
    rows, columns, classes = shape
    product = 2.0 * rows * columns * classes
    return {FORWARD: product, BACKWARD: 2.0 * product}


OPS = (
    # Liger writes the gradient over the logits in its forward, so it cannot be called twice.
    Op(
        "cross_entropy",
        fastattn.cross_entropy,
        lambda rows, classes: {"logits": (rows, classes), "target": targets(rows, classes)},
        shapes=[(4096, c) for c in (2, 64, 1000, 1023, 32000, 50257, 131072, 262144)],
        quick_shapes=[(4096, c) for c in (64, 50257, 131072)],
        small=(8, 256),
        torch=lambda logits, target: F.cross_entropy(logits, target),
        benchmark=Benchmark(
            [(2**27 // classes, classes) for classes in (131072, 32768, 262144)],
            [(256, 4096), (32, 32768)],
            cross_entropy_traffic,
            {"quack": quack_cross_entropy},
            goal=goal_either_way(0.85),
        ),
    ),
    Op(
        "cross_entropy+everything",
        fastattn.cross_entropy,
        lambda rows, classes: {
            "logits": (rows, classes),
            "target": targets(rows, classes),
            "weight": lambda device: torch.linspace(0.5, 2.0, classes, device=device),
            "label_smoothing": 0.1,
            "z_loss": 1e-4,
            "logit_scale": 0.5,
            "softcap": 30.0,
            "return_lse": True,
        },
        shapes=[(4096, classes) for classes in (64, 1000, 50257, 131072)],
        quick_shapes=[(4096, 131072)],
        small=(8, 256),
    ),
    Op(
        "linear_cross_entropy",
        fastattn.linear_cross_entropy,
        linear_arguments,
        # Its backward launches no kernel; the entries below have all of them in both directions.
        shapes=[],
        quick_shapes=[],
        small=(8, 32, 256),
        torch=torch_linear_cross_entropy,
        # Checked in float64 on the logits of all rows, of which 80 GB of memory hold the first.
        benchmark=Benchmark(
            [(8192, 4096, 131072), (16384, 4096, 131072), (16384, 2048, 32768)],
            [(256, 128, 4096), (64, 512, 8192)],
            linear_cross_entropy_traffic,
            {"torch chunks": torch_chunks, "Liger": liger_linear_cross_entropy},
            flops=linear_cross_entropy_flops,
            by_kernels=False,
        ),
    ),
    Op(
        "linear_cross_entropy by row",
        fastattn.linear_cross_entropy,
        lambda rows, columns, classes: {
            **linear_arguments(rows, columns, classes),
            "reduction": "none",
        },
        shapes=[(4096, 128, 32000), (4096, 1024, 1000), (1023, 96, 1023)],
        quick_shapes=[(4096, 128, 32000)],
        small=(8, 32, 256),
    ),
    Op(
        "linear_cross_entropy+everything",
        fastattn.linear_cross_entropy,
        lambda rows, columns, classes: {
            **linear_arguments(rows, columns, classes),
            "bias": (classes,),
            "class_weight": lambda device: torch.linspace(0.5, 2.0, classes, device=device),
            "label_smoothing": 0.1,
            "z_loss": 1e-4,
            "logit_scale": 0.5,
            "softcap": 30.0,
            "return_lse": True,
        },
        shapes=[(4096, 128, 32000)],
        quick_shapes=[],
        small=(8, 32, 256),
    ),
)
