"""Log-probabilities with their entropies, of given logits and of those of a linear layer."""

from __future__ import annotations

import math
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
from .losses import linear_arguments, linear_cross_entropy_flops, targets

TEMPERATURE = 0.7

Outputs = tuple[torch.Tensor, torch.Tensor]


def torch_log_prob(
    logits: torch.Tensor, target: torch.Tensor, temperature: float, return_entropy: bool
) -> Outputs:
    """The plain way: a tensor of the size of the logits after the other."""
    log_p = F.log_softmax(logits.float() / temperature, -1)
    return log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def torch_linear_log_prob(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any
) -> Outputs:
    """The plain way, which holds the logits of all rows."""
    return torch_log_prob(F.linear(x, weight), target, **options)


def trl_log_prob() -> Callable[..., Outputs]:
    from trl.trainer.utils import (  # type: ignore[import-not-found]
        entropy_from_logits,
        selective_log_softmax,
    )

    def call(
        logits: torch.Tensor, target: torch.Tensor, temperature: float, return_entropy: bool
    ) -> Outputs:
        logits = logits / temperature
        return selective_log_softmax(logits, target), entropy_from_logits(logits)

    return call


def log_prob_with_correct(**arguments: Any) -> Outputs:
    """What has a gradient, of a launch that looks for the largest logits too."""
    return fastattn.log_prob(**arguments, return_correct=True)[:2]


def linear_log_prob_with_correct(**arguments: Any) -> Outputs:
    return fastattn.linear_log_prob(**arguments, return_correct=True)[:2]


def log_prob_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """Logits, targets and two numbers a row; backward the gradient. Saved are lse and its error."""
    rows, cols = shape
    matrix, numbers = rows * cols * dtype.itemsize, rows * STATISTIC
    # The last row fills up the last tile, and the logit of each target is read once more.
    config = cross_entropy_forward_config(cols, target)
    read = cdiv(rows, config.block_m) * config.block_m * (cols + 1) * dtype.itemsize
    least = 2 * matrix + rows * TARGET + 2 * numbers
    return {
        FORWARD: Traffic(matrix + rows * TARGET + 2 * numbers, read + rows * TARGET + 4 * numbers),
        # The entropy is read beside what was saved.
        BACKWARD: Traffic(least, least + 3 * numbers),
    }


def linear_log_prob_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """Chunks of logits, once forward and once backward."""
    rows, columns, classes = shape
    x, weight, logits = (
        size * dtype.itemsize for size in (rows * columns, columns * classes, rows * classes)
    )
    numbers, sums = rows * STATISTIC, columns * classes * STATISTIC
    chunks = cdiv(rows, choose_chunk_rows(classes, dtype.itemsize, "auto"))
    least = x + weight + rows * TARGET + 2 * numbers
    # Every chunk writes its logits and reads them once.
    forward = least + 2 * numbers + 2 * logits + (chunks - 1) * weight
    # It writes them again, reads them, writes their gradient over them and reads that in two
    # products. It reads x and the weight in two, and adds to sums of dweight, which are rounded.
    moved = 5 * logits + 2 * x + 2 * chunks * weight + rows * TARGET + 5 * numbers
    moved += x + (2 * chunks - 1) * sums + sums + weight
    return {
        FORWARD: Traffic(least, forward),
        BACKWARD: Traffic(least + x + weight, moved),
    }


def frozen(*shape: int, scale: float = 1.0) -> Callable[[Any], torch.Tensor]:
    """A teacher's tensor, in 16 bits whatever the student's are."""
    return lambda device: scale * torch.randn(shape, dtype=torch.bfloat16, device=device)


def distillation(rows: int, columns: int, classes: int) -> dict[str, Any]:
    """A teacher of twice the student's width."""
    wide = 2 * columns
    return {
        "x": (rows, columns),
        "weight": Normal((classes, columns), scale=columns**-0.5),
        "teacher_x": frozen(rows, wide),
        "teacher_weight": frozen(classes, wide, scale=wide**-0.5),
    }


