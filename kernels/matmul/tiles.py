"""What a program of a product does with one tile; the names are those of matmul.py."""

import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible, dot
from .epilogue import finish


@triton.jit
def tile_place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The row and column of a tile: down GROUP_M tiles, then to the next column of tiles."""
    group_size = GROUP_M * tiles_n
    first_m = tile // group_size * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + tile % group_size % height, tile % group_size // height


@triton.jit
def spaced(stride, UNIT: tl.constexpr, DIVISOR: tl.constexpr):
    """A stride as the compiler should see it: 1, or a multiple of DIVISOR."""
    if UNIT:
        return 1
    else:
        return divisible(stride, DIVISOR)


@triton.jit
def sum_products(
    a_ptr,
    b_ptr,
    a_offsets,
    b_offsets,
    mask_m,
    mask_n,
    stride_ak,
    stride_bk,
    k,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum over k of one tile's products, (BLOCK_M, BLOCK_N)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    step_a = tl.full([], BLOCK_K, tl.int64) * stride_ak
    step_b = tl.full([], BLOCK_K, tl.int64) * stride_bk
    steps = k // BLOCK_K
    # Not what the loop leaves behind: Triton 3.6 fails on pointers out of a pipelined loop for AMD.
    a_tail_ptr = a_ptr + steps * step_a
    b_tail_ptr = b_ptr + steps * step_b
    for _ in range(steps):
        a = tl.load(a_ptr + a_offsets, mask_m, other=0.0)  # (BLOCK_M, BLOCK_K)
        b = tl.load(b_ptr + b_offsets, mask_n, other=0.0)  # (BLOCK_K, BLOCK_N)
        acc = dot(a, b, acc, PRECISION)
        a_ptr += step_a
        b_ptr += step_b
    if TAIL:
        # Apart from the loop, which then needs no mask along k.
        left = k % BLOCK_K
        if left > 0:
            offs_k = tl.arange(0, BLOCK_K)
            a = tl.load(a_tail_ptr + a_offsets, mask_m & (offs_k < left)[None, :], other=0.0)
            b = tl.load(b_tail_ptr + b_offsets, mask_n & (offs_k < left)[:, None], other=0.0)
            acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def compute_tile(
    tile,
    part,
    a_ptr,
    b_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    pre_ptr,
    stride_a_outer,
    stride_a_inner,
    stride_am,
    stride_ak,
    stride_b_outer,
    stride_b_inner,
    stride_bk,
    stride_bn,
    stride_rm,
    inner,
    m,
    n,
    k,
    splits,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TAIL: tl.constexpr,
    FAR_APART: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one matrix of the batch, or its split, `part` counting the splits of all."""
    ACC: tl.constexpr = accumulator_dtype(a_ptr)
    tile_m, tile_n = tile_place(tile, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # What is left of the matrix from the tile's corner on.
    mask_m = (offs_m < m - first_m)[:, None]
    mask_n = (offs_n < n - first_n)[None, :]
    if FAR_APART:
        offs_m = offs_m.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)

    matrix = part.to(tl.int64)
    if SPLIT:
        matrix = matrix // splits
    a_ptr += matrix // inner * stride_a_outer + matrix % inner * stride_a_inner
    b_ptr += matrix // inner * stride_b_outer + matrix % inner * stride_b_inner
    a_ptr += first_m * stride_am
    b_ptr += first_n * stride_bn
    if SPLIT:
        share = tl.cdiv(tl.cdiv(k, BLOCK_K), splits) * BLOCK_K
        first_k = part % splits * share
        a_ptr += first_k.to(tl.int64) * stride_ak
        b_ptr += first_k.to(tl.int64) * stride_bk
        k = tl.maximum(0, tl.minimum(k - first_k, share))
    acc = sum_products(
        a_ptr,
        b_ptr,
        offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak,
        offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn,
        mask_m,
        mask_n,
        stride_ak,
        stride_bk,
        k,
        ACC,
        PRECISION,
        TAIL,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    corner = first_m * n + first_n
    if residual_ptr is not None:
        residual_ptr += first_m * stride_rm + first_n
    if pre_ptr is not None:
        pre_ptr += corner
    if bias_ptr is not None:
        bias_ptr += first_n
    finish(
        acc,
        bias_ptr,
        residual_ptr,
        out_ptr + part.to(tl.int64) * m * n + corner,
        pre_ptr,
        offs_m[:, None] * stride_rm + offs_n[None, :],
        offs_m[:, None] * n + offs_n[None, :],
        offs_n,
        mask_m & mask_n,
        n - first_n,
        ACTIVATION,
    )
