"""Operands of a product as a kernel can walk them: a unit stride, and at most two batch axes."""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common import divisible
from ..launch import MOST_BOUND
from ..structures import new_view, restore_stride


class Matrices(NamedTuple):
    """A batch of matrices along two axes, `outer` and `inner`, of which each may be 1 long."""

    pointer: Any
    stride_outer: Any
    stride_inner: Any
    stride_row: Any
    stride_col: Any


class Layout(NamedTuple):
    """How the operands and the residual of a product lie: all that is compiled for.

    Sizes and strides are not specialised, because any of them may be a number of tokens. What the
    compiler may rely on are their divisors, and those matter where elements are neighbours.
    """

    a_unit: str
    """The dimension along which a's elements are neighbours: "m" or "k"."""
    b_unit: str
    """The same of b: "k" or "n"."""
    a_divisor: int
    """What divides all strides of a but that of its neighbours."""
    b_divisor: int
    residual_divisor: int
    m_divisor: int
    n_divisor: int
    k_divisor: int


# Made once: to make a named tuple takes longer than to find it.
make_layout = functools.lru_cache(MOST_BOUND)(Layout)


def view_matrices(
    x: torch.Tensor, stride_outer: int, stride_inner: int, stride_row: int, stride_col: int
) -> Matrices:
    """A view of `x` by these strides, each made odd (see structures.py)."""
    batch = 2 * stride_outer + 3, 2 * stride_inner + 3
    return new_view(Matrices, (x, *batch, 2 * stride_row + 3, 2 * stride_col + 3))


@triton.jit
def restore_matrices(view, TRANSPOSED: tl.constexpr, DIVISOR: tl.constexpr):
    """The matrices of a view, whose neighbours lie in a row or, TRANSPOSED, in a column."""
    stride_row = 1
    stride_col = 1
    if TRANSPOSED:
        stride_col = divisible(restore_stride(view.stride_col), DIVISOR)
    else:
        stride_row = divisible(restore_stride(view.stride_row), DIVISOR)
    return Matrices(
        view.pointer,
        divisible(restore_stride(view.stride_outer), DIVISOR),
        divisible(restore_stride(view.stride_inner), DIVISOR),
        stride_row,
        stride_col,
    )


def neighbours(x: torch.Tensor, rows: str, cols: str) -> tuple[torch.Tensor, int, int, str]:
    """An operand, the strides of its rows and columns, and which of the two has neighbours."""
    stride_rows, stride_cols = x.stride()[-2:]
    if stride_cols == 1:
        return x, stride_rows, 1, cols
    if stride_rows == 1:
        return x, 1, stride_cols, rows
    # A single element has any stride.
    if x.shape[-1] == 1:
        return x, stride_rows, 1, cols
    if x.shape[-2] == 1:
        return x, 1, stride_cols, rows
    x = x.contiguous()
    return x, x.stride(-2), 1, cols


Axes = tuple[int, int]


def batch_axes(
    a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Axes, Axes, Axes]:
    """The leading dimensions as two: (a, b, their sizes, strides of a, strides of b).

    Dimensions that both operands step through evenly become one. If more than two remain, the
    operands are copied, and one remains.
    """
    axes: list[tuple[int, int, int]] = []
    for size, step_a, step_b in zip(
        reversed(a.shape[:-2]), reversed(a.stride()[:-2]), reversed(b.stride()[:-2]), strict=True
    ):
        if size == 1:
            continue
        if axes:
            inside, inside_a, inside_b = axes[-1]
            if step_a == inside * inside_a and step_b == inside * inside_b:
                axes[-1] = (inside * size, inside_a, inside_b)
                continue
        axes.append((size, step_a, step_b))
    if len(axes) > 2:
        return batch_axes(_evenly(a), _evenly(b))
    axes += [(1, 0, 0)] * (2 - len(axes))
    (inner, inner_a, inner_b), (outer, outer_a, outer_b) = axes
    return a, b, (outer, inner), (outer_a, inner_a), (outer_b, inner_b)


def _evenly(x: torch.Tensor) -> torch.Tensor:
    """A copy with one distance between all its matrices, each laid out as before."""
    if x.stride(-1) == 1:
        return x.contiguous()
    return x.mT.contiguous().mT
