"""What follows a product: bias, activation, residual; also where it was split along K."""

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible, tanh
from ..config import cdiv
from ..gated_activation import activation_and_slope
from ..launch import common_divisor, launchable
from ..structures import Rows, make_rows, restore_stride
from .tiles import load_bias, load_tile, locate_tile, place_elements, store_tile

ACTIVATIONS = (
    "relu",
    "leaky_relu",
    "relu_squared",
    "gelu",
    "gelu_tanh",
    "silu",
    "sigmoid",
    "tanh",
)

LEAKY_SLOPE = tl.constexpr(0.01)


@triton.jit
def value_and_slope(x, ACTIVATION: tl.constexpr):
    """The activation of x and its derivative there, for every name in ACTIVATIONS."""
    if ACTIVATION == "leaky_relu":
        # Constants alone would be float32, which float64 must not be multiplied by.
        one = tl.full(x.shape, 1.0, x.dtype)
        slope = tl.where(x > 0.0, one, one * LEAKY_SLOPE)
        value = x * slope
    elif ACTIVATION == "relu_squared":
        rectified = tl.where(x <= 0.0, 0.0, x)
        value = rectified * rectified
        slope = 2.0 * rectified
    elif ACTIVATION == "tanh":
        value, slope = tanh(x)
    else:
        value, slope = activation_and_slope(x, ACTIVATION, 1.0)
    return value, slope


@triton.jit
def finish(
    acc,
    tile,
    bias_ptr,
    residual_view,
    pre_ptr,
    out_ptr,
    n,
    ACTIVATION: tl.constexpr,
    FAR_APART: tl.constexpr,
    RESIDUAL_DIVISOR: tl.constexpr,
):
    """Add the bias, store the pre-activation if wanted, activate, add the residual, store.

    out, and what is activated, are contiguous matrices of n columns. RESIDUAL_DIVISOR divides the
    residual's stride. What is absent is None, which Triton 3.6 lets no function return in a tuple.
    """
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    if bias_ptr is not None:
        acc += load_bias(bias_ptr, tile, BLOCK_N).to(acc.dtype)
    if pre_ptr is not None:
        store_tile(pre_ptr, n, tile, acc, FAR_APART)
    if ACTIVATION is not None:
        acc = value_and_slope(acc, ACTIVATION)[0]
    if residual_view is not None:
        pointer = residual_view.pointer
        stride = divisible(restore_stride(residual_view.stride), RESIDUAL_DIVISOR)
        acc += load_tile(pointer, stride, tile, FAR_APART, BLOCK_M, BLOCK_N).to(acc.dtype)
    store_tile(out_ptr, n, tile, acc, FAR_APART)


@launchable
@triton.jit(do_not_specialize=["m", "n", "splits"])
def matmul_sum_kernel(
    sums_ptr,
    bias_ptr,
    residual_view: Rows,
    out_ptr,
    pre_ptr,
    m,
    n,
    splits,
    ACTIVATION: tl.constexpr,
    N_DIVISOR: tl.constexpr,
    RESIDUAL_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a tile of one matrix: add the sums of its splits in their order, and finish.

    sums are (batch, splits, m, n).
    """
    n = divisible(n, N_DIVISOR)
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(m, BLOCK_M) * tiles_n
    program = tl.program_id(0)
    tile = locate_tile(program % tiles // tiles_n, program % tiles_n, m, n, BLOCK_M, BLOCK_N)
    matrix = (program // tiles).to(tl.int64)
    size = m.to(tl.int64) * n
    # A row may be so wide that offsets within a tile take 64 bits.
    corner, offsets, mask = place_elements(n, tile, True, BLOCK_M, BLOCK_N)
    sums_ptr += matrix * splits * size + corner
    acc = tl.zeros((BLOCK_M, BLOCK_N), accumulator_dtype(sums_ptr))
    for _ in range(splits):
        acc += tl.load(sums_ptr + offsets, mask, other=0.0)
        sums_ptr += size
    finish(
        acc,
        tile,
        bias_ptr,
        residual_view,
        pre_ptr,
        out_ptr + matrix * size,
        n,
        ACTIVATION,
        True,
        RESIDUAL_DIVISOR,
    )


def sum_splits(
    sums: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    pre: torch.Tensor | None,
    activation: str | None,
) -> None:
    """Launch the sum over the splits, sums (batch, splits, m, n), and what follows it."""
    batch, splits, m, n = sums.shape
    block_n = max(16, min(256, triton.next_power_of_2(n)))
    block_m = 2048 // block_n
    stride_rm = 0 if residual is None else residual.stride(0)
    matmul_sum_kernel.launch(
        (batch * cdiv(m, block_m) * cdiv(n, block_n),),
        sums_ptr=sums,
        bias_ptr=bias,
        residual_view=None if residual is None else make_rows(residual, stride_rm),
        out_ptr=out,
        pre_ptr=pre,
        m=m,
        n=n,
        splits=splits,
        ACTIVATION=activation,
        N_DIVISOR=common_divisor(n),
        RESIDUAL_DIVISOR=common_divisor(stride_rm),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
