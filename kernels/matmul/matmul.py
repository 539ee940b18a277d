r"""Matrix products: out = activation(a @ b + bias) + residual, forward and, with them, backward.

a is (..., M, K), b (..., K, N), bias (N,), residual and out (..., M, N), with the same leading
dimensions, along which an operand that is broadcast has stride 0. Operands are read by strides in
any transposition. Products are summed in float32 (float64 for float64), the rest follows in that
dtype, and the result is rounded once.

The gradients of a product are products of the same kernel with transposed operands:

    da = dout @ b^T,  db = a^T @ dout

and those of linear(x, W, bias), y = activation(x W^T + bias) + residual, are

    dpre = dy * activation'(pre)      (linear_backward.py)
    dx = dpre @ W,  dW = dpre^T @ x,  dbias = sum over rows of dpre,  dresidual = dy

Tiles of the output are handed out in groups of GROUP_M rows of tiles, so that programs under way
at one time share operands in L2. Where there are few tiles and a long K, several programs share a
tile: each writes its own sums, and a second kernel adds them in fixed order and finishes. A
PERSISTENT launch has as many programs as the device runs at once, each taking tile after tile.
"""

import math

import torch
import triton
import triton.language as tl

from ..common import divisible
from ..config import cdiv, target_of
from ..launch import common_divisor, launchable
from .config import (
    SMALLEST_LARGE_BLOCK,
    MatmulConfig,
    block_k_of_single_elements,
    loads_single_elements,
    matmul_config,
)
from .epilogue import sum_splits
from .operands import batch_axes, neighbours
from .tiles import compute_tile, spaced

# From here on an offset inside a tile takes 64 bits.
FAR = 2**31


