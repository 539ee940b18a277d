"""Rotary position embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastattn
from fastattn.kernels.config import Target, cdiv
from fastattn.kernels.rotary import rotary_config

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic, goal_either_way
from .common import SMALL_ROW_SIZES, STATISTIC


def rotary_arguments(tokens: int, width: int) -> dict[str, Any]:
    """q and k, the heads of each as wide together as `width` says."""
    head_dim = rotary_head_dim(width)

    def angles(device: torch.device) -> torch.Tensor:
        return torch.full((tokens, head_dim // 2), 0.5, device=device)

    heads = (1, width // head_dim, tokens, head_dim)
    return {"q": heads, "k": heads, "cos": angles, "sin": angles}


def torch_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The usual formula on tables of whole heads, as in Hugging Face's models."""
    cos, sin = torch.cat((cos, cos), -1).to(q.dtype), torch.cat((sin, sin), -1).to(q.dtype)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return turned(q), turned(k)


def liger_rotary() -> Callable[..., Any]:
    from liger_kernel.ops.rope import LigerRopeFunction  # type: ignore[import-not-found]

    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        # Liger turns tensors in place.
        cos, sin = torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]
        return LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)

    return rotary


def rotary_head_dim(width: int) -> int:
    """The head dim that a rotary entry splits its width into."""
    return next(head_dim for head_dim in (128, 96, 80, 72, 50, 16, 2) if width % head_dim == 0)


def rotary_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """q and k read and written, in either direction; float32 tables, once for several heads."""
    tokens, width = shape
    head_dim = rotary_head_dim(width)
    half = head_dim // 2
    matrices = 4 * tokens * width * dtype.itemsize
    tables = 2 * tokens * half * STATISTIC
    reads = 2 * cdiv(width // head_dim, rotary_config(half, target).heads)
    if tokens * half <= max(shape):
        # So small that programs find it in the cache.
        reads = 1
    traffic = Traffic(matrices + tables, matrices + tables * reads)
    return {FORWARD: traffic, BACKWARD: traffic}


OPS = (
    Op(
        "apply_rotary_qk",
        fastattn.apply_rotary_qk,
        rotary_arguments,
        shapes=[(4096, width) for width in (80, 96, 1000, 4096, 8192)],
        quick_shapes=[(4096, width) for width in (80, 4096)],
        small=(8, 256),
        torch=torch_rotary,
        benchmark=Benchmark(
            [(2**25 // width, width) for width in (4096, 1024, 8192)],
            SMALL_ROW_SIZES,
            rotary_traffic,
            {"Liger": liger_rotary},
            goal=goal_either_way(0.85),
        ),
    ),
    Op(
        "apply_rotary partial, interleaved",
        fastattn.apply_rotary,
        lambda tokens, head_dim: {
            "x": (2, 8, tokens, head_dim),
            "cos": lambda device: torch.ones(tokens, head_dim // 4, device=device),
            "sin": lambda device: torch.ones(tokens, head_dim // 4, device=device),
            "positions": lambda device: torch.arange(tokens, device=device),
            "interleaved": True,
        },
        shapes=[(4096, head_dim) for head_dim in (64, 128, 256)],
        quick_shapes=[(4096, 128)],
        small=(8, 64),
    ),
    Op(
        "apply_rotary_qk full width, interleaved",
        fastattn.apply_rotary_qk,
        lambda tokens, head_dim: {
            **dict.fromkeys("qk", (1, 8, tokens, head_dim)),
            **dict.fromkeys(
                ("cos", "sin"), lambda device: torch.ones(1, tokens, head_dim, device=device)
            ),
            "interleaved": True,
            "full_width": True,
        },
        shapes=[(4096, head_dim) for head_dim in (64, 80, 128)],
        quick_shapes=[(4096, 128)],
        small=(8, 64),
    ),
    Op(
        "apply_rotary_qk complex, interleaved",
        fastattn.apply_rotary_qk,
        lambda tokens, head_dim: {
            **dict.fromkeys("qk", (1, 8, tokens, head_dim)),
            "cos": lambda device: torch.ones(
                tokens, head_dim // 2, dtype=torch.complex64, device=device
            ),
            "interleaved": True,
        },
        shapes=[(4096, head_dim) for head_dim in (64, 80, 128)],
        quick_shapes=[(4096, 128)],
        small=(8, 64),
    ),
)
