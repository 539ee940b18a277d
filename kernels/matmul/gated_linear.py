r"""The fused gated linear layer: y = activation(gate) * (up + UP_OFFSET) of two products.

With x (..., M, K), w_gate and w_up (N, K), and b_gate and b_up (N,) or none:

    gate  = x w_gate^T + b_gate,    up = x w_up^T + b_up                          (..., M, N) each
    y     = activation(gate) * (up + UP_OFFSET)
    dgate = dy * (up + UP_OFFSET) * slope(gate),    dup = dy * activation(gate)

Activations, their slopes, LIMIT and ALPHA are those of gated_activation.py. The gradients of the
inputs are products of dgate and dup, which follow outside of this file:

    dx = dgate w_gate + dup w_up,    dw_gate = dgate^T x,    dw_up = dup^T x,    db = column sums

gate and up are never in memory. One program computes a tile of both from the same tiles of x, and
then y from them; in the backward it computes them again from the inputs, all that is saved, and
then dgate and dup. Products are summed in float32 (float64 for float64), the activation sees
the sums, and what is stored is rounded once.
"""

import math

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible, dot
from ..config import cdiv, target_of
from ..gated_activation import activation_and_slope, clamped
from ..launch import common_divisor, empty_rows, launchable, rows_of
from .config import block_k_of_single_elements, loads_single_elements
from .gated_linear_config import gated_linear_config
from .matmul import FAR
from .tiles import tile_place


@triton.jit
def weight_offsets(stride, offs_k, offs_n, TRANSPOSED: tl.constexpr):
    """Offsets (BLOCK_K, BLOCK_N) into a weight stored as (N, K), or, TRANSPOSED, as (K, N)."""
    if TRANSPOSED:
        return (offs_k * stride)[:, None] + offs_n[None, :]
    else:
        return (offs_n * stride)[None, :] + offs_k[:, None]


