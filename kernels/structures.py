"""Views: what a kernel is handed of a tensor, as one named tuple of its address and strides.

Triton takes named tuples as arguments, but compiles a kernel again where an integer among them is 1
or begins or ceases to be divisible by 16. No stride may do that, so each comes as an odd number.

A kernel declares a view by a parameter whose name ends in `_view`, annotated with its class, whose
first field is the tensor; `launchable` then knows how many strides follow. A view may be None.

    def some_kernel(x_view: Rows, cols, BLOCK: tl.constexpr):
        x_row = x_view.pointer + row * restore_odd(x_view.stride)
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .common import divisible
from .launch import flatten_rows


def make_odd(integer: int) -> int:
    """An integer as kernels get it within a tuple: odd, and never 1."""
    return 2 * integer + (3 if integer >= 0 else 1)


@triton.jit
def restore_odd(integer):
    """The integer that `make_odd` was given."""
    # The compiler may not see that none is even: where it knows that sums of such numbers do not
    # overflow, it rearranges those of attention's loops for the worse. And the shift comes after
    # a difference because from 2^31 to 2^32 the interpreter's numbers have no sign before one.
    half = tl.where(integer & 1 == 0, integer, (integer - 1) >> 1)
    return half - tl.where(integer > 0, 1, 0)


@triton.jit
def restore_stride(stride):
    """The stride that a view was given, which is never negative: that saves a choice."""
    return (stride - 3) >> 1


class Rows(NamedTuple):
    """A matrix whose columns lie next to each other."""

    pointer: Any
    stride: Any
    """From one row to the next."""


class Matrix(NamedTuple):
    """A matrix of any strides."""

    pointer: Any
    stride_row: Any
    stride_col: Any


@triton.jit
def restore_rows(view, DIVISOR: tl.constexpr):
    """Rows with their stride as it is, in a form that shows that DIVISOR divides it."""
    return Rows(view.pointer, divisible(restore_stride(view.stride), DIVISOR))


new_view = tuple.__new__
"""Makes a view of its class and a tuple of its fields, in half the time that the class takes."""


def make_rows(x: torch.Tensor, stride: int) -> Rows:
    """The rows that begin `stride` elements apart in `x`."""
    return new_view(Rows, (x, 2 * stride + 3))


def view_rows(x: torch.Tensor, cols: int) -> Rows:
    """`x` (..., cols) as rows at a common distance, see `flatten_rows`."""
    rows, stride = flatten_rows(x, cols)
    return Rows(rows, 2 * stride + 3)


def view_matrix(x: torch.Tensor) -> Matrix:
    """The matrix `x` as it lies in memory."""
    stride_row, stride_col = x.stride()
    return Matrix(x, 2 * stride_row + 3, 2 * stride_col + 3)
