"""Attention: by causal order, whole, in a window, under a mask, and of packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.kernels.attention.config import (
    AttentionConfig,
    attention_forward_config,
    attention_keys_backward_config,
    attention_queries_backward_config,
)
from fastattn.kernels.config import Target, cdiv

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic
from .common import STATISTIC

SEQUENCES = 4
WIDEST_WINDOW = 1024

# Batch, heads, key heads, length, and the dimensions of keys and values: 16K tokens, 2048 columns.
SIZES = [
    *((16384 // length, 16, 16, length, 128, 128) for length in (8192, 2048, 512)),
    (2, 32, 32, 8192, 64, 64),
    (2, 8, 8, 8192, 256, 256),
    (2, 16, 2, 8192, 128, 128),
    (1, 16, 16, 32768, 128, 128),
]
GROUPED_SIZES = [(2, 16, 2, 8192, 128, 128), (8, 32, 4, 2048, 64, 64)]
SMALL_SIZES = [(1, 4, 4, 512, 64, 64), (1, 4, 1, 256, 128, 128)]

HEAD_DIMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
SHAPES = [(2, 8, 8, 2048, key_dim, value_dim) for key_dim, value_dim in HEAD_DIMS]
QUICK_SHAPES = [(2, 8, 8, 2048, 128, 128)]
SMALL = (1, 2, 1, 72, 32, 32)


def qkv(
    batch: int, heads: int, key_heads: int, length: int, key_dim: int, value_dim: int
) -> dict[str, Any]:
    return {
        "q": (batch, heads, length, key_dim),
        "k": (batch, key_heads, length, key_dim),
        "v": (batch, key_heads, length, value_dim),
    }


def window_of(length: int) -> int:
    """The keys before its own that a query sees in a window: half of a short length."""
    return min(WIDEST_WINDOW, length // 2)


def some_keys(length: int) -> Callable[[Any], torch.Tensor]:
    """A mask that leaves every query nine keys of ten, its own among them."""

    def make(device: Any) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(0)
        keep = torch.rand(1, 1, length, length, generator=generator, device=device) < 0.9
        return keep | torch.eye(length, dtype=torch.bool, device=device)

    return make


def packed(
    batch: int, heads: int, key_heads: int, length: int, key_dim: int, value_dim: int
) -> dict[str, Any]:
    """Sequences of an equal part of the length each."""
    tokens, part = batch * length, length // SEQUENCES

    def cumulative(device: Any) -> torch.Tensor:
        ends = [min(at, tokens) for at in range(0, tokens, part)]
        return torch.tensor([*ends, tokens], dtype=torch.int32, device=device)

    return {
        "q": (tokens, heads, key_dim),
        "k": (tokens, key_heads, key_dim),
        "v": (tokens, key_heads, value_dim),
        "cu_seqlens_q": cumulative,
        "cu_seqlens_k": cumulative,
        "max_seqlen_q": part,
        "max_seqlen_k": part,
        "causal": True,
    }


def torch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)


def torch_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int
) -> torch.Tensor:
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    return torch_attention(q, k, v, mask=keep.tril().triu(-window) if causal else keep)


def torch_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
) -> torch.Tensor:
    """One sequence after another."""
    lengths = cu_seqlens_q.diff().tolist()
    parts = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
    return torch.cat([torch_attention(*part, causal=causal) for part in parts], 2)[0].transpose(
        0, 1
    )


def by_backend(backend: SDPBackend) -> Callable[[], Callable[..., Any]]:
    """PyTorch's attention by one of its backends alone."""

    def attention(**arguments: Any) -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch_attention(**arguments)

    return lambda: attention