@triton.jit
def gate_and_up(
    x_ptr,
    w_gate_ptr,
    w_up_ptr,
    b_gate_ptr,
    b_up_ptr,
    stride_xm,
    stride_gate,
    stride_up,
    m,
    n,
    k,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
    FAR_APART: tl.constexpr,
    DIVISOR: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program's tiles (BLOCK_M, BLOCK_N) of gate and up, and their first row and column."""
    ACC: tl.constexpr = accumulator_dtype(x_ptr)
    stride_xm = divisible(stride_xm, DIVISOR)
    stride_gate = divisible(stride_gate, DIVISOR)
    stride_up = divisible(stride_up, DIVISOR)
    k = divisible(k, DIVISOR)
    # One grid axis holds all tiles, for the others end at 65,535.
    tile_m, tile_n = tile_place(tl.program_id(0), tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    first_m = tile_m.to(tl.int64) * BLOCK_M
    first_n = tile_n.to(tl.int64) * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # What is left of the matrices from the tile's corner on.
    mask_m = (offs_m < m - first_m)[:, None]
    mask_n = (offs_n < n - first_n)[None, :]
    if FAR_APART:
        offs_m = offs_m.to(tl.int64)
        offs_n = offs_n.to(tl.int64)
        offs_k = offs_k.to(tl.int64)
    x_offsets = (offs_m * stride_xm)[:, None] + offs_k[None, :]
    gate_offsets = weight_offsets(stride_gate, offs_k, offs_n, TRANSPOSED)
    up_offsets = weight_offsets(stride_up, offs_k, offs_n, TRANSPOSED)
    x_ptr += first_m * stride_xm
    gate_step = tl.full([], BLOCK_K, tl.int64)
    up_step = gate_step
    if TRANSPOSED:
        w_gate_ptr += first_n
        w_up_ptr += first_n
        gate_step *= stride_gate
        up_step *= stride_up
    else:
        w_gate_ptr += first_n * stride_gate
        w_up_ptr += first_n * stride_up

    gate = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    up = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    steps = k // BLOCK_K
    # Not what the loop leaves behind: Triton 3.6 fails on pointers out of a pipelined loop for AMD.
    x_tail_ptr = x_ptr + steps * BLOCK_K
    w_gate_tail_ptr = w_gate_ptr + steps * gate_step
    w_up_tail_ptr = w_up_ptr + steps * up_step
    for _ in range(steps):
        x = tl.load(x_ptr + x_offsets, mask_m, other=0.0)  # (BLOCK_M, BLOCK_K)
        w_gate = tl.load(w_gate_ptr + gate_offsets, mask_n, other=0.0)  # (BLOCK_K, BLOCK_N)
        w_up = tl.load(w_up_ptr + up_offsets, mask_n, other=0.0)
        gate = dot(x, w_gate, gate, PRECISION)
        up = dot(x, w_up, up, PRECISION)
        x_ptr += BLOCK_K
        w_gate_ptr += gate_step
        w_up_ptr += up_step
    if TAIL:
        # Apart from the loop, which then needs no mask along K.
        mask_k = offs_k < k % BLOCK_K
        x = tl.load(x_tail_ptr + x_offsets, mask_m & mask_k[None, :], other=0.0)
        w_gate = tl.load(w_gate_tail_ptr + gate_offsets, mask_n & mask_k[:, None], other=0.0)
        w_up = tl.load(w_up_tail_ptr + up_offsets, mask_n & mask_k[:, None], other=0.0)
        gate = dot(x, w_gate, gate, PRECISION)
        up = dot(x, w_up, up, PRECISION)
    offs_bias = first_n + offs_n[None, :]
    if b_gate_ptr is not None:
        gate += tl.load(b_gate_ptr + offs_bias, mask_n, other=0.0).to(ACC)
    if b_up_ptr is not None:
        up += tl.load(b_up_ptr + offs_bias, mask_n, other=0.0).to(ACC)
    return gate, up, first_m, first_n


@triton.jit
def places_of(
    first_m,
    first_n,
    m,
    n,
    FAR_APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows (BLOCK_M, 1) and columns (1, BLOCK_N) from a tile's corner, and which places exist."""
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask = (offs_m < m - first_m) & (offs_n < n - first_n)
    if FAR_APART:
        offs_m = offs_m.to(tl.int64)
    return offs_m, offs_n, mask


@launchable
@triton.jit(do_not_specialize=["m"])
def gated_linear_forward_kernel(
    # tensors
    x_ptr,
    w_gate_ptr,
    w_up_ptr,
    b_gate_ptr,
    b_up_ptr,
    y_ptr,
    # strides and sizes
    stride_xm,
    stride_gate,
    stride_up,
    m,
    n,
    k,
    # scalars of the formula
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    # flags
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
    FAR_APART: tl.constexpr,
    # blocks
    DIVISOR: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of y."""
    n = divisible(n, DIVISOR)
    gate, up, first_m, first_n = gate_and_up(
        x_ptr,
        w_gate_ptr,
        w_up_ptr,
        b_gate_ptr,
        b_up_ptr,
        stride_xm,
        stride_gate,
        stride_up,
        m,
        n,
        k,
        TRANSPOSED,
        PRECISION,
        TAIL,
        FAR_APART,
        DIVISOR,
        GROUP_M,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    gate, up = clamped(gate, up, LIMIT)
    value, _ = activation_and_slope(gate, ACTIVATION, ALPHA)
    y = value * (up + UP_OFFSET)
    offs_m, offs_n, mask = places_of(first_m, first_n, m, n, FAR_APART, BLOCK_M, BLOCK_N)
    y_ptr += first_m * n + first_n
    tl.store(y_ptr + (offs_m * n + offs_n), y.to(y_ptr.dtype.element_ty), mask)


@launchable
@triton.jit(do_not_specialize=["m"])
def gated_linear_backward_kernel(
    # tensors
    dy_ptr,
    x_ptr,
    w_gate_ptr,
    w_up_ptr,
    b_gate_ptr,
    b_up_ptr,
    dgate_ptr,
    dup_ptr,
    # strides and sizes
    stride_dym,
    stride_xm,
    stride_gate,
    stride_up,
    m,
    n,
    k,
    # scalars of the formula
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    # flags
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    TAIL: tl.constexpr,
    FAR_APART: tl.constexpr,
    # blocks
    DIVISOR: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of dy, dgate and dup."""
    n = divisible(n, DIVISOR)
    gate, up, first_m, first_n = gate_and_up(
        x_ptr,
        w_gate_ptr,
        w_up_ptr,
        b_gate_ptr,
        b_up_ptr,
        stride_xm,
        stride_gate,
        stride_up,
        m,
        n,
        k,
        TRANSPOSED,
        PRECISION,
        TAIL,
        FAR_APART,
        DIVISOR,
        GROUP_M,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    offs_m, offs_n, mask = places_of(first_m, first_n, m, n, FAR_APART, BLOCK_M, BLOCK_N)
    stride_dym = divisible(stride_dym, DIVISOR)
    dy_ptr += first_m * stride_dym + first_n
    dy = tl.load(dy_ptr + (offs_m * stride_dym + offs_n), mask, other=0.0).to(gate.dtype)
    used_gate, used_up = clamped(gate, up, LIMIT)
    value, slope = activation_and_slope(used_gate, ACTIVATION, ALPHA)
    dgate = dy * (used_up + UP_OFFSET) * slope
    dup = dy * value
    # Where there is no gradient it is zero, also if a factor above is infinite.
    if ACTIVATION == "relu":
        dgate = tl.where(gate <= 0.0, 0.0, dgate)
    if LIMIT is not None:
        # Comparisons that NaN fails, which gives it torch.clamp's gradient.
        dgate = tl.where(gate <= LIMIT, dgate, 0.0)
        dup = tl.where((up >= -LIMIT) & (up <= LIMIT), dup, 0.0)
    dgate_ptr += first_m * n + first_n
    dup_ptr += first_m * n + first_n
    tl.store(dgate_ptr + (offs_m * n + offs_n), dgate.to(dgate_ptr.dtype.element_ty), mask)
    tl.store(dup_ptr + (offs_m * n + offs_n), dup.to(dup_ptr.dtype.element_ty), mask)


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
        settings = (limit, alpha, up_offset, tf32, activation, batch_invariant)
        _launch(None, x, w_gate, w_up, b_gate, b_up, settings, y_ptr=y)
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
        settings = (limit, alpha, up_offset, tf32, activation, batch_invariant)
        _launch(dy, x, w_gate, w_up, b_gate, b_up, settings, dgate_ptr=dgate, dup_ptr=dup)
    return dgate, dup


def _launch(
    dy: torch.Tensor | None,
    x: torch.Tensor,
    w_gate: torch.Tensor,
    w_up: torch.Tensor,
    b_gate: torch.Tensor | None,
    b_up: torch.Tensor | None,
    settings: tuple,
    **pointers: torch.Tensor,
) -> None:
    """Launch the backward, or without dy the forward, on `pointers`, the outputs by name."""
    limit, alpha, up_offset, tf32, activation, batch_invariant = settings
    precision = "tf32" if tf32 else "ieee"
    n, k = w_gate.shape
    m = math.prod(x.shape[:-1])
    dtype, backward = str(x.dtype)[6:], dy is not None
    target = target_of(x)
    config = gated_linear_config(
        m, n, k, dtype, precision, backward, target, batch_invariant=batch_invariant
    )
    x, stride_xm = rows_of(x, k)
    w_gate, w_up, stride_gate, stride_up, transposed = _weights(w_gate, w_up)
    strides = {"stride_xm": stride_xm, "stride_gate": stride_gate, "stride_up": stride_up}
    kernel = gated_linear_forward_kernel
    if dy is not None:
        pointers["dy_ptr"], strides["stride_dym"] = rows_of(dy, n)
        kernel = gated_linear_backward_kernel
    divisor = common_divisor(n, k, *strides.values())
    block_k = config.block_k
    if not batch_invariant and loads_single_elements(divisor, x.element_size(), target):
        rows = config.block_m + 2 * config.block_n
        block_k = block_k_of_single_elements(rows, block_k, config.num_warps, target)
    reach = max(n, *strides.values()) * max(config.block_m, config.block_n, block_k)
    kernel.launch(
        (cdiv(m, config.block_m) * cdiv(n, config.block_n),),
        x_ptr=x,
        w_gate_ptr=w_gate,
        w_up_ptr=w_up,
        b_gate_ptr=None if b_gate is None else b_gate.contiguous(),
        b_up_ptr=None if b_up is None else b_up.contiguous(),
        **pointers,
        **strides,
        m=m,
        n=n,
        k=k,
        LIMIT=limit,
        ALPHA=alpha,
        UP_OFFSET=up_offset,
        ACTIVATION=activation,
        TRANSPOSED=transposed,
        PRECISION=precision,
        TAIL=k % block_k != 0,
        FAR_APART=reach >= FAR,
        DIVISOR=divisor,
        GROUP_M=config.group_m,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
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
