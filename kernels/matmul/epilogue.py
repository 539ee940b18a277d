"""What follows a product: bias, activation, residual; also where it was split along K."""

import torch
import triton
import triton.language as tl

from ..common import accumulator_dtype, divisible, tanh
from ..config import cdiv
from ..gated_activation import activation_and_slope
from ..launch import common_divisor, launchable

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
    bias_ptr,
    residual_ptr,
    out_ptr,
    pre_ptr,
    residual_offsets,
    out_offsets,
    offs_n,
    mask,
    n,
    ACTIVATION: tl.constexpr,
):
    """Add the bias, store the pre-activation if wanted, activate, add the residual, store."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, offs_n < n, other=0.0).to(acc.dtype)[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + out_offsets, acc.to(pre_ptr.dtype.element_ty), mask)
    if ACTIVATION is not None:
        acc = value_and_slope(acc, ACTIVATION)[0]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + residual_offsets, mask, other=0.0).to(acc.dtype)
    tl.store(out_ptr + out_offsets, acc.to(out_ptr.dtype.element_ty), mask)


@launchable
@triton.jit(do_not_specialize=["stride_rm", "m", "n", "splits"])
def matmul_sum_kernel(
    # tensors
    sums_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    pre_ptr,
    # strides and sizes
    stride_rm,
    m,
    n,
    splits,
    # flags
    ACTIVATION: tl.constexpr,
    # blocks
    DIVISOR_N: tl.constexpr,
    DIVISOR_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a tile of one matrix: add the sums of its splits in their order, and finish.

    sums are (batch, splits, m, n).
    """
    ACC: tl.constexpr = accumulator_dtype(sums_ptr)
    n = divisible(n, DIVISOR_N)
    stride_rm = divisible(stride_rm, DIVISOR_R)
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(m, BLOCK_M) * tiles_n
    program = tl.program_id(0).to(tl.int64)
    matrix = program // tiles
    offs_m = program % tiles // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,), int64
    offs_n = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < m)[:, None] & (offs_n < n)[None, :]
    offsets = (offs_m * n)[:, None] + offs_n[None, :]
    size = m.to(tl.int64) * n
    sums_ptr += matrix * splits * size
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for _ in range(splits):
        acc += tl.load(sums_ptr + offsets, mask, other=0.0)
        sums_ptr += size
    finish(
        acc,
        bias_ptr,
        residual_ptr,
        out_ptr + matrix * size,
        pre_ptr,
        (offs_m * stride_rm)[:, None] + offs_n[None, :],
        offsets,
        offs_n,
        mask,
        n,
        ACTIVATION,
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
    stride_rm = 0 if residual is None else residual.stride(-2)
    matmul_sum_kernel.launch(
        (batch * cdiv(m, block_m) * cdiv(n, block_n),),
        sums_ptr=sums,
        bias_ptr=bias,
        residual_ptr=residual,
        out_ptr=out,
        pre_ptr=pre,
        stride_rm=stride_rm,
        m=m,
        n=n,
        splits=splits,
        ACTIVATION=activation,
        DIVISOR_N=common_divisor(n),
        DIVISOR_R=common_divisor(stride_rm),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
