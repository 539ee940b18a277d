r"""Rotary positions: each pair (a, b) of a head's columns is turned by the angle of its position.

    (a', b') = (a cos - b sin, b cos + a sin)

A head has head_dim columns, the first 2 half of which are turned: column i makes a pair with
column i + half or, INTERLEAVED, column 2i with 2i + 1. The other columns are copied. cos and sin
have a row of `half` numbers for each position, or for each token.

The map is linear and its transpose is the same with -sin (INVERSE): that is the backward, of which
nothing is saved but cos and sin. All is computed in float32, or in float64 for float64 tensors, and
rounded once.

A token whose position has no row in the tables comes out as NaN, for positions on a GPU cannot be
looked at without waiting for it.
"""

import torch
import triton
import triton.language as tl

from .common import accumulator_dtype, divisible
from .config import cdiv, rotary_config, target_of
from .launch import common_divisor, launchable


@triton.jit
def sequence_start(cu_seqlens_ptr, token, sequences, search_steps):
    """Where the sequence of each token starts: the last boundary that is not past it."""
    low = tl.zeros_like(token)
    high = low + sequences
    for _ in range(search_steps):
        middle = (low + high + 1) // 2
        reached = tl.load(cu_seqlens_ptr + middle) <= token
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return tl.load(cu_seqlens_ptr + low).to(tl.int64)


