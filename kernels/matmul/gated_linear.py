r"""The fused gated linear layer: y = activation(gate) * (up + up_offset) of two products.

With x (..., M, K), w_gate and w_up (N, K), and b_gate and b_up (N,) or none:

    gate  = x w_gate^T + b_gate,    up = x w_up^T + b_up                          (..., M, N) each
    y     = activation(gate) * (up + up_offset)
    dgate = dy * (up + up_offset) * slope(gate),    dup = dy * activation(gate)

Activations, their slopes, limit and alpha are those of gated_activation.py. The gradients of the
inputs are products of dgate and dup, which follow outside of this file:

    dx = dgate w_gate + dup w_up,    dw_gate = dgate^T x,    dw_up = dup^T x,    db = column sums

gate and up are never in memory. One program computes a tile of both from the same tiles of x, and
then y from them; in the backward it computes them again from the inputs, all that is saved, and
then dgate and dup. Products are summed in float32 (float64 for float64), the activation sees
the sums, and what is stored is rounded once.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..common import divisible
from ..config import cdiv, find_target
from ..gated_activation import Formula, apply_gate, differentiate_gate, make_formula
from ..launch import common_divisor, empty_rows, flatten_rows, launchable
from ..structures import Rows, make_rows, restore_stride
from .config import block_k_of_single_elements, loads_single_elements
from .gated_linear_config import gated_linear_config
from .tiles import (
    FAR,
    choose_tile,
    load_bias,
    load_tile,
    make_cut,
    slice_columns,
    slice_rows,
    store_tile,
    sum_products,
)


@triton.jit
def slice_weight(view, tile, TRANSPOSED: tl.constexpr, DIVISOR: tl.constexpr, CUT: tl.constexpr):
    """What a tile needs of a weight that is stored by rows as (N, K) or, TRANSPOSED, as (K, N)."""
    stride = divisible(restore_stride(view.stride), DIVISOR)
    if TRANSPOSED:
        return slice_columns(view.pointer, stride, 1, tile, CUT)
    else:
        return slice_columns(view.pointer, 1, stride, tile, CUT)


@triton.jit
def compute_gate_and_up(
    x_view,
    w_gate_view,
    w_up_view,
    b_gate_ptr,
    b_up_ptr,
    m,
    n,
    k,
    TRANSPOSED: tl.constexpr,
    DIVISOR: tl.constexpr,
    CUT: tl.constexpr,
):
    """This program's tiles (BLOCK_M, BLOCK_N) of gate and up, and where they lie."""
    # One grid axis holds all tiles, for the others end at 65,535.
    tile = choose_tile(tl.program_id(0), m, n, CUT)
    stride_xm = divisible(restore_stride(x_view.stride), DIVISOR)
    x = slice_rows(x_view.pointer, stride_xm, 1, tile, CUT)
    w_gate = slice_weight(w_gate_view, tile, TRANSPOSED, DIVISOR, CUT)
    w_up = slice_weight(w_up_view, tile, TRANSPOSED, DIVISOR, CUT)
    gate, up = sum_products(x, w_gate, w_up, divisible(k, DIVISOR), CUT)
    if b_gate_ptr is not None:
        gate += load_bias(b_gate_ptr, tile, CUT.block_n).to(gate.dtype)
    if b_up_ptr is not None:
        up += load_bias(b_up_ptr, tile, CUT.block_n).to(up.dtype)
    return gate, up, tile


