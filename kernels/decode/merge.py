r"""Merging attention over parts of the keys into attention over all of them, and its gradient.

Part s of S gives for each query an output o_s and the logsumexp lse_s of its scores there:

    lse = log(sum_s exp(lse_s))
    w_s = exp(lse_s - lse)
    o = sum_s w_s o_s

    do_s = w_s do
    dlse_s = w_s (do . o_s - do . o + dlse)

o_s is (S, rows, D), lse_s (S, rows). A part without keys has lse_s = -inf and is not read; a query
without keys in any part gets o = 0 and lse = -inf. All is computed in float32, or in float64.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype
from ..config import Target, cdiv, find_target
from ..launch import launchable

MOST_PARTS = 16
"""Parts that a program reads at once."""

TILE = 1024
"""Numbers of o that a program reads at once, if there are as many in a row's parts."""


class MergeCut(NamedTuple):
    """How a kernel is cut: so many parts of so many rows at once, all of their columns."""

    block_s: int
    block_m: int
    columns: int
    """The columns of a row, and the next power of two."""
    block_d: int


@functools.lru_cache
def cut_merge(parts: int, columns: int, target: Target) -> tuple[MergeCut, int]:
    """How the kernels of `parts` parts are cut, and their number of warps."""
    block_s: int = min(triton.next_power_of_2(max(parts, 1)), MOST_PARTS)
    block_d: int = triton.next_power_of_2(columns)
    block_m: int = max(TILE // (block_s * block_d), 1)
    warps: int = min(max(block_s * block_m * block_d // (16 * target.warp_size), 1), 8)
    return MergeCut(block_s, block_m, columns, block_d), warps


@triton.jit
def place_rows(rows, CUT: tl.constexpr):
    """A program's rows, its columns, and which of these places there are."""
    row = tl.program_id(0).to(tl.int64) * CUT.block_m + tl.arange(0, CUT.block_m)
    cols = tl.arange(0, CUT.block_d)
    inside = row < rows
    return row, cols, inside, inside[:, None] & (cols < CUT.columns)[None, :]


@launchable
@triton.jit(do_not_specialize=["parts", "rows"])
def merge_attention_kernel(parts_ptr, part_lse_ptr, o_ptr, lse_ptr, parts, rows, CUT: tl.constexpr):
    """One program BLOCK_M rows."""
    ACC: tl.constexpr = accumulator_dtype(part_lse_ptr)
    BLOCK_M: tl.constexpr = CUT.block_m
    BLOCK_D: tl.constexpr = CUT.block_d
    row, cols, inside, places = place_rows(rows, CUT)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    largest = tl.full((BLOCK_M,), float("-inf"), ACC)
    for first in range(0, parts, CUT.block_s):
        part = (first + tl.arange(0, CUT.block_s)).to(tl.int64)
        at = part[:, None] * rows + row[None, :]  # (BLOCK_S, BLOCK_M)
        there = (part < parts)[:, None] & inside[None, :]
        lse = tl.load(part_lse_ptr + at, there, other=float("-inf"))
        new_largest = tl.maximum(largest, tl.max(lse, 0))
        # Without any key so far: every weight is 0, where -inf - -inf would be NaN.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weight = tl.exp(lse - shift[None, :])
        rescale = tl.exp(largest - shift)
        # What has no weight is not read, for it may be anything.
        read = (weight > 0.0)[:, :, None] & places[None, :, :]
        o = tl.load(parts_ptr + at[:, :, None] * CUT.columns + cols[None, None, :], read, other=0.0)
        acc = acc * rescale[:, None] + tl.sum(weight[:, :, None] * o.to(ACC), 0)
        total = total * rescale + tl.sum(weight, 0)
        largest = new_largest
    empty = total == 0.0
    o = acc / tl.where(empty, 1.0, total)[:, None]
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    lse = tl.where(empty, float("-inf"), shift + tl.log(tl.where(empty, 1.0, total)))
    at = row[:, None] * CUT.columns + cols[None, :]
    tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), places)
    tl.store(lse_ptr + row, lse, inside)


@triton.jit
def load_weighted(first, row, lse, parts_ptr, part_lse_ptr, parts, rows, places, CUT: tl.constexpr):
    """Of the parts from `first` on: where their numbers lie, their weights, and their o."""
    part = (first + tl.arange(0, CUT.block_s)).to(tl.int64)
    at = part[:, None] * rows + row[None, :]  # (BLOCK_S, BLOCK_M)
    there = (part < parts)[:, None] & (row < rows)[None, :]
    weight = tl.exp(tl.load(part_lse_ptr + at, there, other=float("-inf")) - lse[None, :])
    read = (weight > 0.0)[:, :, None] & places[None, :, :]
    wide_at = at[:, :, None] * CUT.columns + tl.arange(0, CUT.block_d)[None, None, :]
    return at, wide_at, there, weight, tl.load(parts_ptr + wide_at, read, other=0.0)


@launchable
@triton.jit(do_not_specialize=["parts", "rows"])
def merge_attention_backward_kernel(
    do_ptr,
    dlse_ptr,
    parts_ptr,
    part_lse_ptr,
    lse_ptr,
    dparts_ptr,
    dpart_lse_ptr,
    parts,
    rows,
    CUT: tl.constexpr,
):
    """One program BLOCK_M rows, over all parts twice: do . o is the sum of all w_s (do . o_s)."""
    ACC: tl.constexpr = accumulator_dtype(part_lse_ptr)
    row, cols, inside, places = place_rows(rows, CUT)
    do = tl.load(do_ptr + (row[:, None] * CUT.columns + cols[None, :]), places, other=0.0).to(ACC)
    lse = tl.load(lse_ptr + row, inside, other=float("inf"))
    # A query without keys has no weights.
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    common = tl.load(dlse_ptr + row, inside, other=0.0)
    for first in range(0, parts, CUT.block_s):
        _, _, _, weight, o = load_weighted(
            first, row, lse, parts_ptr, part_lse_ptr, parts, rows, places, CUT
        )
        common -= tl.sum(weight * tl.sum(do[None, :, :] * o.to(ACC), 2), 0)
    for first in range(0, parts, CUT.block_s):
        at, wide_at, there, weight, o = load_weighted(
            first, row, lse, parts_ptr, part_lse_ptr, parts, rows, places, CUT
        )
        dlse = weight * (tl.sum(do[None, :, :] * o.to(ACC), 2) + common[None, :])
        dparts = (weight[:, :, None] * do[None, :, :]).to(dparts_ptr.dtype.element_ty)
        tl.store(dparts_ptr + wide_at, dparts, there[:, :, None] & places[None, :, :])
        tl.store(dpart_lse_ptr + at, dlse, there)


def merge_attention_forward(
    parts: torch.Tensor, part_lse: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward on parts (S, ..., D) and their lse (S, ...): (o of `dtype`, lse)."""
    parts, part_lse = parts.contiguous(), part_lse.contiguous()
    o = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    lse = torch.empty(part_lse.shape[1:], dtype=part_lse.dtype, device=parts.device)
    rows = lse.numel()
    if rows > 0:
        cut, num_warps = cut_merge(len(parts), o.shape[-1], find_target(parts))
        merge_attention_kernel.launch(
            (cdiv(rows, cut.block_m),),
            num_warps=num_warps,
            parts_ptr=parts,
            part_lse_ptr=part_lse,
            o_ptr=o,
            lse_ptr=lse,
            parts=len(parts),
            rows=rows,
            CUT=cut,
        )
    return o, lse


def merge_attention_backward(
    do: torch.Tensor,
    dlse: torch.Tensor,
    parts: torch.Tensor,
    part_lse: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward: the gradients of parts and of their lse."""
    parts, part_lse = parts.contiguous(), part_lse.contiguous()
    dparts, dpart_lse = torch.empty_like(parts), torch.empty_like(part_lse)
    rows = lse.numel()
    if rows > 0:
        cut, num_warps = cut_merge(len(parts), do.shape[-1], find_target(parts))
        merge_attention_backward_kernel.launch(
            (cdiv(rows, cut.block_m),),
            num_warps=num_warps,
            do_ptr=do.contiguous(),
            dlse_ptr=dlse.contiguous(),
            parts_ptr=parts,
            part_lse_ptr=part_lse,
            lse_ptr=lse.contiguous(),
            dparts_ptr=dparts,
            dpart_lse_ptr=dpart_lse,
            parts=len(parts),
            rows=rows,
            CUT=cut,
        )
    return dparts, dpart_lse