@triton.jit
def rotate_heads(
    x_ptr,
    y_ptr,
    x_row,
    y_row,
    stride_xh,
    stride_yh,
    first_head,
    heads,
    cos,
    sin,
    mask_m,
    half,
    head_dim,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Turn up to HEADS heads of BLOCK_M tokens, whose offsets are x_row and y_row, (BLOCK_M,)."""
    offs_n = tl.arange(0, BLOCK_N)
    mask = mask_m[:, None] & (offs_n < half)[None, :]
    for head in range(first_head, tl.minimum(first_head + HEADS, heads)):
        x_rows = x_ptr + (x_row + head * stride_xh)[:, None]  # (BLOCK_M, 1)
        y_rows = y_ptr + (y_row + head * stride_yh)[:, None]
        if INTERLEAVED:
            offs_pair = tl.arange(0, 2 * BLOCK_N)
            mask_pair = mask_m[:, None] & (offs_pair < 2 * half)[None, :]
            pairs = tl.load(x_rows + offs_pair[None, :], mask_pair, other=0.0)
            a, b = tl.split(tl.reshape(pairs, (BLOCK_M, BLOCK_N, 2)))
        else:
            a = tl.load(x_rows + offs_n[None, :], mask, other=0.0)
            b = tl.load(x_rows + half + offs_n[None, :], mask, other=0.0)
        a, b = a.to(cos.dtype), b.to(cos.dtype)
        turned_a = (a * cos - b * sin).to(y_ptr.dtype.element_ty)
        turned_b = (b * cos + a * sin).to(y_ptr.dtype.element_ty)
        if INTERLEAVED:
            offs_pair = tl.arange(0, 2 * BLOCK_N)
            mask_pair = mask_m[:, None] & (offs_pair < 2 * half)[None, :]
            turned = tl.reshape(tl.join(turned_a, turned_b), (BLOCK_M, 2 * BLOCK_N))
            tl.store(y_rows + offs_pair[None, :], turned, mask_pair)
        else:
            tl.store(y_rows + offs_n[None, :], turned_a, mask)
            tl.store(y_rows + half + offs_n[None, :], turned_b, mask)
        if BLOCK_REST > 0:
            offs_rest = 2 * half + tl.arange(0, BLOCK_REST)
            mask_rest = mask_m[:, None] & (offs_rest < head_dim)[None, :]
            rest = tl.load(x_rows + offs_rest[None, :], mask_rest, other=0.0)
            tl.store(y_rows + offs_rest[None, :], rest, mask_rest)


# Everything but the columns of a head may change from call to call.
VARYING = [
    *(f"stride_{name}{dim}" for name in ("q", "k", "qy", "ky") for dim in "bhs"),
    *("stride_tb", "stride_ts", "stride_pb", "stride_ps"),
    *("length", "q_heads", "k_heads", "table_rows"),
    *("offset", "sequences", "search_steps"),
]


@launchable
@triton.jit(do_not_specialize=VARYING)
def rotary_kernel(
    # tensors
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    cu_seqlens_ptr,
    q_out_ptr,
    k_out_ptr,
    # strides
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_qyb,
    stride_qyh,
    stride_qys,
    stride_kyb,
    stride_kyh,
    stride_kys,
    stride_tb,
    stride_ts,
    stride_pb,
    stride_ps,
    # sizes
    length,
    q_heads,
    k_heads,
    table_rows,
    half,
    head_dim,
    # scalars
    offset,
    sequences,
    search_steps,
    # flags
    BY_TOKEN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    # blocks
    DIVISOR: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """One program BLOCK_M tokens of one batch entry and HEADS heads of q, or of k.

    BY_TOKEN, the tables have a row for each token; otherwise one for each position.
    """
    stride_qb = divisible(stride_qb, DIVISOR)
    stride_qh = divisible(stride_qh, DIVISOR)
    stride_qs = divisible(stride_qs, DIVISOR)
    stride_qyb = divisible(stride_qyb, DIVISOR)
    stride_qyh = divisible(stride_qyh, DIVISOR)
    stride_qys = divisible(stride_qys, DIVISOR)
    stride_tb = divisible(stride_tb, DIVISOR)
    stride_ts = divisible(stride_ts, DIVISOR)
    half = divisible(half, DIVISOR)
    ACC: tl.constexpr = accumulator_dtype(q_ptr)

    # One grid axis holds everything, for the others end at 65,535.
    q_chunks = tl.cdiv(q_heads, HEADS)
    chunks = q_chunks
    if k_ptr is not None:
        chunks += tl.cdiv(k_heads, HEADS)
    tiles = tl.cdiv(length, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    chunk = program % chunks
    batch = program // chunks // tiles
    token = program // chunks % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    mask_m = token < length

    table_row = token
    if not BY_TOKEN:
        if positions_ptr is not None:
            position_offsets = batch * stride_pb + token * stride_ps
            table_row = tl.load(positions_ptr + position_offsets, mask_m, other=0).to(tl.int64)
        elif cu_seqlens_ptr is not None:
            start = sequence_start(cu_seqlens_ptr, token, sequences, search_steps)
            table_row = token - start + offset
        else:
            table_row = token + offset
    offs_n = tl.arange(0, BLOCK_N)
    has_row = mask_m & (table_row >= 0) & (table_row < table_rows)
    mask_table = has_row[:, None] & (offs_n < half)[None, :]
    table_offsets = (batch * stride_tb + table_row * stride_ts)[:, None] + offs_n[None, :]
    cos = tl.load(cos_ptr + table_offsets, mask_table, other=float("nan")).to(ACC)
    sin = tl.load(sin_ptr + table_offsets, mask_table, other=float("nan")).to(ACC)
    if INVERSE:
        sin = -sin

    if chunk < q_chunks:
        rotate_heads(
            q_ptr,
            q_out_ptr,
            batch * stride_qb + token * stride_qs,
            batch * stride_qyb + token * stride_qys,
            stride_qh,
            stride_qyh,
            chunk * HEADS,
            q_heads,
            cos,
            sin,
            mask_m,
            half,
            head_dim,
            INTERLEAVED,
            HEADS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_REST,
        )
    elif k_ptr is not None:
        stride_kb = divisible(stride_kb, DIVISOR)
        stride_kh = divisible(stride_kh, DIVISOR)
        stride_ks = divisible(stride_ks, DIVISOR)
        stride_kyb = divisible(stride_kyb, DIVISOR)
        stride_kyh = divisible(stride_kyh, DIVISOR)
        stride_kys = divisible(stride_kys, DIVISOR)
        rotate_heads(
            k_ptr,
            k_out_ptr,
            batch * stride_kb + token * stride_ks,
            batch * stride_kyb + token * stride_kys,
            stride_kh,
            stride_kyh,
            (chunk - q_chunks) * HEADS,
            k_heads,
            cos,
            sin,
            mask_m,
            half,
            head_dim,
            INTERLEAVED,
            HEADS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_REST,
        )


def rotary_forward(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    offset: int,
    q_heads_inside: int,
    k_heads_inside: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the rotation of q (B, H, S, D) and k (B, Hkv, S, D), or of q alone.

    The backward is the same launch on the gradients, with `inverse` turned over.

    Args:
        q, k: with any strides; tensors without a unit last stride are copied.
        cos, sin: (positions, half), or (B or 1, S, half), a row for each token.
        positions: (S,) or (B or 1, S) integers.
        cu_seqlens: (sequences + 1,) integers.
        offset: added to positions that are counted here.
        q_heads_inside, k_heads_inside: whether the outputs lie in memory as (B, S, H, D).
    """
    q_out = _empty_heads(q, q_heads_inside)
    k_out = None if k is None else _empty_heads(k, k_heads_inside)
    batches, q_heads, length, head_dim = q.shape
    half = cos.shape[-1]
    k_heads = 0 if k is None else k.shape[1]
    if batches * length * (q_heads + k_heads) * head_dim == 0:
        return q_out, k_out

    q = _with_unit_stride(q)
    strides = [*q.stride()[:3], 0, 0, 0, *q_out.stride()[:3], 0, 0, 0]
    if k is not None and k_out is not None:
        k = _with_unit_stride(k)
        strides[3:6], strides[9:12] = k.stride()[:3], k_out.stride()[:3]
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    by_token = cos.dim() == 3
    stride_tb = cos.stride(0) if by_token and cos.shape[0] > 1 else 0
    stride_pb = stride_ps = 0
    if positions is not None:
        stride_ps = positions.stride(-1)
        if positions.dim() == 2 and positions.shape[0] > 1:
            stride_pb = positions.stride(0)

    sequences = 0
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
        sequences = cu_seqlens.shape[0] - 1
    config = rotary_config(half, target_of(q))
    chunks = cdiv(q_heads, config.heads) + cdiv(k_heads, config.heads)
    rest = head_dim - 2 * half
    rotary_kernel.launch(
        (batches * cdiv(length, config.block_m) * chunks,),
        q_ptr=q,
        k_ptr=k,
        cos_ptr=cos,
        sin_ptr=sin,
        positions_ptr=positions,
        cu_seqlens_ptr=cu_seqlens,
        q_out_ptr=q_out,
        k_out_ptr=k_out,
        **dict(zip(VARYING[:12], strides, strict=True)),
        stride_tb=stride_tb,
        stride_ts=cos.stride(-2),
        stride_pb=stride_pb,
        stride_ps=stride_ps,
        length=length,
        q_heads=q_heads,
        k_heads=k_heads,
        table_rows=cos.shape[-2],
        half=half,
        head_dim=head_dim,
        offset=offset,
        sequences=sequences,
        search_steps=sequences.bit_length(),
        BY_TOKEN=by_token,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        DIVISOR=common_divisor(half, stride_tb, cos.stride(-2), *strides),
        HEADS=config.heads,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=config.num_warps,
    )
    return q_out, k_out


def _empty_heads(x: torch.Tensor, heads_inside: int) -> torch.Tensor:
    """An uninitialised tensor shaped like x, (B, H, S, D), that lies in memory as said."""
    batches, heads, length, head_dim = x.shape
    if heads_inside:
        return x.new_empty(batches, length, heads, head_dim).transpose(1, 2)
    return x.new_empty(batches, heads, length, head_dim)


def _with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
