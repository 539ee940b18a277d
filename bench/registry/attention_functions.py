"""Attention with plain Python functions, and of pairs with a bias that their rows share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastattn

from .attention import SHAPES, qkv, torch_attention
from .attention_features import PAIR_SHAPES, PAIR_SIZES, feature

WINDOW = 512
BUCKETS = 32
SAMPLES = 2


def near(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """The nearest keys, and a few at the beginning that all see."""
    return (q_idx >= kv_idx) & ((q_idx - kv_idx < WINDOW) | (kv_idx < 4))


def bucketed(table: torch.Tensor) -> Callable[..., Any]:
    """A bias by distance, of a table (buckets, H)."""

    def added(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + table[(q_idx - kv_idx).clamp(0, BUCKETS - 1), h]

    return added


def by_functions(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    return fastattn.attention(q, k, v, score_mods=[bucketed(table)], mask_mod=near)


def flex_by_functions() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor
    ) -> torch.Tensor:
        blocks = create_block_mask(near, None, None, q.shape[2], k.shape[2], device=q.device)
        return compiled(q, k, v, score_mod=bucketed(table), block_mask=blocks, enable_gqa=True)

    return attention


def torch_by_functions(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    m, n = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    distance = m[:, None] - n
    bias = table[distance.clamp(0, BUCKETS - 1)].movedim(-1, 0)
    keep = (distance >= 0) & ((distance < WINDOW) | (n < 4))
    return torch_attention(q, k, v, mask=bias.masked_fill(~keep, float("-inf"))[None])


def by_samples(x: torch.Tensor) -> torch.Tensor:
    """Rows of pairs by the samples that they belong to."""
    return x.unflatten(0, (SAMPLES, -1)) if x.shape[0] % SAMPLES == 0 else x[None]


def triangle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    o = fastattn.triangle_attention(by_samples(q), by_samples(k), by_samples(v), bias)
    return o.flatten(0, 1)


def torch_triangle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    shared = bias.expand(-1, q.shape[0] // bias.shape[0], -1, -1, -1).flatten(0, 1)
    return torch_attention(q, k, v, mask=shared)


def samples_of(batch: int) -> int:
    return SAMPLES if batch % SAMPLES == 0 else 1


OPS = (
    feature(
        "attention functions",
        lambda batch, heads, *rest: {**qkv(batch, heads, *rest), "table": (BUCKETS, heads)},
        torch_by_functions,
        {"FlexAttention": flex_by_functions},
        parameter=lambda batch, heads, *rest: BUCKETS * heads,
        call=by_functions,
        shapes=[SHAPES[0], SHAPES[3]],
        causal=True,
    ),
    feature(
        "attention triangle",
        lambda batch, heads, *rest: {
            **qkv(batch, heads, *rest),
            "bias": (samples_of(batch), 1, heads, rest[1], rest[1]),
        },
        torch_triangle,
        parameter=lambda batch, heads, _, length, *dims: (
            samples_of(batch) * heads * length * length
        ),
        call=triangle,
        shapes=[PAIR_SHAPES[1], PAIR_SHAPES[0]],
        sizes=PAIR_SIZES,
        causal=False,
    ),
)