@launchable
@triton.jit(
    do_not_specialize=[
        "stride_a_outer",
        "stride_a_inner",
        "stride_am",
        "stride_ak",
        "stride_b_outer",
        "stride_b_inner",
        "stride_bk",
        "stride_bn",
        "stride_rm",
        "outer",
        "inner",
        "m",
        "n",
        "k",
        "splits",
    ]
)
def matmul_kernel(
    # tensors
    a_ptr,
    b_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    pre_ptr,
    # strides
    stride_a_outer,
    stride_a_inner,
    stride_am,
    stride_ak,
    stride_b_outer,
    stride_b_inner,
    stride_bk,
    stride_bn,
    stride_rm,
    # sizes
    outer,
    inner,
    m,
    n,
    k,
    splits,
    # flags
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    A_UNIT: tl.constexpr,
    B_UNIT: tl.constexpr,
    TAIL: tl.constexpr,
    FAR_APART: tl.constexpr,
    # blocks
    DIVISOR_A: tl.constexpr,
    DIVISOR_B: tl.constexpr,
    DIVISOR_R: tl.constexpr,
    DIVISOR_M: tl.constexpr,
    DIVISOR_N: tl.constexpr,
    DIVISOR_K: tl.constexpr,
    PERSISTENT: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a tile (BLOCK_M, BLOCK_N) of out, or, PERSISTENT, one tile after another.

    A_UNIT and B_UNIT name the dimension along which an operand's elements are neighbours. Sizes and
    strides are not specialised, because any of them may be a number of tokens: what the compiler
    may rely on are their divisors, and those matter where elements are neighbours.
    """
    stride_a_outer = divisible(stride_a_outer, DIVISOR_A)
    stride_a_inner = divisible(stride_a_inner, DIVISOR_A)
    stride_am = spaced(stride_am, A_UNIT == "m", DIVISOR_A)
    stride_ak = spaced(stride_ak, A_UNIT == "k", DIVISOR_A)
    stride_b_outer = divisible(stride_b_outer, DIVISOR_B)
    stride_b_inner = divisible(stride_b_inner, DIVISOR_B)
    stride_bk = spaced(stride_bk, B_UNIT == "k", DIVISOR_B)
    stride_bn = spaced(stride_bn, B_UNIT == "n", DIVISOR_B)
    stride_rm = divisible(stride_rm, DIVISOR_R)
    m = divisible(m, DIVISOR_M)
    n = divisible(n, DIVISOR_N)
    k = divisible(k, DIVISOR_K)
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    given = (
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
    )
    # One grid axis holds all there is, for the others end at 65,535.
    program = tl.program_id(0)
    if PERSISTENT:
        for place in range(program, tiles * splits * outer * inner, tl.num_programs(0)):
            compute_tile(
                place % tiles,
                place // tiles,
                *given,
                PRECISION,
                ACTIVATION,
                TAIL,
                FAR_APART,
                SPLIT,
                GROUP_M,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
    else:
        compute_tile(
            program % tiles,
            program // tiles,
            *given,
            PRECISION,
            ACTIVATION,
            TAIL,
            FAR_APART,
            SPLIT,
            GROUP_M,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )


def launch_product(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    precision: str,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    pre: torch.Tensor | None = None,
    activation: str | None = None,
    batch_invariant: bool = False,
    config: MatmulConfig | None = None,
) -> None:
    """Launch out = activation(a @ b + bias) + residual, and pre, what is activated, if given.

    Args:
        a, b: (..., M, K) and (..., K, N), of one dtype, with equal leading dimensions, of any
            strides. Without a unit stride along either of its last dimensions an operand is copied.
        out, pre: (..., M, N), contiguous.
        precision: "ieee" or "tf32", for float32.
        bias: (N,), contiguous.
        residual: (M, N) with a unit last stride, in which case there is one matrix; it may be out.
        activation: one of ACTIVATIONS.
        batch_invariant: cut it by n and k alone, so that a row has the same bits among any others.
        config: instead of the configuration that is chosen.
    """
    m, n = out.shape[-2:]
    k = a.shape[-1]
    if out.numel() == 0:
        return
    a, stride_am, stride_ak, a_unit = neighbours(a, "m", "k")
    b, stride_bk, stride_bn, b_unit = neighbours(b, "k", "n")
    outer, inner, a_batch, b_batch = 1, 1, (0, 0), (0, 0)
    if out.dim() > 2:
        a, b, (outer, inner), a_batch, b_batch = batch_axes(a, b)
    batch = outer * inner
    target = target_of(a)
    if config is None:
        dtype = str(a.dtype)[6:]
        units = a_unit + b_unit
        heavy = activation not in (None, "relu", "leaky_relu")
        fused = heavy or residual is not None or pre is not None
        sizes = (m, n, k, batch)
        config = matmul_config(
            *sizes, dtype, precision, units, fused, target, batch_invariant=batch_invariant
        )
    block_m, block_n, block_k, splits = (
        config.block_m,
        config.block_n,
        config.block_k,
        config.splits,
    )
    divisor_a = common_divisor(stride_am if a_unit == "k" else stride_ak, *a_batch)
    divisor_b = common_divisor(stride_bn if b_unit == "k" else stride_bk, *b_batch)
    divisor = min(divisor_a, divisor_b)
    # A stride may be a number of rows, by which an invariant product is not cut.
    if not batch_invariant and loads_single_elements(divisor, a.element_size(), target):
        if splits == 1 and (residual is not None or pre is not None):
            # These are as many single elements as the sums.
            block_n = min(block_n, SMALLEST_LARGE_BLOCK)
        block_k = block_k_of_single_elements(block_m + block_n, block_k, config.num_warps, target)
    # Nothing is added, and nothing rounded, before all splits are.
    sums = None
    if splits > 1:
        dtype = torch.float64 if a.dtype is torch.float64 else torch.float32
        sums = torch.empty(batch, splits, m, n, dtype=dtype, device=a.device)
    tail = "k" not in (a_unit, b_unit) or k % block_k != 0
    stride_rm = 0 if residual is None else residual.stride(0)
    reach = max(
        block_m * stride_am + block_k * stride_ak,
        block_k * stride_bk + block_n * stride_bn,
        block_m * max(n, stride_rm) + block_n,
    )
    programs = cdiv(m, block_m) * cdiv(n, block_n) * splits * batch
    if config.persistent:
        programs = min(programs, target.multiprocessors)
    whole = sums is None
    matmul_kernel.launch(
        (programs,),
        a_ptr=a,
        b_ptr=b,
        bias_ptr=bias if whole else None,
        residual_ptr=residual if whole else None,
        out_ptr=out if whole else sums,
        pre_ptr=pre if whole else None,
        stride_a_outer=a_batch[0],
        stride_a_inner=a_batch[1],
        stride_am=stride_am,
        stride_ak=stride_ak,
        stride_b_outer=b_batch[0],
        stride_b_inner=b_batch[1],
        stride_bk=stride_bk,
        stride_bn=stride_bn,
        stride_rm=stride_rm,
        outer=outer,
        inner=inner,
        m=m,
        n=n,
        k=k,
        splits=splits,
        PRECISION=precision,
        ACTIVATION=activation if whole else None,
        A_UNIT=a_unit,
        B_UNIT=b_unit,
        TAIL=tail,
        FAR_APART=reach >= FAR,
        DIVISOR_A=divisor_a,
        DIVISOR_B=divisor_b,
        DIVISOR_R=common_divisor(stride_rm),
        DIVISOR_M=common_divisor(m) if a_unit == "m" else 1,
        DIVISOR_N=common_divisor(n),
        DIVISOR_K=common_divisor(k) if "k" in (a_unit, b_unit) else 1,
        PERSISTENT=config.persistent,
        SPLIT=splits > 1,
        GROUP_M=config.group_m,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if sums is not None:
        sum_splits(sums, bias, residual, out, pre, activation)


def matmul_forward(
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype,
    precision: str,
    batch_invariant: bool,
) -> torch.Tensor:
    """Launch a @ b: (..., M, K) and (..., K, N), with equal leading dimensions."""
    out = torch.empty(*a.shape[:-1], b.shape[-1], dtype=out_dtype, device=a.device)
    launch_product(a, b, out, precision, batch_invariant=batch_invariant)
    return out


def matmul_accumulate(
    total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, precision: str, batch_invariant: bool
) -> torch.Tensor:
    """Launch total += a @ b in place: matrices, of which total is contiguous."""
    launch_product(a, b, total, precision, residual=total, batch_invariant=batch_invariant)
    return total


def linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
    keep: int,
    precision: str,
    activation: str | None,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch activation(x @ weight^T + bias) + residual: (y, what is activated if `keep`).

    x is (..., K), weight (N, K), residual (..., N).
    """
    y = torch.empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype, device=x.device)
    pre = torch.empty_like(y, dtype=x.dtype) if keep else None
    if residual is not None:
        residual = _matrix(residual)
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    launch_product(
        _matrix(x),
        weight.t(),
        _matrix(y),
        precision,
        bias=None if bias is None else bias.contiguous(),
        residual=residual,
        pre=pre,
        activation=activation,
        batch_invariant=batch_invariant,
    )
    return y, pre


def linear_weight_gradient(
    dpre: torch.Tensor, x: torch.Tensor, out_dtype: torch.dtype, precision: str
) -> torch.Tensor:
    """Launch dpre^T @ x: the sum over all rows of (..., N) and (..., K), as (N, K)."""
    return matmul_forward(_matrix(dpre).t(), _matrix(x), out_dtype, precision, False)


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """(..., cols) as (rows, cols), which copies unless rows are at one distance."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
