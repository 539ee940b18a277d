r"""The activated products of experts: gate, up and activation(gate) * (up + up_offset), and back.

Row r of M belongs to an expert e (see groups.py) and, in x and do, is row tokens[r]. With w1
(E, 2 I, H), whose features are all gates and then all ups, or interleaved, one after the other,
w2 (E, H, I), and a scale s_r that a row's result counts by:

    h_r  = x_r w1_e^T + b1_e      (M, 2 I), packed as w1 is        a_r = gated activation of h_r
    da_r = do_r w2_e              (M, I), never in memory
    ds_r = da_r . a_r             dh_r = slopes at h_r times s_r da_r          sa_r = s_r a_r

Activations and slopes are those of gated_activation.py. ds is summed over the columns of each tile,
one after the other, and then over the tiles in their order: nothing is atomic. Products are summed
in float32 (float64 for float64), and what is stored is rounded once.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common import divisible
from ..config import cdiv, find_target
from ..gated_activation import apply_gate, differentiate_gate, make_formula
from ..launch import common_divisor, flatten_rows, launchable
from ..matmul.config import block_k_of_single_elements, loads_single_elements
from ..matmul.operands import Matrices, neighbours, restore_matrices, view_matrices
from ..matmul.tiles import (
    FAR,
    Cut,
    Tile,
    load_bias,
    load_tile,
    make_cut,
    store_tile,
    sum_products,
)
from ..structures import Rows, make_rows, restore_stride
from .config import ExpertsConfig, experts_config
from .grouped_linear import slice_expert
from .groups import choose_group, find_rows, gather_rows, most_tiles


class Packing(NamedTuple):
    """How gates and ups are packed, and how the weight of the product lies."""

    interleaved: bool
    transposed: bool
    """Whether neighbours of the weight (E, K, N) are in its columns."""
    divisor: int
    """What divides sizes and strides."""


@triton.jit
def widen(tile):
    """The tile of interleaved gates and ups that stand where a tile of either would."""
    return Tile(tile.first_m, 2 * tile.first_n, tile.left_m, 2 * tile.left_n)


@triton.jit
def shift(tile, n):
    """The tile of the ups that belong to a tile of gates, where n gates stand before all ups."""
    return Tile(tile.first_m, tile.first_n + n, tile.left_m, tile.left_n)


@triton.constexpr_function
def widen_cut(cut):
    """The cut of a product whose columns are interleaved gates and ups."""
    return Cut(cut.block_m, 2 * cut.block_n, *cut[2:])


@triton.jit
def split_pairs(pairs):
    """Interleaved gates and ups (BLOCK_M, 2 BLOCK_N) as two tiles."""
    BLOCK_M: tl.constexpr = pairs.shape[0]
    BLOCK_N: tl.constexpr = pairs.shape[1] // 2
    return tl.split(tl.reshape(pairs, (BLOCK_M, BLOCK_N, 2)))


@launchable
@triton.jit(do_not_specialize=["rows", "tiles_m"])
def experts_forward_kernel(
    x_view: Rows,
    weight_view: Matrices,
    bias_ptr,
    tokens_ptr,
    offsets_ptr,
    h_ptr,
    a_ptr,
    rows,
    tiles_m,
    experts,
    n,
    k,
    FORMULA: tl.constexpr,
    EXPERTS: tl.constexpr,
    PACKING: tl.constexpr,
    CUT: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of a and, where it is kept, both of h.

    weight is (E, K, 2 N). Rows of no expert are left as they are.
    """
    BLOCK_N: tl.constexpr = CUT.block_n
    n = divisible(n, PACKING.divisor)
    k = divisible(k, PACKING.divisor)
    group, tile = choose_group(offsets_ptr, rows, experts, tiles_m, n, EXPERTS, CUT)
    if group.expert < experts:
        weight = restore_matrices(weight_view, PACKING.transposed, PACKING.divisor)
        stride_xm = divisible(restore_stride(x_view.stride), PACKING.divisor)
        x = gather_rows(x_view.pointer, stride_xm, tokens_ptr, tile, CUT)
        first_bias = group.expert.to(tl.int64) * 2 * n
        if PACKING.interleaved:
            WIDE: tl.constexpr = widen_cut(CUT)
            pair_tile = widen(tile)
            columns = slice_expert(weight, group.expert, experts, pair_tile, WIDE)
            pairs = sum_products(x, columns, None, k, WIDE)
            if bias_ptr is not None:
                pairs += load_bias(bias_ptr + first_bias, pair_tile, 2 * BLOCK_N).to(pairs.dtype)
            if h_ptr is not None:
                store_tile(h_ptr, 2 * n, pair_tile, pairs, CUT.far_apart)
            gate, up = split_pairs(pairs)
        else:
            up_tile = shift(tile, n)
            gates = slice_expert(weight, group.expert, experts, tile, CUT)
            ups = slice_expert(weight, group.expert, experts, up_tile, CUT)
            gate, up = sum_products(x, gates, ups, k, CUT)
            if bias_ptr is not None:
                gate += load_bias(bias_ptr + first_bias, tile, BLOCK_N).to(gate.dtype)
                up += load_bias(bias_ptr + first_bias, up_tile, BLOCK_N).to(up.dtype)
            if h_ptr is not None:
                store_tile(h_ptr, 2 * n, tile, gate, CUT.far_apart)
                store_tile(h_ptr, 2 * n, up_tile, up, CUT.far_apart)
        store_tile(a_ptr, n, tile, apply_gate(gate, up, FORMULA), CUT.far_apart)


