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

Tiles of the output are handed out in groups of some rows of tiles, so that programs under way at
one time share operands in L2. Where there are few tiles and a long K, several programs share a
tile: each writes its own sums, and a second kernel adds them in fixed order and finishes. A
persistent launch has as many programs as the device runs at once, each taking tile after tile.
"""

import math

import torch
import triton
import triton.language as tl

from ..common import divisible
from ..config import cdiv, find_target
from ..launch import common_divisor, launchable
from ..structures import Rows, make_rows
from .config import (
    SMALLEST_LARGE_BLOCK,
    MatmulConfig,
    block_k_of_single_elements,
    loads_single_elements,
    matmul_config,
)
from .epilogue import finish, sum_splits
from .operands import Matrices, batch_axes, make_layout, neighbours, restore_matrices, view_matrices
from .tiles import FAR, choose_tile, make_cut, slice_columns, slice_rows, sum_products


@triton.jit
def compute_tile(
    index,
    a,
    b,
    bias_ptr,
    residual_view,
    pre_ptr,
    out_ptr,
    inner,
    m,
    n,
    k,
    splits,
    ACTIVATION: tl.constexpr,
    CUT: tl.constexpr,
    RESIDUAL_DIVISOR: tl.constexpr,
):
    """Tile number `index`: all of one matrix first, or of one split, then all of the next."""
    tiles = tl.cdiv(m, CUT.block_m) * tl.cdiv(n, CUT.block_n)
    tile = choose_tile(index % tiles, m, n, CUT)
    part = index // tiles
    out_ptr += part.to(tl.int64) * m * n
    matrix = (part // splits if CUT.split else part).to(tl.int64)
    a_ptr = a.pointer + (matrix // inner * a.stride_outer + matrix % inner * a.stride_inner)
    b_ptr = b.pointer + (matrix // inner * b.stride_outer + matrix % inner * b.stride_inner)
    if CUT.split:
        share = tl.cdiv(tl.cdiv(k, CUT.block_k), splits) * CUT.block_k
        first_k = part % splits * share
        a_ptr += first_k.to(tl.int64) * a.stride_col
        b_ptr += first_k.to(tl.int64) * b.stride_row
        k = tl.maximum(0, tl.minimum(k - first_k, share))
    rows = slice_rows(a_ptr, a.stride_row, a.stride_col, tile, CUT)
    columns = slice_columns(b_ptr, b.stride_row, b.stride_col, tile, CUT)
    acc = sum_products(rows, columns, None, k, CUT)
    finish(
        acc,
        tile,
        bias_ptr,
        residual_view,
        pre_ptr,
        out_ptr,
        n,
        ACTIVATION,
        CUT.far_apart,
        RESIDUAL_DIVISOR,
    )


@launchable
@triton.jit(do_not_specialize=["inner", "m", "n", "k", "splits", "parts"])
def matmul_kernel(
    a_view: Matrices,
    b_view: Matrices,
    bias_ptr,
    residual_view: Rows,
    out_ptr,
    pre_ptr,
    inner,
    m,
    n,
    k,
    splits,
    parts,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    CUT: tl.constexpr,
):
    """One program a tile of out or, where the cut is persistent, one tile after another.

    `inner` is the length of the batch's inner axis, `parts` the number of matrices times `splits`.
    """
    m = divisible(m, LAYOUT.m_divisor)
    n = divisible(n, LAYOUT.n_divisor)
    k = divisible(k, LAYOUT.k_divisor)
    a = restore_matrices(a_view, LAYOUT.a_unit == "m", LAYOUT.a_divisor)
    b = restore_matrices(b_view, LAYOUT.b_unit == "k", LAYOUT.b_divisor)
    # One grid axis holds all there is, for the others end at 65,535.
    program = tl.program_id(0)
    if CUT.persistent:
        tiles = tl.cdiv(m, CUT.block_m) * tl.cdiv(n, CUT.block_n)
        for index in range(program, tiles * parts, tl.num_programs(0)):
            compute_tile(
                index,
                a,
                b,
                bias_ptr,
                residual_view,
                pre_ptr,
                out_ptr,
                inner,
                m,
                n,
                k,
                splits,
                ACTIVATION,
                CUT,
                LAYOUT.residual_divisor,
            )
    else:
        compute_tile(
            program,
            a,
            b,
            bias_ptr,
            residual_view,
            pre_ptr,
            out_ptr,
            inner,
            m,
            n,
            k,
            splits,
            ACTIVATION,
            CUT,
            LAYOUT.residual_divisor,
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
    target = find_target(a)
    if config is None:
        dtype = str(a.dtype)[6:]
        units = a_unit + b_unit
        heavy = activation not in (None, "relu", "leaky_relu")
        fused = heavy or residual is not None or pre is not None
        sizes = (m, n, k, batch)
        config = matmul_config(
            *sizes, dtype, precision, units, fused, target, batch_invariant=batch_invariant
        )
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    splits = config.splits
    a_divisor = common_divisor(stride_am if a_unit == "k" else stride_ak, *a_batch)
    b_divisor = common_divisor(stride_bn if b_unit == "k" else stride_bk, *b_batch)
    stride_rm = 0 if residual is None else residual.stride(0)
    single = loads_single_elements(min(a_divisor, b_divisor), a.element_size(), target)
    # A stride may be a number of rows, by which an invariant product is not cut.
    if single and not batch_invariant:
        if splits == 1 and (residual is not None or pre is not None):
            # These are as many single elements as the sums.
            block_n = min(block_n, SMALLEST_LARGE_BLOCK)
        block_k = block_k_of_single_elements(block_m + block_n, block_k, config.num_warps, target)
    tail = "k" not in (a_unit, b_unit) or k % block_k != 0
    reach = max(
        block_m * stride_am + block_k * stride_ak,
        block_k * stride_bk + block_n * stride_bn,
        block_m * max(n, stride_rm) + block_n,
    )
    blocks = (block_m, block_n, block_k, config.group_m)
    cut = make_cut(*blocks, precision, tail, reach >= FAR, splits > 1, config.persistent)
    m_divisor = common_divisor(m) if a_unit == "m" else 1
    k_divisor = common_divisor(k) if "k" in (a_unit, b_unit) else 1
    divisors = (common_divisor(stride_rm), m_divisor, common_divisor(n), k_divisor)
    layout = make_layout(a_unit, b_unit, a_divisor, b_divisor, *divisors)
    programs = cdiv(m, block_m) * cdiv(n, block_n) * splits * batch
    if config.persistent:
        programs = min(programs, target.multiprocessors)
    # Nothing is added, and nothing rounded, before all splits are.
    sums = None
    if splits > 1:
        dtype = torch.float64 if a.dtype is torch.float64 else torch.float32
        sums = torch.empty(batch, splits, m, n, dtype=dtype, device=a.device)
    whole = sums is None
    residual_view = None
    if whole and residual is not None:
        residual_view = make_rows(residual, stride_rm)
    matmul_kernel.launch(
        (programs,),
        a_view=view_matrices(a, *a_batch, stride_am, stride_ak),
        b_view=view_matrices(b, *b_batch, stride_bk, stride_bn),
        bias_ptr=bias if whole else None,
        residual_view=residual_view,
        out_ptr=out if whole else sums,
        pre_ptr=pre if whole else None,
        inner=inner,
        m=m,
        n=n,
        k=k,
        splits=splits,
        parts=splits * batch,
        ACTIVATION=activation if whole else None,
        LAYOUT=layout,
        CUT=cut,
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