@launchable
@triton.jit(do_not_specialize=["m"])
def gated_linear_forward_kernel(
    x_view: Rows,
    w_gate_view: Rows,
    w_up_view: Rows,
    b_gate_ptr,
    b_up_ptr,
    y_ptr,
    m,
    n,
    k,
    FORMULA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DIVISOR: tl.constexpr,
    CUT: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of y."""
    n = divisible(n, DIVISOR)
    weights = (w_gate_view, w_up_view, b_gate_ptr, b_up_ptr)
    gate, up, tile = compute_gate_and_up(x_view, *weights, m, n, k, TRANSPOSED, DIVISOR, CUT)
    store_tile(y_ptr, n, tile, apply_gate(gate, up, FORMULA), CUT.far_apart)


@launchable
@triton.jit(do_not_specialize=["m"])
def gated_linear_backward_kernel(
    dy_view: Rows,
    x_view: Rows,
    w_gate_view: Rows,
    w_up_view: Rows,
    b_gate_ptr,
    b_up_ptr,
    dgate_ptr,
    dup_ptr,
    m,
    n,
    k,
    FORMULA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DIVISOR: tl.constexpr,
    CUT: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of dy, dgate and dup."""
    n = divisible(n, DIVISOR)
    weights = (w_gate_view, w_up_view, b_gate_ptr, b_up_ptr)
    gate, up, tile = compute_gate_and_up(x_view, *weights, m, n, k, TRANSPOSED, DIVISOR, CUT)
    stride_dym = divisible(restore_stride(dy_view.stride), DIVISOR)
    dy = load_tile(dy_view.pointer, stride_dym, tile, CUT.far_apart, CUT.block_m, CUT.block_n)
    dgate, dup = differentiate_gate(dy.to(gate.dtype), gate, up, FORMULA)
    store_tile(dgate_ptr, n, tile, dgate, CUT.far_apart)
    store_tile(dup_ptr, n, tile, dup, CUT.far_apart)


def gated_linear_forward(
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    limit: float | None,
    alpha: float,
    up_offset: float,
    tf32: int,
    activation: str,
    batch_invariant: bool,
) -> torch.Tensor:
    """Launch the forward: y (..., N) of x (..., K)."""
    y = torch.empty(*x.shape[:-1], w_gate.shape[0], dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        formula = make_formula(activation, limit, alpha, up_offset)
        operands = (x, w_gate, w_up, b_gate, b_up)
        _launch(None, operands, formula, tf32, batch_invariant, y_ptr=y)
    return y


def gated_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    limit: float | None,
    alpha: float,
    up_offset: float,
    tf32: int,
    activation: str,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the backward: (dgate, dup), contiguous and shaped like dy."""
    dgate, dup = empty_rows(dy, dy.dtype), empty_rows(dy, dy.dtype)
    if dy.numel() > 0:
        formula = make_formula(activation, limit, alpha, up_offset)
        operands = (x, w_gate, w_up, b_gate, b_up)
        _launch(dy, operands, formula, tf32, batch_invariant, dgate_ptr=dgate, dup_ptr=dup)
    return dgate, dup


def _launch(
    dy: torch.Tensor | None,
    operands: tuple,
    formula: Formula,
    tf32: int,
    batch_invariant: bool,
    **outputs: torch.Tensor,
) -> None:
    """Launch the backward, or without dy the forward, on `outputs` by name."""
    x, w_gate, w_up, b_gate, b_up = operands
    precision = "tf32" if tf32 else "ieee"
    n, k = w_gate.shape
    m = math.prod(x.shape[:-1])
    dtype, backward = str(x.dtype)[6:], dy is not None
    target = find_target(x)
    config = gated_linear_config(
        m, n, k, dtype, precision, backward, target, batch_invariant=batch_invariant
    )
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    x, stride_xm = flatten_rows(x, k)
    w_gate, w_up, stride_gate, stride_up, transposed = _weights(w_gate, w_up)
    strides = [n, stride_xm, stride_gate, stride_up]
    kernel, given = gated_linear_forward_kernel, dict[str, Any](outputs)
    if dy is not None:
        dy, stride_dym = flatten_rows(dy, n)
        strides.append(stride_dym)
        kernel, given["dy_view"] = gated_linear_backward_kernel, make_rows(dy, stride_dym)
    divisor = common_divisor(k, *strides)
    if not batch_invariant and loads_single_elements(divisor, x.element_size(), target):
        rows = block_m + 2 * block_n
        block_k = block_k_of_single_elements(rows, block_k, config.num_warps, target)
    reach = max(strides) * max(block_m, block_n, block_k)
    blocks = (block_m, block_n, block_k, config.group_m)
    kernel.launch(
        (cdiv(m, block_m) * cdiv(n, block_n),),
        x_view=make_rows(x, stride_xm),
        w_gate_view=make_rows(w_gate, stride_gate),
        w_up_view=make_rows(w_up, stride_up),
        b_gate_ptr=None if b_gate is None else b_gate.contiguous(),
        b_up_ptr=None if b_up is None else b_up.contiguous(),
        **given,
        m=m,
        n=n,
        k=k,
        FORMULA=formula,
        TRANSPOSED=transposed,
        DIVISOR=divisor,
        CUT=make_cut(*blocks, precision, k % block_k != 0, reach >= FAR),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _weights(
    w_gate: torch.Tensor, w_up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int, int, bool]:
    """Both weights (N, K), the strides of their other dimensions, and whether N is innermost.

    Weights that lie alike, by rows or by columns, are read in place; others are copied.
    """
    if w_gate.stride(1) == 1 == w_up.stride(1):
        return w_gate, w_up, w_gate.stride(0), w_up.stride(0), False
    if w_gate.stride(0) == 1 == w_up.stride(0):
        return w_gate, w_up, w_gate.stride(1), w_up.stride(1), True
    w_gate, w_up = w_gate.contiguous(), w_up.contiguous()
    return w_gate, w_up, w_gate.stride(0), w_up.stride(0), False
