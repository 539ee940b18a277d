r"""Gradients of what experts share: sums over the rows of each expert.

With dy (M, N) and x (M, K), rows sorted by expert (see groups.py), each perhaps gathered:

    dW_e = sum_r dy_r^T x_r   (E, N, K),        db_e = sum_r s_r dy_r   (E, N)

One program owns a tile of an expert's result and adds its rows up in their order, so that the bits
are the same every time. An expert without rows gets zeros. Sums are in float32 (float64 for
float64), and rounded once.
"""

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible, dot
from ..config import cdiv, find_target
from ..launch import common_divisor, flatten_rows, launchable
from ..matmul.config import block_k_of_single_elements, loads_single_elements
from ..matmul.tiles import FAR, choose_tile, make_cut, number_elements, store_tile
from ..structures import Rows, make_rows, restore_rows
from .config import ExpertsConfig, experts_config
from .groups import find_expert_rows


@triton.jit
def load_features(
    x, index_ptr, first, end, first_col, cols, ACROSS: tl.constexpr, BLOCK_N: tl.constexpr, CUT
):
    """Columns of the rows from `first` on: (rows, BLOCK_N) or, ACROSS, (BLOCK_N, rows)."""
    BLOCK_K: tl.constexpr = CUT.block_k
    there = tl.arange(0, BLOCK_K) < end - first
    offs_n = tl.arange(0, BLOCK_N)
    pointer = x.pointer + first_col
    if index_ptr is None:
        offs_k = number_elements(BLOCK_K, CUT.far_apart) * x.stride
        pointer += first * x.stride
    else:
        place = index_ptr + first + tl.arange(0, BLOCK_K)
        offs_k = tl.load(place, there, other=0).to(tl.int64) * x.stride
    mask_n = offs_n < cols - first_col
    if ACROSS:
        places = pointer + (offs_n[:, None] + offs_k[None, :])
        return tl.load(places, mask_n[:, None] & there[None, :], other=0.0)
    else:
        places = pointer + (offs_k[:, None] + offs_n[None, :])
        return tl.load(places, there[:, None] & mask_n[None, :], other=0.0)