@launchable
@triton.jit(do_not_specialize=["rows", "tiles_m"])
def experts_backward_kernel(
    dout_view: Rows,
    weight_view: Matrices,
    h_ptr,
    scale_ptr,
    slots_ptr,
    tokens_ptr,
    offsets_ptr,
    dh_ptr,
    sa_ptr,
    ds_ptr,
    rows,
    tiles_m,
    experts,
    n,
    k,
    FORMULA: tl.constexpr,
    EXPERTS: tl.constexpr,
    PACKING: tl.constexpr,
    CUT: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of sa, both of dh, and a part of ds.

    weight is (E, K, N). ds is (tiles of columns, M), and where rows have their scale, at slots.
    """
    BLOCK_M: tl.constexpr = CUT.block_m
    BLOCK_N: tl.constexpr = CUT.block_n
    FAR_APART: tl.constexpr = CUT.far_apart
    n = divisible(n, PACKING.divisor)
    k = divisible(k, PACKING.divisor)
    group, tile = choose_group(offsets_ptr, rows, experts, tiles_m, n, EXPERTS, CUT)
    if group.expert <= experts:
        slot = find_rows(slots_ptr, tile, BLOCK_M)
        there = tl.arange(0, BLOCK_M) < tile.left_m
        part_ptr = ds_ptr + tile.first_n // BLOCK_N * rows + slot
        if group.expert == experts:
            # Rows of no expert have no result that their scale would be multiplied by.
            tl.store(part_ptr, tl.zeros((BLOCK_M,), ds_ptr.dtype.element_ty), there)
        else:
            weight = restore_matrices(weight_view, PACKING.transposed, PACKING.divisor)
            stride_dm = divisible(restore_stride(dout_view.stride), PACKING.divisor)
            dout = gather_rows(dout_view.pointer, stride_dm, tokens_ptr, tile, CUT)
            columns = slice_expert(weight, group.expert, experts, tile, CUT)
            da = sum_products(dout, columns, None, k, CUT)
            if PACKING.interleaved:
                pair_tile = widen(tile)
                pairs = load_tile(h_ptr, 2 * n, pair_tile, FAR_APART, BLOCK_M, 2 * BLOCK_N)
                gate, up = split_pairs(pairs.to(da.dtype))
            else:
                gate = load_tile(h_ptr, 2 * n, tile, FAR_APART, BLOCK_M, BLOCK_N).to(da.dtype)
                up = load_tile(h_ptr, 2 * n, shift(tile, n), FAR_APART, BLOCK_M, BLOCK_N)
                up = up.to(da.dtype)
            a = apply_gate(gate, up, FORMULA)
            # Beyond the last column gates and ups are 0, where an activation may be none.
            inside = tl.arange(0, BLOCK_N)[None, :] < tile.left_n
            tl.store(part_ptr, tl.sum(tl.where(inside, da * a, 0.0), 1), there)
            scale = tl.load(scale_ptr + slot, there, other=0.0).to(da.dtype)[:, None]
            store_tile(sa_ptr, n, tile, scale * a, FAR_APART)
            dgate, dup = differentiate_gate(scale * da, gate, up, FORMULA)
            if PACKING.interleaved:
                # Rounded first, for what is joined is moved between threads.
                dtype: tl.constexpr = dh_ptr.dtype.element_ty
                pairs = tl.join(dgate.to(dtype), dup.to(dtype))
                pairs = tl.reshape(pairs, (BLOCK_M, 2 * BLOCK_N))
                store_tile(dh_ptr, 2 * n, widen(tile), pairs, FAR_APART)
            else:
                store_tile(dh_ptr, 2 * n, tile, dgate, FAR_APART)
                store_tile(dh_ptr, 2 * n, shift(tile, n), dup, FAR_APART)


def experts_forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    limit: float | None,
    alpha: float,
    up_offset: float,
    interleaved: int,
    keep: int,
    tf32: int,
    activation: str,
    batch_invariant: bool,
    config: ExpertsConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch (a (M, I), h (M, 2 I) if `keep`), of x (T, H), w1 (E, 2 I, H) and tokens (M,).

    `config` is what is used instead of what the rule or a table says.
    """
    rows, n = tokens.shape[0], w1.shape[1] // 2
    a = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    h = torch.empty(rows, 2 * n, dtype=x.dtype, device=x.device) if keep else None
    if a.numel() == 0:
        return a, h
    precision = "tf32" if tf32 else "ieee"
    sizes = (rows, w1.shape[0], n, x.shape[1], str(x.dtype)[6:], precision, find_target(x))
    config = config or experts_config("experts_forward", *sizes, batch_invariant=batch_invariant)
    x, stride_xm = flatten_rows(x, x.shape[1])
    experts_forward_kernel.launch(
        x_view=make_rows(x, stride_xm),
        bias_ptr=None if b1 is None else b1.contiguous(),
        tokens_ptr=tokens,
        offsets_ptr=offsets.contiguous(),
        h_ptr=h,
        a_ptr=a,
        FORMULA=make_formula(activation, limit, alpha, up_offset),
        **_cut(w1.mT, interleaved, rows, n, stride_xm, 2, config, precision, batch_invariant),
    )
    return a, h


def experts_backward(
    dout: torch.Tensor,
    h: torch.Tensor,
    w2: torch.Tensor,
    scale: torch.Tensor,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    limit: float | None,
    alpha: float,
    up_offset: float,
    interleaved: int,
    tf32: int,
    activation: str,
    batch_invariant: bool,
    config: ExpertsConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch (dh (M, 2 I), sa (M, I), ds (M,) in float32), of dout (T, H) and w2 (E, H, I).

    Row r has the scale at slots[r] of `scale` (M,), and there is its ds. `config` is as in
    experts_forward.
    """
    rows, n = tokens.shape[0], w2.shape[2]
    dh = torch.empty(rows, 2 * n, dtype=h.dtype, device=h.device)
    sa = torch.empty(rows, n, dtype=h.dtype, device=h.device)
    wide = torch.float64 if dout.dtype is torch.float64 else torch.float32
    if sa.numel() == 0:
        return dh, sa, torch.zeros(rows, dtype=wide, device=h.device)
    precision = "tf32" if tf32 else "ieee"
    dtype, target = str(dout.dtype)[6:], find_target(dout)
    sizes = (rows, w2.shape[0], n, dout.shape[1], dtype, precision, target)
    config = config or experts_config("experts_backward", *sizes, batch_invariant=batch_invariant)
    parts = torch.empty(cdiv(n, config.block_n), rows, dtype=wide, device=h.device)
    dout, stride_dm = flatten_rows(dout, dout.shape[1])
    experts_backward_kernel.launch(
        dout_view=make_rows(dout, stride_dm),
        h_ptr=h.contiguous(),
        scale_ptr=scale.contiguous(),
        slots_ptr=slots,
        tokens_ptr=tokens,
        offsets_ptr=offsets.contiguous(),
        dh_ptr=dh,
        sa_ptr=sa,
        ds_ptr=parts,
        FORMULA=make_formula(activation, limit, alpha, up_offset),
        **_cut(w2, interleaved, rows, n, stride_dm, 1, config, precision, batch_invariant),
    )
    return dh, sa, parts.sum(0)


def _cut(
    weight: torch.Tensor,
    interleaved: int,
    rows: int,
    n: int,
    stride_m: int,
    widths: int,
    config: ExpertsConfig,
    precision: str,
    batch_invariant: bool,
) -> dict[str, Any]:
    """What both kernels are launched with: weight (E, K, N `widths` times), sizes and blocks."""
    experts, k = weight.shape[:2]
    weight, stride_wk, stride_wn, unit = neighbours(weight, "k", "n")
    stride_we = weight.stride(0)
    divisor = common_divisor(n, k, stride_m, stride_we, stride_wn if unit == "k" else stride_wk)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    target = find_target(weight)
    if not batch_invariant and loads_single_elements(divisor, weight.element_size(), target):
        lines = block_m + widths * block_n
        block_k = block_k_of_single_elements(lines, block_k, config.num_warps, target)
    reach = max(2 * n, stride_m, stride_wk, stride_wn) * max(block_m, 2 * block_n, block_k)
    blocks = (block_m, block_n, block_k, config.group_m)
    tiles_m = most_tiles(rows, experts, block_m)
    return {
        "grid": (tiles_m * cdiv(n, block_n),),
        "weight_view": view_matrices(weight, stride_we, 0, stride_wk, stride_wn),
        "rows": rows,
        "tiles_m": tiles_m,
        "experts": experts,
        "n": n,
        "k": k,
        "EXPERTS": triton.next_power_of_2(experts + 1),
        "PACKING": Packing(bool(interleaved), unit == "k", divisor),
        "CUT": make_cut(*blocks, precision, k % block_k != 0, reach >= FAR),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