def flex_attention() -> Callable[..., Any]:
    """PyTorch's FlexAttention, compiled, its block mask made once a length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    made: dict[tuple, Any] = {}

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        mask: torch.Tensor | None = None,
        window: int | None = None,
    ) -> Any:
        def seen(b: Any, h: Any, m: Any, n: Any) -> Any:
            keep = m >= n if causal else n >= 0
            if window is not None:
                keep = keep & (m - n <= window)
            return keep if mask is None else keep & mask[0, 0, m, n]

        block_mask = None
        if causal or window is not None or mask is not None:
            key = (q.shape[2], k.shape[2], q.device)
            if key not in made:
                made[key] = create_block_mask(
                    seen, None, None, q.shape[2], k.shape[2], device=str(q.device)
                )
            block_mask = made[key]
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=True)

    return attention


def flash_attention() -> Callable[..., Any]:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        window: int | None = None,
    ) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        reach = (-1 if window is None else window, -1)
        return flash_attn_func(q, k, v, causal=causal, window_size=reach).transpose(1, 2)

    return attention


def flash_attention_varlen() -> Callable[..., Any]:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func


SDPA = {
    "cuDNN": by_backend(SDPBackend.CUDNN_ATTENTION),
    "flash": by_backend(SDPBackend.FLASH_ATTENTION),
    "efficient": by_backend(SDPBackend.EFFICIENT_ATTENTION),
}
RIVALS = SDPA | {"FlexAttention": flex_attention, "flash-attn": flash_attention}


def pairs_of(shape: Shape, *, causal: bool, windowed: bool = False, parts: int = 1) -> float:
    """The queries and keys that see each other, over all heads."""
    batch, heads, _, length, _, _ = shape
    own = length // parts
    seen = own * own
    if causal:
        seen = own * (own + 1) // 2
    if windowed:
        window = window_of(own)
        # The first queries see all before them, the later ones a window and themselves.
        seen = window * (window + 1) // 2 + (own - window) * (window + 1)
    return float(batch * heads * parts * seen)


def attention_flops(shape: Shape, **seen: Any) -> dict[str, float]:
    """Two products forward; backward five, of which the kernels here do seven."""
    *_, key_dim, value_dim = shape
    pairs = pairs_of(shape, **seen)
    return {
        FORWARD: 2.0 * pairs * (key_dim + value_dim),
        BACKWARD: 2.0 * pairs * (3 * key_dim + 2 * value_dim),
    }


def attention_traffic(
    shape: Shape,
    dtype: torch.dtype,
    target: Target,
    *,
    causal: bool,
    windowed: bool = False,
    parts: int = 1,
    masked: bool = False,
) -> dict[str, Traffic]:
    """Attention of as many queries as keys; with `masked` under a mask that all heads share.

    `parts` is how many packed sequences the length has.
    """
    batch, heads, key_heads, length, key_dim, value_dim = shape
    sequences, own = batch * parts, length // parts
    window = window_of(length) if windowed else None
    size = dtype.itemsize
    queries = sequences * own * heads
    q, o = queries * key_dim * size, queries * value_dim * size
    k, v = (sequences * own * key_heads * dim * size for dim in (key_dim, value_dim))
    statistics = queries * STATISTIC
    mask = length * length * masked
    lengths = 2 * 4 * (sequences + 1) * (parts > 1)
    term_class = "tensor" if masked else "index" if windowed else "plain"
    features = (key_dim, value_dim, dtype, "ieee", term_class)

    def keys_read(config: AttentionConfig) -> int:
        """The bytes of keys and values that all tiles of queries read."""
        seen = sum(end - first for first, end in _keys_seen(config, own, causal, window))
        return sequences * heads * seen * (key_dim + value_dim) * size

    forward = q + o + statistics + keys_read(attention_forward_config(*features, target))
    by_queries = attention_queries_backward_config(*features, target)
    by_keys = attention_keys_backward_config(*features, target)
    # lse is read, and comes out as the other kernels take it, beside delta.
    delta = 2 * o + 3 * statistics
    dq = 2 * q + o + 2 * statistics + keys_read(by_queries)
    seen = sum(end - first for first, end in _queries_seen(by_keys, own, causal, window))
    dkv = 2 * (k + v) + sequences * heads * seen * ((key_dim + value_dim) * size + 2 * STATISTIC)
    read_masks = masked * sequences * heads * own * own
    least = q + k + v + o + mask + lengths
    return {
        FORWARD: Traffic(least, forward + read_masks + lengths),
        BACKWARD: Traffic(
            2 * (q + k + v) + o + mask, delta + dq + dkv + 2 * read_masks + 2 * lengths
        ),
    }


def _keys_seen(
    config: AttentionConfig, length: int, causal: bool, window: int | None
) -> Iterator[tuple[int, int]]:
    """The keys that each tile of queries reads."""
    for first in range(0, length, config.block_m):
        last = min(first + config.block_m, length) - 1
        begin = 0 if window is None else max(0, first - window)
        yield begin, last + 1 if causal else length


def _queries_seen(
    config: AttentionConfig, length: int, causal: bool, window: int | None
) -> Iterator[tuple[int, int]]:
    """The queries that each tile of keys reads, from the first of a block on."""
    for first in range(0, length, config.block_n):
        last = min(first + config.block_n, length) - 1
        begin = first // config.block_m * config.block_m if causal else 0
        end = length
        if window is not None:
            blocks = cdiv(last + window + 1 - begin, config.block_m)
            end = min(length, begin + blocks * config.block_m)
        yield begin, end


def fits_in_float64(shape: Shape) -> bool:
    """Whether the scores of all queries and keys do."""
    batch, heads, _, length, _, _ = shape
    return batch * heads * length * length <= 2**30


def attention(
    name: str,
    arguments: Callable[..., dict[str, Any]],
    rivals: dict[str, Callable[[], Callable[..., Any]]],
    *,
    sizes: list[Shape],
    call: Callable[..., Any] = fastattn.attention,
    by_torch: Callable[..., Any] = torch_attention,
    goal: Callable[[str, Shape], float | None] = lambda direction, shape: None,
    masked: bool = False,
    quick_shapes: list[Shape] | None = None,
    **seen: Any,
) -> Op:
    return Op(
        name,
        call,
        arguments,
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES if quick_shapes is None else quick_shapes,
        small=SMALL,
        dtypes=(torch.bfloat16,),
        torch=by_torch,
        benchmark=Benchmark(
            sizes,
            SMALL_SIZES,
            partial(attention_traffic, masked=masked, **seen),
            rivals,
            flops=partial(attention_flops, **seen),
            goal=goal,
            in_float64=fits_in_float64,
        ),
    )


OPS = (
    attention(
        "attention causal",
        lambda *shape: {**qkv(*shape), "causal": True},
        RIVALS,
        sizes=SIZES,
        causal=True,
    ),
    attention("attention full", qkv, RIVALS, sizes=SIZES, quick_shapes=[], causal=False),
    attention(
        "attention window",
        lambda *shape: {**qkv(*shape), "causal": True, "window": window_of(shape[3])},
        {"FlexAttention": flex_attention, "flash-attn": flash_attention},
        sizes=SIZES[:2],
        by_torch=torch_window,
        quick_shapes=[],
        causal=True,
        windowed=True,
    ),
    attention(
        "attention mask GQA",
        lambda *shape: {**qkv(*shape), "mask": some_keys(shape[3])},
        {"efficient": SDPA["efficient"], "FlexAttention": flex_attention},
        sizes=GROUPED_SIZES,
        masked=True,
        causal=False,
    ),
    attention(
        "attention_varlen",
        packed,
        {"flash-attn": flash_attention_varlen},
        sizes=SIZES[:2],
        call=fastattn.attention_varlen,
        by_torch=torch_varlen,
        quick_shapes=[],
        causal=True,
        parts=SEQUENCES,
    ),
    Op(
        "attention softcap ALiBi",
        fastattn.attention,
        lambda *shape: {
            **qkv(*shape),
            "causal": True,
            "softcap": 30.0,
            "alibi_slopes": lambda device: fastattn.alibi_slopes(shape[1]).to(device),
        },
        shapes=SHAPES,
        quick_shapes=QUICK_SHAPES,
        small=SMALL,
        dtypes=(torch.bfloat16,),
    ),
)
