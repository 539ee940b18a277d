"""Views of attention's tensors and sequences, as kernels take them (see ../structures.py)."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common import divisible
from ..structures import restore_odd
from .structures import HeadRows, Sequence


class HeadsView(NamedTuple):
    """A tensor (B, H, rows, columns) whose columns lie next to each other, or one (B, H, rows)."""

    pointer: Any
    stride_b: Any
    stride_h: Any
    stride_row: Any


class SequencesView(NamedTuple):
    """The sequences of queries or of keys.

    Where sequences are packed they share one batch element and have cumulative lengths.
    """

    cumulative: Any
    """(sequences + 1,) int32; None where each batch element is a sequence."""
    rows: Any
    """How many queries or keys a batch element has."""


class DropoutView(NamedTuple):
    """What decides upon dropout: a seed, (1,) int64, and two integers."""

    seed: Any
    threshold: Any
    max_queries: Any
    """The rows that each head has in dropout's matrix."""


class BiasView(NamedTuple):
    """The gradient of a bias, a contiguous tensor (parts, matrices, H, M, N)."""

    pointer: Any
    matrices: Any
    """How many the bias has along the batch."""
    repeat: Any
    """How many batch elements in a row share one, see `move_to_shared`."""
    shared: Any
    """How many batch elements share one in all."""
    queries: Any
    keys: Any


@triton.jit
def find_rows(view, element, head, row, DIVISOR: tl.constexpr):
    """The rows of a head from `row` on."""
    stride = divisible(restore_odd(view.stride_row), DIVISOR)
    base = (
        view.pointer
        + element * divisible(restore_odd(view.stride_b), DIVISOR).to(tl.int64)
        + head * divisible(restore_odd(view.stride_h), DIVISOR).to(tl.int64)
        + row * stride.to(tl.int64)
    )
    return HeadRows(base, stride)


@triton.jit
def find_sequence(view, batch):
    """Where the sequence of a number lies."""
    if view.cumulative is None:
        return Sequence(batch, 0, restore_odd(view.rows))
    else:
        first = tl.load(view.cumulative + batch)
        return Sequence(0, first, tl.load(view.cumulative + batch + 1) - first)


@triton.jit
def find_statistics(pointer, view, sequence, head, row, HEADS: tl.constexpr):
    """The address of one query's number in a contiguous tensor (B, H, M).

    `view` has the queries of the call, of which `sequence` is one.
    """
    matrix = (sequence.element * HEADS.count + head).to(tl.int64)
    return pointer + matrix * restore_odd(view.rows) + (sequence.first + row)


def view_heads(x: torch.Tensor) -> HeadsView:
    """`x` (B, H, rows, columns) or (B, H, rows) as it lies in memory."""
    stride_b, stride_h, stride_row, *_ = x.stride()
    return HeadsView(x, 2 * stride_b + 3, 2 * stride_h + 3, 2 * stride_row + 3)
