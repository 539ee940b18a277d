"""How decode attention reads its caches: contiguous or in pages, as the queries or of 8 bits."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..attention.structures import HeadRows
from ..attention.tiles import load_rows
from ..attention.views import find_rows
from ..structures import restore_odd
from .eight_bits import decode_e4m3


class PagesView(NamedTuple):
    """Which pages hold the keys of a sequence: (B, pages of a sequence) integers."""

    pointer: Any
    pages_of_sequence: Any
    pages: Any
    """How many there are in all."""


@triton.jit
def find_block(view, rows, start, offs_n, seen, pages_view, PAGE: tl.constexpr, CUT: tl.constexpr):
    """The rows of a block of keys from `start` on, and which of them lie in no page there is."""
    if pages_view is None:
        return find_rows(view, rows.batch, rows.key_head, start, CUT.divisor), ()
    else:
        pages_of_sequence = restore_odd(pages_view.pages_of_sequence)
        table = pages_view.pointer + rows.batch.to(tl.int64) * pages_of_sequence
        pages = restore_odd(pages_view.pages)
        if PAGE % CUT.block_n == 0:
            page = tl.load(table + start // PAGE).to(tl.int64)
            missing = (page < 0) | (page >= pages)
            page = tl.where(missing, 0, page)
            return find_rows(view, page, rows.key_head, start % PAGE, CUT.divisor), (missing,)
        else:
            page = tl.load(table + offs_n // PAGE, seen, other=0).to(tl.int64)
            missing = (page < 0) | (page >= pages)
            page = tl.where(missing, 0, page)
            found = find_rows(view, page, rows.key_head, offs_n % PAGE, CUT.divisor)
            return HeadRows(found.base[:, None], 0), (missing[None, :],)


@triton.jit
def decode_chunk(chunk, DTYPE: tl.constexpr):
    """Numbers of a cache in the dtype of the queries."""
    if chunk.dtype == DTYPE:
        return chunk
    elif chunk.dtype == tl.uint8:
        return decode_e4m3(chunk).to(DTYPE)
    else:
        return chunk.to(tl.float32).to(DTYPE)


@triton.jit
def load_cached(
    block, seen, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr
):
    """The rows of a block that are `seen`, the others as zeros."""
    loaded = load_rows(block, seen, COLUMNS, BLOCK, WIDE)
    if COLUMNS.tail == 0:
        return (decode_chunk(loaded[0], DTYPE),)
    else:
        return (decode_chunk(loaded[0], DTYPE), decode_chunk(loaded[1], DTYPE))
