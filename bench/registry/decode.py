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

PAGE = 64

INTEGER = 4
"""Bytes of a length and of a page's number."""

# Batch, heads, key heads, keys of each sequence, and the dimensions of keys and values.
SIZES = [
    (16, 32, 8, 32768, 128, 128),
    (128, 32, 8, 4096, 128, 128),
    (1, 32, 8, 131072, 128, 128),
    (8, 32, 32, 16384, 128, 128),
    (64, 8, 1, 8192, 256, 256),
]
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


def decode(name: str, arguments: Callable[..., dict[str, Any]], contender: Any, traffic: Any) -> Op:
    return Op(
        name,
        fastattn.decode_attention,
        arguments,
        shapes=SHAPES,
        quick_shapes=SHAPES[2:3],
        small=SMALL,
        dtypes=(torch.bfloat16,),
        torch=contender,
        benchmark=Benchmark(SIZES, SMALL_SIZES, traffic, flops=decode_flops, by_kernels=False),
    )


OPS = (
    decode("decode_attention", one_query, torch_decode, decode_traffic),
    decode("decode_attention, pages", in_pages, torch_decode_in_pages, paged_traffic),
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
