r"""The sum over a token's experts: out_t = sum_k s_tk y[p_tk], in the order of k.

y (M, H) has a row for each token and expert, sorted by expert (see groups.py); p (T, K) says where,
and s (T, K) how much it counts, or nothing does and each counts once. Rows of no expert, from
offsets[E] on, count nothing and are not read. Summed in float32 (float64 for float64) and rounded
once.
"""

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible
from ..config import cdiv, find_target
from ..elementwise import elementwise_config, place_program
from ..launch import common_divisor, flatten_rows, launchable
from ..row_tiles import Blocks, Tile, load_tile, store_tile
from ..structures import Rows, make_rows, restore_rows


@launchable
@triton.jit(do_not_specialize=["tokens"])
def combine_experts_kernel(
    y_view: Rows,
    scale_ptr,
    places_ptr,
    offsets_ptr,
    out_ptr,
    tokens,
    experts,
    cols,
    SLOTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of out."""
    cols = divisible(cols, BLOCKS.divisor)
    tile = place_program(tokens, cols, BLOCKS)
    y = restore_rows(y_view, BLOCKS.divisor)
    end = tl.load(offsets_ptr + experts).to(tl.int64)
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), accumulator_dtype(y_view.pointer))
    for slot in range(SLOTS):
        number = tile.row * SLOTS + slot
        place = tl.load(places_ptr + number, tile.mask_m, other=0).to(tl.int64)
        there = tile.mask_m & (place < end)
        rows = load_tile(y, Tile(place, tile.first_col, tile.offs_n, there, tile.mask_n))
        if scale_ptr is not None:
            rows *= tl.load(scale_ptr + number, there, other=0.0).to(acc.dtype)[:, None]
        acc += rows
    store_tile(Rows(out_ptr, cols), tile, acc)


def combine_experts(
    y: torch.Tensor,
    scale: torch.Tensor | None,
    places: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """Launch the sum: out (T, H) of y (M, H) and places (T, K)."""
    tokens, slots = places.shape
    cols = y.shape[1]
    out = torch.empty(tokens, cols, dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    y, stride_ym = flatten_rows(y, cols)
    config = elementwise_config(cols, find_target(y))
    combine_experts_kernel.launch(
        (cdiv(tokens, config.block_m) * cdiv(cols, config.block_n),),
        y_view=make_rows(y, stride_ym),
        scale_ptr=None if scale is None else scale.contiguous(),
        places_ptr=places.contiguous(),
        offsets_ptr=offsets.contiguous(),
        out_ptr=out,
        tokens=tokens,
        experts=offsets.shape[0] - 1,
        cols=cols,
        SLOTS=slots,
        BLOCKS=Blocks(config.block_m, config.block_n, common_divisor(cols, stride_ym)),
        num_warps=config.num_warps,
    )
    return out