@launchable
@triton.jit(do_not_specialize=["rows"])
def grouped_weight_kernel(
    dy_view: Rows,
    x_view: Rows,
    dy_index_ptr,
    x_index_ptr,
    offsets_ptr,
    out_ptr,
    rows,
    n,
    k,
    DIVISOR: tl.constexpr,
    CUT: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of an expert's (N, K)."""
    BLOCK_M: tl.constexpr = CUT.block_m
    PRECISION: tl.constexpr = CUT.precision
    BLOCK_N: tl.constexpr = CUT.block_n
    n = divisible(n, DIVISOR)
    k = divisible(k, DIVISOR)
    tiles = tl.cdiv(n, BLOCK_M) * tl.cdiv(k, BLOCK_N)
    program = tl.program_id(0)
    expert = (program // tiles).to(tl.int64)
    tile = choose_tile(program % tiles, n, k, CUT)
    start, end = find_expert_rows(expert, offsets_ptr, rows)
    dy, x = restore_rows(dy_view, DIVISOR), restore_rows(x_view, DIVISOR)
    acc = tl.zeros((BLOCK_M, BLOCK_N), accumulator_dtype(dy.pointer))
    for first in range(start, end, CUT.block_k):
        a = load_features(dy, dy_index_ptr, first, end, tile.first_m, n, True, BLOCK_M, CUT)
        b = load_features(x, x_index_ptr, first, end, tile.first_n, k, False, BLOCK_N, CUT)
        acc = dot(a, b, acc, PRECISION)
    store_tile(out_ptr + expert * n * k, k, tile, acc, CUT.far_apart)


def grouped_weight_gradient(
    dy: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    dy_index: torch.Tensor | None,
    x_index: torch.Tensor | None,
    tf32: int,
    config: ExpertsConfig | None = None,
) -> torch.Tensor:
    """Launch dW (E, N, K) of dy (M, N) and x (M, K), or of the rows that an index names.

    `config` is what is used instead of what the rule or a table says.
    """
    n, k, experts = dy.shape[1], x.shape[1], offsets.shape[0] - 1
    out = torch.empty(experts, n, k, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = dy.shape[0] if dy_index is None else dy_index.shape[0]
    target, dtype, precision = find_target(x), str(x.dtype)[6:], "tf32" if tf32 else "ieee"
    sizes = (rows, experts, n, k, dtype, precision, target)
    config = config or experts_config("grouped_weight", *sizes)
    dy, stride_dym = flatten_rows(dy, n)
    x, stride_xm = flatten_rows(x, k)
    divisor = common_divisor(n, k, stride_dym, stride_xm)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    if loads_single_elements(divisor, x.element_size(), target):
        block_k = block_k_of_single_elements(block_m + block_n, block_k, config.num_warps, target)
    reach = max(max(stride_dym, stride_xm) * block_k, k * block_m)
    blocks = (block_m, block_n, block_k, config.group_m)
    grouped_weight_kernel.launch(
        (experts * cdiv(n, block_m) * cdiv(k, block_n),),
        dy_view=make_rows(dy, stride_dym),
        x_view=make_rows(x, stride_xm),
        dy_index_ptr=dy_index,
        x_index_ptr=x_index,
        offsets_ptr=offsets.contiguous(),
        out_ptr=out,
        rows=rows,
        n=n,
        k=k,
        DIVISOR=divisor,
        CUT=make_cut(*blocks, precision, True, reach >= FAR),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@launchable
@triton.jit(do_not_specialize=["rows"])
def grouped_bias_kernel(
    dy_view: Rows,
    index_ptr,
    scale_ptr,
    scale_index_ptr,
    offsets_ptr,
    out_ptr,
    rows,
    n,
    DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program BLOCK_N columns of an expert's sum, BLOCK_M rows at a time."""
    n = divisible(n, DIVISOR)
    tiles = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    expert = (program // tiles).to(tl.int64)
    offs_n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    start, end = find_expert_rows(expert, offsets_ptr, rows)
    dy = restore_rows(dy_view, DIVISOR)
    ACC: tl.constexpr = accumulator_dtype(dy.pointer)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for first in range(start, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        there = row < end
        source = row
        if index_ptr is not None:
            source = tl.load(index_ptr + row, there, other=0).to(tl.int64)
        places = dy.pointer + (source * dy.stride)[:, None] + offs_n[None, :]
        block = tl.load(places, there[:, None] & (offs_n < n)[None, :], other=0.0).to(ACC)
        if scale_ptr is not None:
            place = tl.load(scale_index_ptr + row, there, other=0).to(tl.int64)
            block *= tl.load(scale_ptr + place, there, other=0.0).to(ACC)[:, None]
        acc += block
    tl.store(
        out_ptr + expert * n + offs_n,
        tl.sum(acc, 0).to(out_ptr.dtype.element_ty),
        offs_n < n,
    )


BIAS_TILE = 2048
"""Elements that a program adds to its sums at once."""


def grouped_bias_gradient(
    dy: torch.Tensor,
    offsets: torch.Tensor,
    index: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_index: torch.Tensor | None,
) -> torch.Tensor:
    """Launch db (E, N) of dy (M, N), or of the rows that an index names.

    Row r counts scale[scale_index[r]] times, where there are scales, of one dimension.
    """
    n, experts = dy.shape[1], offsets.shape[0] - 1
    out = torch.empty(experts, n, dtype=dy.dtype, device=dy.device)
    if out.numel() == 0:
        return out
    dy, stride_dym = flatten_rows(dy, n)
    block_n = max(16, min(128, triton.next_power_of_2(n)))
    grouped_bias_kernel.launch(
        (experts * cdiv(n, block_n),),
        dy_view=make_rows(dy, stride_dym),
        index_ptr=index,
        scale_ptr=None if scale is None else scale.contiguous(),
        scale_index_ptr=scale_index,
        offsets_ptr=offsets.contiguous(),
        out_ptr=out,
        rows=dy.shape[0] if index is None else index.shape[0],
        n=n,
        DIVISOR=common_divisor(n, stride_dym),
        BLOCK_M=BIAS_TILE // block_n,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return out
