"""The norms of diffusion transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.kernels.config import Target, cdiv
from fastattn.kernels.norm.config import norm_backward_config, norm_forward_config

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic
from .common import STATISTIC


def torch_modulated(
    norm: Any, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    return norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def modulated_norm_traffic(
    statistics_of_row: int, shape: Shape, dtype: torch.dtype, target: Target
) -> dict[str, Traffic]:
    """x and y with the modulation; backward dy, x and dx, and partial sums of two gradients.

    Each program reads its sample's modulation.
    """
    samples, tokens, cols = shape
    matrix = samples * tokens * cols * dtype.itemsize
    vector = cols * dtype.itemsize
    statistics = samples * tokens * statistics_of_row * STATISTIC
    blocks = samples * cdiv(tokens, norm_forward_config(cols, target).block_m)
    forward = Traffic(
        2 * matrix + 2 * samples * vector, 2 * matrix + 2 * blocks * vector + statistics
    )
    config = norm_backward_config(cols, target)
    splits = min(cdiv(tokens, config.block_m), cdiv(config.most_programs, samples))
    partials = samples * splits * 2 * cols * STATISTIC
    least = 3 * matrix + 3 * samples * vector
    # Partial sums are added up by PyTorch, and the modulation's gradients rounded.
    moved = 3 * matrix + samples * splits * vector + statistics + partials
    return {FORWARD: forward, BACKWARD: Traffic(least, moved)}


def arguments(samples: int, tokens: int, cols: int) -> dict[str, Any]:
    return {"x": (samples, tokens, cols), "shift": (samples, cols), "scale": (samples, cols)}


OPS = tuple(
    Op(
        name,
        function,
        arguments,
        # DiT's, PixArt's and Flux's widths; 1023 is divisible by no power of two.
        shapes=[(8, 512, width) for width in (768, 1023, 1152, 3072, 8192)],
        quick_shapes=[(8, 512, 1152)],
        small=(2, 8, 256),
        torch=partial(torch_modulated, norm),
        benchmark=Benchmark(
            [(256, 256, 1152), (8, 4096, 3072)],
            [(2, 256, 1152)],
            partial(modulated_norm_traffic, statistics_of_row),
        ),
    )
    for name, function, norm, statistics_of_row in (
        ("modulated_layer_norm", fastattn.modulated_layer_norm, F.layer_norm, 2),
        ("modulated_rms_norm", fastattn.modulated_rms_norm, F.rms_norm, 1),
    )
)
