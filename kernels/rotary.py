r"""Rotary positions: each pair (a, b) of a head's columns is turned by the angle of its position.

    (a', b') = (a cos - b sin, b cos + a sin)

A head has head_dim columns, the first 2 half of which are turned: column i makes a pair with
column i + half or, interleaved, column 2i with 2i + 1. The other columns are copied. cos and sin
have a row of `half` numbers for each position, or for each token; `paired`, of twice as many: each
number twice or, in one table for both, each cosine before its sine.

The map is linear and its transpose is the same with -sin (`inverse`): that is the backward, for
which nothing is saved but cos and sin. All is computed in float32, or in float64 for float64
tensors, and rounded once.

A token whose position has no row in the tables comes out as NaN, for positions on a GPU cannot be
looked at without waiting for it.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import accumulator_dtype
from .config import NARROWEST_TILE, Target, cdiv, choose_height, choose_warps, find_target
from .launch import common_divisor, launchable
from .rotary_angles import (
    Angles,
    Heads,
    Positions,
    Sequences,
    Table,
    Tokens,
    find_table_row,
    load_angles,
    restore_heads,
)
from .structures import restore_odd


@dataclass(frozen=True)
class RotaryConfig:
    """How a rotation is cut: one program block_m tokens, block_n pairs of columns, some heads."""

    block_m: int
    block_n: int
    heads: int
    """Heads that a program turns one after another by the angles it has loaded once."""
    num_warps: int


@functools.cache
def rotary_config(half: int, target: Target) -> RotaryConfig:
    """The configuration of a rotation of `half` pairs of columns."""
    block_n = max(NARROWEST_TILE // 2, triton.next_power_of_2(half))
    block_m = choose_height(block_n)
    # With eight heads, float32 tables are an eighth of what a program reads and writes in 16 bits.
    # More heads would leave few programs where sequences are short.
    return RotaryConfig(block_m, block_n, 8, choose_warps(block_m * block_n, target))


class Rotation(NamedTuple):
    """Which columns are turned, and how, as a constexpr."""

    half: int
    head_dim: int
    by_token: bool
    """Whether tables have a row for each token; otherwise they have one for each position."""
    interleaved: bool
    inverse: bool
    paired: bool
    """Whether tables have rows of pairs."""


class HeadBlocks(NamedTuple):
    """How a rotation is cut, see `RotaryConfig`, as a constexpr.

    `divisor` divides `half` and all strides, see `divisible`.
    """

    block_m: int
    block_n: int
    block_rest: int
    """A power of two that holds the columns that are copied, or 0."""
    heads: int
    divisor: int


@triton.jit
def rotate_heads(x, y, tokens, angles, first_head, ROTATION: tl.constexpr, BLOCKS: tl.constexpr):
    """Turn up to as many heads of x as a program turns, and write them to y."""
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    BLOCK_N: tl.constexpr = BLOCKS.block_n
    HALF: tl.constexpr = ROTATION.half
    cos, sin = angles
    x_row = tokens.batch * x.stride_b + tokens.offs_m * x.stride_s
    y_row = tokens.batch * y.stride_b + tokens.offs_m * y.stride_s
    offs_n = tl.arange(0, BLOCK_N)
    mask = tokens.mask_m[:, None] & (offs_n < HALF)[None, :]
    for head in range(first_head, tl.minimum(first_head + BLOCKS.heads, x.count)):
        x_rows = x.pointer + (x_row + head * x.stride_h)[:, None]  # (BLOCK_M, 1)
        y_rows = y.pointer + (y_row + head * y.stride_h)[:, None]
        if ROTATION.interleaved:
            offs_pair = tl.arange(0, 2 * BLOCK_N)
            mask_pair = tokens.mask_m[:, None] & (offs_pair < 2 * HALF)[None, :]
            pairs = tl.load(x_rows + offs_pair[None, :], mask_pair, other=0.0)
            a, b = tl.split(tl.reshape(pairs, (BLOCK_M, BLOCK_N, 2)))
        else:
            a = tl.load(x_rows + offs_n[None, :], mask, other=0.0)
            b = tl.load(x_rows + HALF + offs_n[None, :], mask, other=0.0)
        a, b = a.to(cos.dtype), b.to(cos.dtype)
        turned_a = tl.fma(-b, sin, a * cos).to(y.pointer.dtype.element_ty)
        turned_b = tl.fma(a, sin, b * cos).to(y.pointer.dtype.element_ty)
        if ROTATION.interleaved:
            offs_pair = tl.arange(0, 2 * BLOCK_N)
            mask_pair = tokens.mask_m[:, None] & (offs_pair < 2 * HALF)[None, :]
            turned = tl.reshape(tl.join(turned_a, turned_b), (BLOCK_M, 2 * BLOCK_N))
            tl.store(y_rows + offs_pair[None, :], turned, mask_pair)
        else:
            tl.store(y_rows + offs_n[None, :], turned_a, mask)
            tl.store(y_rows + HALF + offs_n[None, :], turned_b, mask)
        if BLOCKS.block_rest > 0:
            offs_rest = 2 * HALF + tl.arange(0, BLOCKS.block_rest)
            mask_rest = tokens.mask_m[:, None] & (offs_rest < ROTATION.head_dim)[None, :]
            rest = tl.load(x_rows + offs_rest[None, :], mask_rest, other=0.0)
            tl.store(y_rows + offs_rest[None, :], rest, mask_rest)


# Everything but the columns of a head may change from call to call.
@launchable
@triton.jit(do_not_specialize=["length", "offset"])
def rotary_kernel(
    q_view: Heads,
    k_view: Heads,
    q_out_view: Heads,
    k_out_view: Heads,
    cos_view: Table,
    sin_ptr,
    positions_view: Positions,
    sequences_view: Sequences,
    length,
    offset,
    ROTATION: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program BLOCK_M tokens of one batch entry and some heads of q, or of k."""
    ACC: tl.constexpr = accumulator_dtype(q_view.pointer)
    BLOCK_M: tl.constexpr = BLOCKS.block_m
    # One grid axis holds everything, for the others end at 65,535.
    q_chunks = tl.cdiv(restore_odd(q_view.count), BLOCKS.heads)
    chunks = q_chunks
    if k_view is not None:
        chunks += tl.cdiv(restore_odd(k_view.count), BLOCKS.heads)
    tiles = tl.cdiv(length, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    chunk = program % chunks
    batch = program // chunks // tiles
    offs_m = program // chunks % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    tokens = Tokens(batch, offs_m, offs_m < length)
    table_row = find_table_row(tokens, positions_view, sequences_view, offset, ROTATION.by_token)
    cos, sin = load_angles(cos_view, sin_ptr, tokens, table_row, ROTATION, BLOCKS)
    cos, sin = cos.to(ACC), sin.to(ACC)
    angles = Angles(cos, -sin if ROTATION.inverse else sin)
    if chunk < q_chunks:
        q = restore_heads(q_view, BLOCKS.divisor)
        q_out = restore_heads(q_out_view, BLOCKS.divisor)
        rotate_heads(q, q_out, tokens, angles, chunk * BLOCKS.heads, ROTATION, BLOCKS)
    elif k_view is not None:
        k = restore_heads(k_view, BLOCKS.divisor)
        k_out = restore_heads(k_out_view, BLOCKS.divisor)
        first_head = (chunk - q_chunks) * BLOCKS.heads
        rotate_heads(k, k_out, tokens, angles, first_head, ROTATION, BLOCKS)


def rotary_forward(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor | None,
    positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    offset: int,
    q_heads_inside: int,
    k_heads_inside: int,
    interleaved: bool,
    inverse: bool,
    paired: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the rotation of q (B, H, S, D) and k (B, Hkv, S, D), or of q alone.

    The backward is the same launch on the gradients, with `inverse` turned over.

    Args:
        q, k: with any strides; tensors without a unit last stride are copied.
        cos, sin: (positions, half), or (B or 1, S, half), a row for each token; `paired`, 2 half in
            place of half. Without sin, cos has each cosine before its sine.
        positions: (S,) or (B or 1, S) integers.
        cu_seqlens: (sequences + 1,) integers.
        offset: added to positions that are counted here.
        q_heads_inside, k_heads_inside: whether the outputs lie in memory as (B, S, H, D).
    """
    q_out = _empty_heads(q, q_heads_inside)
    k_out = None if k is None else _empty_heads(k, k_heads_inside)
    batches, q_heads, length, head_dim = q.shape
    half = cos.shape[-1] // 2 if paired else cos.shape[-1]
    k_heads = 0 if k is None else k.shape[1]
    if batches * length * (q_heads + k_heads) * head_dim == 0:
        return q_out, k_out

    q = _ensure_unit_stride(q)
    strides = [*q.stride()[:3], *q_out.stride()[:3]]
    if k is not None and k_out is not None:
        k = _ensure_unit_stride(k)
        strides += [*k.stride()[:3], *k_out.stride()[:3]]
    if cos.stride(-1) != 1 or (sin is not None and cos.stride() != sin.stride()):
        cos, sin = cos.contiguous(), None if sin is None else sin.contiguous()
    by_token = cos.dim() == 3
    stride_tb = cos.stride(0) if by_token and cos.shape[0] > 1 else 0
    config = rotary_config(half, find_target(q))
    rest = head_dim - 2 * half
    chunks = cdiv(q_heads, config.heads) + cdiv(k_heads, config.heads)
    rotary_kernel.launch(
        (batches * cdiv(length, config.block_m) * chunks, 1, 1),
        q_view=_view_heads(q),
        k_view=_view_heads(k),
        q_out_view=_view_heads(q_out),
        k_out_view=_view_heads(k_out),
        cos_view=Table(cos, 2 * cos.shape[-2] + 3, 2 * stride_tb + 3, 2 * cos.stride(-2) + 3),
        sin_ptr=sin,
        positions_view=_view_positions(positions),
        sequences_view=_view_sequences(cu_seqlens),
        length=length,
        offset=offset,
        ROTATION=Rotation(half, head_dim, by_token, interleaved, inverse, paired),
        BLOCKS=HeadBlocks(
            config.block_m,
            config.block_n,
            triton.next_power_of_2(rest) if rest else 0,
            config.heads,
            common_divisor(half, stride_tb, cos.stride(-2), *strides),
        ),
        num_warps=config.num_warps,
    )
    return q_out, k_out


def _empty_heads(x: torch.Tensor, heads_inside: int) -> torch.Tensor:
    """An uninitialised tensor shaped like x, (B, H, S, D), that lies in memory as said."""
    batches, heads, length, head_dim = x.shape
    if heads_inside:
        return x.new_empty(batches, length, heads, head_dim).transpose(1, 2)
    return x.new_empty(batches, heads, length, head_dim)


def _ensure_unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _view_heads(x: torch.Tensor | None) -> Heads | None:
    if x is None:
        return None
    stride_b, stride_h, stride_s, _ = x.stride()
    return Heads(x, 2 * x.shape[1] + 3, 2 * stride_b + 3, 2 * stride_h + 3, 2 * stride_s + 3)


def _view_positions(positions: torch.Tensor | None) -> Positions | None:
    if positions is None:
        return None
    each = positions.dim() == 2 and positions.shape[0] > 1
    stride_b = positions.stride(0) if each else 0
    return Positions(positions, 2 * stride_b + 3, 2 * positions.stride(-1) + 3)


def _view_sequences(cu_seqlens: torch.Tensor | None) -> Sequences | None:
    if cu_seqlens is None:
        return None
    count = cu_seqlens.shape[0] - 1
    return Sequences(cu_seqlens.contiguous(), 2 * count + 3, 2 * count.bit_length() + 3)
