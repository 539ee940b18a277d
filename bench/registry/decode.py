"""Steps of generation: attention over caches, and its merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fastattn
from fastattn.kernels.config import Target, cdiv
from fastattn.ops.core.catalog import Normal

from ..op import BACKWARD, FORWARD, Benchmark, Op, Shape, Traffic
from .common import STATISTIC
from .decode_rivals import OF_CACHES, OF_LATENTS, OF_PAGES

PAGE = 64

INTEGER = 4
"""Bytes of a length and of a page's number."""

# Batch, heads, key heads, keys of each sequence, and the dimensions of keys and values. A cache of
# one sequence and 1024 keys lies in L2; `--shape 1x32x8x1024x128x128` times such all the same.
SIZES = [
    (16, 32, 8, 32768, 128, 128),
    (128, 32, 8, 4096, 128, 128),
    (1, 32, 8, 131072, 128, 128),
    (8, 32, 32, 16384, 128, 128),
    (64, 8, 1, 8192, 256, 256),
    (128, 32, 8, 1024, 128, 128),
    (128, 32, 32, 1024, 128, 128),
]
# DeepSeek-V3's latents.
LATENT_SIZES = [
    (128, 128, 1, 4096, 576, 512),
    (16, 128, 1, 32768, 576, 512),
    (4, 128, 1, 131072, 576, 512),
    (256, 128, 1, 1024, 576, 512),
]
LATENT_SHAPES = [(2, 128, 1, 1024, 576, 512), (2, 16, 1, 1024, 576, 512)]
SMALL_LATENT_SIZES = [(2, 16, 1, 512, 576, 512)]
SMALL_SIZES = [(2, 8, 2, 2048, 64, 64), (1, 4, 4, 4096, 128, 128)]
SHAPES = [(2, 32, 8, 1024, dim, dim) for dim in (64, 80, 128, 256)]
SMALL = (2, 4, 2, 256, 32, 32)


