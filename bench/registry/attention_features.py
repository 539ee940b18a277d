"""Attention with what learns or drops: biases, sinks, dropout, documents, and block masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.kernels.attention.config import attention_queries_backward_config
from fastattn.ops.core.catalog import Normal

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic
from .attention import (
    GROUPED_SIZES,
    QUICK_SHAPES,
    SHAPES,
    SIZES,
    SMALL,
    SMALL_SIZES,
    attention_flops,
    attention_traffic,
    fits_in_float64,
    qkv,
    torch_attention,
    window_of,
)
from .common import SEED

# Rows or templates of a pair representation: many short sequences that share a bias.
PAIR_SIZES = [(512, 4, 4, 384, 32, 32), (128, 8, 8, 512, 64, 64)]
PAIR_SHAPES = [(32, 4, 4, 384, dim, dim) for dim in (32, 64, 128, 256)]

BUCKETS = 32
DROPPED = 0.1
BLOCK = 128
DENSITY = 0.1


def flex(compiled: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    return compiled(q, k, v, enable_gqa=True, **options)


def flex_with_bias() -> Callable[..., Any]:
    """FlexAttention with a bias that it reads, and whose gradient it adds up by atomics."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> Any:
        of_batch, of_head = bias.shape[0] > 1, bias.shape[1] > 1

        def added(score: Any, b: Any, h: Any, m: Any, n: Any) -> Any:
            return score + bias[b if of_batch else 0, h if of_head else 0, m, n]

        return flex(compiled, q, k, v, score_mod=added)

    return attention


def torch_bias(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return torch_attention(q, k, v, mask=bias)


def relative_bias_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """Attention with T5's bias from its table (buckets, H)."""
    return fastattn.attention(q, k, v, relative_bias=fastattn.RelativeBias(table))


def torch_relative_bias(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor
) -> torch.Tensor:
    """The bias as a tensor (1, H, M, N), as Hugging Face makes it."""
    lookup = fastattn.RelativeBias(table).tensors[1][0, 0].long()
    reach = lookup.numel() // 2
    m, n = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    distance = (n - m[:, None]).clamp(-reach, reach) + reach
    return torch_attention(q, k, v, mask=table[lookup[distance]].movedim(-1, 0)[None])


def torch_sinks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int, sinks: Any
) -> torch.Tensor:
    """Scores in full, with the sink as one more column, as Hugging Face's gpt-oss has it."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    keep = keep.tril().triu(-window) if causal else keep
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, float("-inf"))
    column = sinks[:, None, None].expand(*scores.shape[:3], 1).to(scores.dtype)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v


def dropout_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention with dropout of its weights."""
    return fastattn.attention(q, k, v, causal=True, dropout_p=DROPPED, dropout_seed=seed)


def torch_dropout(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """PyTorch's own random numbers, which no seed tensor decides upon."""
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, dropout_p=DROPPED, enable_gqa=True
    )


def torch_documents(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, document_ids: torch.Tensor
) -> torch.Tensor:
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return torch_attention(q, k, v, mask=same.tril() if causal else same)


def torch_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: fastattn.BlockMask
) -> torch.Tensor:
    m, n = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    return torch_attention(q, k, v, mask=block_mask.keep(m[:, None], n, q.shape[2], k.shape[2]))


def torch_weights(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q @ k.mT * q.shape[-1] ** -0.5 - lse[..., None]).exp().to(q.dtype)


def flex_with_documents() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, document_ids: torch.Tensor
    ) -> Any:
        def seen(b: Any, h: Any, m: Any, n: Any) -> Any:
            same = document_ids[b, m] == document_ids[b, n]
            return same & (m >= n) if causal else same

        mask = create_block_mask(
            seen, q.shape[0], None, q.shape[2], k.shape[2], device=str(q.device)
        )
        return flex(compiled, q, k, v, block_mask=mask)

    return attention