def torch_linear_jsd(
    x: torch.Tensor, weight: torch.Tensor, teacher_x: torch.Tensor, teacher_weight: torch.Tensor
) -> torch.Tensor:
    """The plain way, halfway between both divergences."""
    log_p = F.log_softmax(F.linear(x, weight).float(), -1)
    log_q = F.log_softmax(F.linear(teacher_x, teacher_weight).float(), -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


def linear_jsd_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """Chunks of both logits, once forward and once backward."""
    rows, columns, classes = shape
    size, frozen_size = dtype.itemsize, torch.bfloat16.itemsize
    x, weight, logits = rows * columns * size, columns * classes * size, rows * classes * size
    teacher = 2 * columns * (rows + classes) * frozen_size
    teacher_weight, of_teacher = 2 * columns * classes * frozen_size, rows * classes * frozen_size
    numbers, sums = rows * STATISTIC, columns * classes * STATISTIC
    chunks = cdiv(rows, choose_chunk_rows(classes, size + frozen_size, "auto"))
    least = x + weight + teacher + numbers
    # Every chunk writes its logits and reads them twice; five numbers of each row are saved.
    forward = least + 5 * numbers + 3 * (logits + of_teacher)
    again = (chunks - 1) * (weight + teacher_weight)
    # It writes them again, reads them once, writes the gradient and reads that in two products.
    moved = least + 5 * numbers + 5 * logits + 2 * of_teacher + again
    moved += 2 * x + chunks * weight + 2 * chunks * sums + weight
    return {
        FORWARD: Traffic(least, forward + again),
        BACKWARD: Traffic(least + x + weight, moved),
    }


KEPT = 64
"""Classes of each row that a teacher of `linear_top_k_kl` kept."""


def distillation_from_few(rows: int, columns: int, classes: int) -> dict[str, Any]:
    """A teacher that kept 64 classes of each row, each once, or all where there are fewer."""
    kept = min(KEPT, classes)

    def ids(device: Any) -> torch.Tensor:
        first = torch.arange(rows, device=device)[:, None] * 7919
        return (first + torch.arange(kept, device=device) * (classes // kept)) % classes

    def log_probs(device: Any) -> torch.Tensor:
        return torch.randn(rows, kept, device=device).log_softmax(-1) - 0.125

    return {
        "x": (rows, columns),
        "weight": Normal((classes, columns), scale=columns**-0.5),
        "teacher_ids": ids,
        "teacher_log_probs": log_probs,
    }


def torch_linear_top_k_kl(
    x: torch.Tensor,
    weight: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
) -> torch.Tensor:
    """The plain way, which holds the logits of all rows."""
    log_p = F.log_softmax(F.linear(x, weight).float(), -1).gather(-1, teacher_ids)
    return (teacher_log_probs.exp() * (teacher_log_probs - log_p)).sum(-1)


def linear_top_k_kl_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """Chunks of logits, once forward and once backward, and what the teacher kept.

    What PyTorch makes of the few classes of a row passes through memory once for each step; of it
    no more is counted than the entries themselves.
    """
    rows, columns, classes = shape
    size = dtype.itemsize
    x, weight, logits = rows * columns * size, columns * classes * size, rows * classes * size
    teacher = rows * min(KEPT, classes) * (TARGET + STATISTIC)
    numbers, sums = rows * STATISTIC, columns * classes * STATISTIC
    chunks = cdiv(rows, choose_chunk_rows(classes, size, "auto"))
    least = x + weight + teacher + numbers
    # Every chunk writes its logits and reads them once; two numbers of each row are saved.
    forward = least + 2 * numbers + 2 * logits + (chunks - 1) * weight
    # It writes them again, reads them, writes their gradient over them and reads that in two
    # products.
    moved = least + 3 * numbers + 5 * logits + (2 * chunks - 1) * weight
    moved += 2 * x + 2 * chunks * sums + weight
    return {
        FORWARD: Traffic(least, forward),
        BACKWARD: Traffic(least + x + weight, moved),
    }


def arguments(rows: int, classes: int) -> dict[str, Any]:
    return {
        "logits": (rows, classes),
        "target": targets(rows, classes),
        "temperature": TEMPERATURE,
        "return_entropy": True,
    }


def arguments_of_rows(rows: int, columns: int, classes: int) -> dict[str, Any]:
    options = {"temperature": TEMPERATURE, "return_entropy": True}
    return {**linear_arguments(rows, columns, classes), **options}


OPS = (
    Op(
        "log_prob",
        fastattn.log_prob,
        arguments,
        shapes=[(4096, c) for c in (2, 64, 1000, 1023, 32000, 50257, 131072, 151936)],
        quick_shapes=[(4096, c) for c in (50257, 131072)],
        small=(8, 256),
        torch=torch_log_prob,
        benchmark=Benchmark(
            [(2**27 // classes, classes) for classes in (151936, 32768)],
            [(256, 4096), (32, 32768)],
            log_prob_traffic,
            {"TRL": trl_log_prob},
            goal=goal_either_way(0.85),
        ),
    ),
    Op(
        "log_prob+everything",
        log_prob_with_correct,
        lambda rows, classes: {
            **arguments(rows, classes),
            "softcap": 30.0,
            "logit_scale": 0.5,
        },
        shapes=[(4096, classes) for classes in (64, 1000, 50257, 131072)],
        quick_shapes=[(4096, 131072)],
        small=(8, 256),
    ),
    Op(
        "linear_log_prob",
        fastattn.linear_log_prob,
        arguments_of_rows,
        shapes=[(4096, 128, 32000), (4096, 1024, 1000), (1023, 96, 1023)],
        quick_shapes=[(4096, 128, 32000)],
        small=(8, 32, 256),
        torch=torch_linear_log_prob,
        # The first is the shape that TRL measures its heads at. Checked in float64 on the logits of
        # all rows, of which 80 GB of memory hold the second.
        benchmark=Benchmark(
            [(8192, 4096, 151936), (8192, 4096, 32768), (16384, 2048, 32768)],
            [(256, 128, 4096), (2048, 256, 32000)],
            linear_log_prob_traffic,
            flops=linear_cross_entropy_flops,
            by_kernels=False,
            in_float64=lambda shape: shape[0] * shape[2] < 2**30,
        ),
    ),
    Op(
        "linear_log_prob+everything",
        linear_log_prob_with_correct,
        lambda rows, columns, classes: {
            **arguments_of_rows(rows, columns, classes),
            "bias": (classes,),
            "softcap": 30.0,
            "logit_scale": 0.5,
        },
        shapes=[(4096, 128, 32000)],
        quick_shapes=[],
        small=(8, 32, 256),
    ),
    Op(
        "linear_jsd",
        fastattn.linear_jsd,
        distillation,
        shapes=[(4096, 128, 32000), (4096, 1024, 1000), (1023, 96, 1023)],
        quick_shapes=[(4096, 128, 32000)],
        small=(8, 32, 256),
        torch=torch_linear_jsd,
        benchmark=Benchmark(
            [(8192, 2048, 32768), (8192, 2048, 131072)],
            [(256, 128, 4096), (64, 512, 8192)],
            linear_jsd_traffic,
            flops=lambda shape: {
                direction: 6.0 * shape[0] * shape[1] * shape[2] * share
                for direction, share in ((FORWARD, 1.0), (BACKWARD, 2.0 / 3.0))
            },
            by_kernels=False,
            in_float64=lambda shape: shape[0] * shape[2] < 2**29,
        ),
    ),
    Op(
        "linear_top_k_kl",
        fastattn.linear_top_k_kl,
        distillation_from_few,
        shapes=[(4096, 128, 32000), (1023, 96, 1023)],
        quick_shapes=[(4096, 128, 32000)],
        small=(8, 32, 256),
        torch=torch_linear_top_k_kl,
        benchmark=Benchmark(
            [(8192, 2048, 32768), (8192, 2048, 131072)],
            [(256, 128, 4096), (64, 512, 8192)],
            linear_top_k_kl_traffic,
            flops=linear_cross_entropy_flops,
            by_kernels=False,
            in_float64=lambda shape: shape[0] * shape[2] < 2**29,
        ),
    ),
)