def numbers(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Callable[[Any], torch.Tensor]:
    """A cache, which has no gradient."""

    def make(device: Any) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(len(shape))
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    return make


def all_of(batch: int, keys: int) -> Callable[[Any], torch.Tensor]:
    return lambda device: torch.full((batch,), keys, dtype=torch.int32, device=device)


def one_query(
    batch: int, heads: int, key_heads: int, keys: int, key_dim: int, value_dim: int
) -> dict[str, Any]:
    return {
        "q": (batch, heads, 1, key_dim),
        "k": numbers((batch, key_heads, keys, key_dim)),
        "v": numbers((batch, key_heads, keys, value_dim)),
        "lengths": all_of(batch, keys),
    }


def in_pages(
    batch: int, heads: int, key_heads: int, keys: int, key_dim: int, value_dim: int
) -> dict[str, Any]:
    """The same in pages, which lie in any order."""
    pages = batch * cdiv(keys, PAGE)

    def table(device: Any) -> torch.Tensor:
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
        return order.view(batch, -1).to(device, torch.int32)

    return {
        "q": (batch, heads, 1, key_dim),
        "k": numbers((pages, key_heads, PAGE, key_dim)),
        "v": numbers((pages, key_heads, PAGE, value_dim)),
        "lengths": all_of(batch, keys),
        "block_table": table,
    }


def of_eight_bits(
    batch: int, heads: int, key_heads: int, keys: int, key_dim: int, value_dim: int
) -> dict[str, Any]:
    """The same of float8, whose scales are numbers."""
    return {
        "q": (batch, heads, 1, key_dim),
        "k": numbers((batch, key_heads, keys, key_dim), torch.float8_e4m3fn),
        "v": numbers((batch, key_heads, keys, value_dim), torch.float8_e4m3fn),
        "lengths": all_of(batch, keys),
        "k_scale": 0.5,
        "v_scale": 2.0,
    }


def of_latents(
    batch: int, heads: int, key_heads: int, keys: int, key_dim: int, value_dim: int
) -> dict[str, Any]:
    """Keys whose first columns are the values."""
    return {
        "q": (batch, heads, 1, key_dim),
        "k": numbers((batch, key_heads, keys, key_dim)),
        "value_dim": value_dim,
        "lengths": all_of(batch, keys),
    }


def torch_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def torch_decode_in_pages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    k, v = (x[block_table.long()].transpose(1, 2).flatten(2, 3) for x in (k, v))
    return torch_decode(q, k, v, lengths)


def torch_decode_eight_bits(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    k_scale: float,
    v_scale: float,
) -> torch.Tensor:
    return torch_decode(q, k.to(q.dtype) * k_scale, v.to(q.dtype) * v_scale, lengths)


def torch_decode_latents(
    q: torch.Tensor, k: torch.Tensor, value_dim: int, lengths: torch.Tensor
) -> torch.Tensor:
    """Heads as queries beside each other: PyTorch repeats the keys of heads that share them."""
    rows = q.transpose(1, 2)
    return F.scaled_dot_product_attention(rows, k, k[..., :value_dim]).transpose(1, 2)


def decode_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """q, the lengths and the cache read, o written; for the gradient of q all of it again."""
    batch, heads, key_heads, keys, key_dim, value_dim = shape
    cache = batch * key_heads * keys * (key_dim + value_dim) * dtype.itemsize + batch * INTEGER
    forward = cache + batch * heads * (key_dim + value_dim) * dtype.itemsize
    backward = cache + batch * heads * (2 * key_dim + value_dim) * dtype.itemsize
    statistics = batch * heads * STATISTIC
    return {
        FORWARD: Traffic(forward, forward + statistics),
        BACKWARD: Traffic(backward, backward + statistics),
    }


def eight_bit_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """The same of a cache whose numbers have a byte each."""
    batch, _, key_heads, keys, key_dim, value_dim = shape
    bytes_more = dtype.itemsize - 1
    saved = -batch * key_heads * keys * (key_dim + value_dim) * bytes_more
    whole = decode_traffic(shape, dtype, target)
    return {name: each + Traffic(saved, saved) for name, each in whole.items()}


def latent_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """The same without values, which are columns of the keys."""
    batch, _, key_heads, keys, _, value_dim = shape
    values = -batch * key_heads * keys * value_dim * dtype.itemsize
    whole = decode_traffic(shape, dtype, target)
    return {name: each + Traffic(values, values) for name, each in whole.items()}


def paged_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    """The same of whole pages, with their table."""
    batch, heads, key_heads, keys, *dims = shape
    pages = cdiv(keys, PAGE)
    whole = decode_traffic((batch, heads, key_heads, pages * PAGE, *dims), dtype, target)
    table = batch * pages * INTEGER
    return {name: each + Traffic(table, table) for name, each in whole.items()}


def decode_flops(shape: Shape) -> dict[str, float]:
    batch, heads, _, keys, key_dim, value_dim = shape
    flops = 2.0 * batch * heads * keys * (key_dim + value_dim)
    return {FORWARD: flops, BACKWARD: 2 * flops}


def torch_merge(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = lse.logsumexp(0)
    return ((lse - total).exp()[..., None] * o).sum(0).to(o.dtype), total


def merge_traffic(shape: Shape, dtype: torch.dtype, target: Target) -> dict[str, Traffic]:
    parts, rows, cols = shape
    row, matrix = rows * STATISTIC, rows * cols * dtype.itemsize
    forward = (parts + 1) * (matrix + row)
    # do, dlse and lse read, and all parts, twice where they need two loads; their gradients written
    backward = (2 * parts + 1) * matrix + (2 * parts + 2) * row
    return {
        FORWARD: Traffic(forward, forward),
        BACKWARD: Traffic(backward, backward + parts * (matrix + row)),
    }


def decode(
    name: str,
    arguments: Callable[..., dict[str, Any]],
    contender: Any,
    traffic: Any,
    rivals: dict[str, Callable[[], Callable[..., Any]]],
) -> Op:
    return Op(
        name,
        fastattn.decode_attention,
        arguments,
        shapes=SHAPES,
        quick_shapes=SHAPES[2:3],
        small=SMALL,
        dtypes=(torch.bfloat16,),
        torch=contender,
        benchmark=Benchmark(
            SIZES,
            SMALL_SIZES,
            traffic,
            rivals,
            frozenset(rivals),
            flops=decode_flops,
            by_kernels=False,
        ),
    )


OPS = (
    decode("decode_attention", one_query, torch_decode, decode_traffic, OF_CACHES),
    decode(
        "decode_attention, pages",
        in_pages,
        torch_decode_in_pages,
        paged_traffic,
        OF_PAGES,
    ),
    decode(
        "decode_attention, float8", of_eight_bits, torch_decode_eight_bits, eight_bit_traffic, {}
    ),
    Op(
        "decode_attention, latents",
        fastattn.decode_attention,
        of_latents,
        shapes=LATENT_SHAPES,
        quick_shapes=LATENT_SHAPES[:1],
        small=(2, 4, 1, 64, 40, 32),
        dtypes=(torch.bfloat16,),
        torch=torch_decode_latents,
        benchmark=Benchmark(
            LATENT_SIZES,
            SMALL_LATENT_SIZES,
            latent_traffic,
            OF_LATENTS,
            frozenset(OF_LATENTS),
            flops=decode_flops,
            by_kernels=False,
            # The reference has the keys once for each of their heads.
            in_float64=lambda shape: shape[0] * shape[1] * shape[3] * shape[4] < 2**28,
        ),
    ),
    Op(
        "merge_attention",
        fastattn.merge_attention,
        lambda parts, rows, cols: {
            "o": (parts, rows, cols),
            "lse": Normal((parts, rows), torch.float32),
        },
        shapes=[(2, 4096, 128), (8, 4096, 80), (64, 256, 128), (2, 4096, 576)],
        quick_shapes=[(2, 4096, 128), (64, 256, 128)],
        small=(2, 8, 64),
        torch=torch_merge,
        benchmark=Benchmark(
            [(2, 2**18, 128), (8, 2**17, 128), (4, 2**16, 512)],
            [(2, 4096, 64), (8, 512, 128)],
            merge_traffic,
        ),
    ),
)