def flex_with_blocks() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    made: dict[int, Any] = {}

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: fastattn.BlockMask
    ) -> Any:
        if id(block_mask) not in made:
            made[id(block_mask)] = create_block_mask(
                lambda b, h, m, n: block_mask.tensors[4][0, 0, m // BLOCK, n // BLOCK],
                None,
                None,
                q.shape[2],
                k.shape[2],
                device=str(q.device),
            )
        return flex(compiled, q, k, v, block_mask=made[id(block_mask)])

    return attention


def documents(batch: int, length: int) -> Callable[[Any], torch.Tensor]:
    """Documents of an eighth of the length and more, one after another."""

    def make(device: Any) -> torch.Tensor:
        place = torch.arange(length, device=device)
        return (place * 8 // length).clamp(min=1).expand(batch, length).contiguous()

    return make


def few_blocks(length: int) -> Callable[[Any], fastattn.BlockMask]:
    """The diagonal and one block of ten."""

    def make(device: Any) -> fastattn.BlockMask:
        blocks = -(-length // BLOCK)
        generator = torch.Generator(device).manual_seed(0)
        table = torch.rand(blocks, blocks, generator=generator, device=device) < DENSITY
        return fastattn.BlockMask(table | torch.eye(blocks, dtype=torch.bool, device=device), BLOCK)

    return make


def with_parameter(
    shape: Shape,
    dtype: torch.dtype,
    target: Any,
    *,
    parameter: Callable[..., int],
    constant: Callable[..., int],
    **seen: Any,
) -> dict[str, Traffic]:
    """Attention's bytes, those of a parameter of so many numbers, and so many bytes besides."""
    moved = attention_traffic(shape, dtype, target, **seen)
    # Documents are no packed sequences: what is least is that of one sequence.
    whole = attention_traffic(shape, dtype, target, **{**seen, "parts": 1})
    size, read = parameter(*shape) * dtype.itemsize, constant(*shape)

    def both(direction: str, added: int) -> Traffic:
        least = whole[direction].least + added
        return Traffic(least, max(least, moved[direction].moved + added))

    return {FORWARD: both(FORWARD, size + read), BACKWARD: both(BACKWARD, 2 * size + read)}


def weights_traffic(shape: Shape, dtype: torch.dtype, target: Any) -> dict[str, Traffic]:
    """q, k, the lse and all weights once; PyTorch's backward goes over the weights often."""
    batch, heads, key_heads, length, key_dim, _ = shape
    given = batch * (heads + key_heads) * length * key_dim * dtype.itemsize
    lse = 4 * batch * heads * length
    weights = batch * heads * length * length * dtype.itemsize
    # Every tile of queries reads all keys again.
    rows = attention_queries_backward_config(
        key_dim, key_dim, dtype, "ieee", "plain", target
    ).block_m
    again = batch * heads * -(-length // rows) * length * key_dim * dtype.itemsize
    least = given + lse + weights
    return {
        FORWARD: Traffic(least, least + again),
        BACKWARD: Traffic(2 * given + 2 * lse + weights, 2 * given + 2 * lse + 8 * weights),
    }


def feature(
    name: str,
    arguments: Callable[..., dict[str, Any]],
    by_torch: Callable[..., Any],
    rivals: dict[str, Callable[[], Callable[..., Any]]] | None = None,
    *,
    parameter: Callable[..., int] = lambda *shape: 0,
    constant: Callable[..., int] = lambda *shape: 0,
    call: Callable[..., Any] = fastattn.attention,
    shapes: list[Shape] | None = None,
    sizes: list[Shape] | None = None,
    quick: bool = True,
    random: bool = False,
    **seen: Any,
) -> Op:
    return Op(
        name,
        call,
        arguments,
        shapes=SHAPES if shapes is None else shapes,
        quick_shapes=[] if not quick else QUICK_SHAPES if shapes is None else shapes[1:2],
        small=SMALL,
        dtypes=(torch.bfloat16,),
        torch=by_torch,
        benchmark=Benchmark(
            SIZES[:2] if sizes is None else sizes,
            SMALL_SIZES,
            partial(with_parameter, parameter=parameter, constant=constant, **seen),
            rivals or {},
            flops=partial(attention_flops, **seen),
            random=random,
            # Parts of the parameters' gradients are summed between launches, lists made before.
            by_kernels=False,
            in_float64=fits_in_float64,
        ),
    )


OPS = (
    feature(
        "attention bias of heads",
        lambda batch, heads, *rest: {
            **qkv(batch, heads, *rest),
            "bias": (1, heads, rest[1], rest[1]),
        },
        torch_bias,
        {"FlexAttention": flex_with_bias},
        parameter=lambda batch, heads, _, length, *dims: heads * length * length,
        shapes=PAIR_SHAPES,
        sizes=PAIR_SIZES,
        causal=False,
    ),
    feature(
        "attention bias of batch elements",
        lambda batch, heads, *rest: {
            **qkv(batch, heads, *rest),
            "bias": (batch, 1, rest[1], rest[1]),
        },
        torch_bias,
        {"FlexAttention": flex_with_bias},
        parameter=lambda batch, heads, _, length, *dims: batch * length * length,
        quick=False,
        shapes=PAIR_SHAPES,
        sizes=PAIR_SIZES,
        causal=False,
    ),
    feature(
        "attention relative bias",
        lambda batch, heads, *rest: {**qkv(batch, heads, *rest), "table": (BUCKETS, heads)},
        torch_relative_bias,
        parameter=lambda batch, heads, *rest: BUCKETS * heads,
        call=relative_bias_attention,
        # T5's heads have 64 columns, or 128. Wider ones spill on gfx1100, up to 1080 bytes.
        shapes=[shape for shape in SHAPES if shape[4] <= 128],
        sizes=[(64, 12, 12, 512, 64, 64), (16, 16, 16, 2048, 64, 64)],
        causal=False,
    ),
    feature(
        "attention sinks window",
        lambda *shape: {
            **qkv(*shape),
            "causal": True,
            "window": window_of(shape[3]),
            "sinks": (shape[1],),
        },
        torch_sinks,
        parameter=lambda batch, heads, *rest: heads,
        sizes=GROUPED_SIZES,
        quick=False,
        causal=True,
        windowed=True,
    ),
    feature(
        "attention dropout",
        qkv,
        torch_dropout,
        constant=lambda *shape: SEED,
        call=dropout_attention,
        random=True,
        causal=True,
    ),
    feature(
        "attention documents",
        lambda *shape: {
            **qkv(*shape),
            "causal": True,
            "document_ids": documents(shape[0], shape[3]),
        },
        torch_documents,
        {"FlexAttention": flex_with_documents},
        constant=lambda batch, heads, key_heads, length, *dims: 8 * batch * length,
        causal=True,
        parts=8,
    ),
    Op(
        "attention_weights",
        fastattn.attention_weights,
        lambda batch, heads, key_heads, length, key_dim, _: {
            "q": (batch, heads, length, key_dim),
            "k": (batch, key_heads, length, key_dim),
            "lse": Normal((batch, heads, length), torch.float32, mean=8.0),
        },
        shapes=SHAPES,
        quick_shapes=[],
        small=SMALL,
        dtypes=(torch.bfloat16,),
        torch=torch_weights,
        benchmark=Benchmark(
            [(2, 16, 16, 2048, 64, 64), (4, 16, 2, 2048, 128, 128)],
            SMALL_SIZES,
            weights_traffic,
            by_kernels=False,
            in_float64=fits_in_float64,
        ),
    ),
    feature(
        "attention block mask",
        lambda *shape: {**qkv(*shape), "block_mask": few_blocks(shape[3])},
        torch_blocks,
        {"FlexAttention": flex_with_blocks},
        quick=False,
        causal=False,
    ),
)
