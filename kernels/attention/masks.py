"""The Triton functions of the library's own masks, and their names.

What each function is given and returns is said in functions.py. The classes that users meet stand
in fastattn/ops/attention; they name what is defined here.
"""

import triton
import triton.language as tl

from .composition import define
from .functions import MaskFunctions
from .places import (
    exists,
    exists_in_rows,
    far_pointers,
    find_shift,
    near_pointers,
    row_pointers,
    shared_far_pointers,
    shared_near_pointers,
    shared_row_pointers,
)

# Causal attention and sliding windows. The last query stands at the last key, or, as torch has it,
# the first query at the first key.


@triton.jit
def causal_keep(m, n, place, args):
    return n <= m + find_shift(place)


@triton.jit
def causal_key_range(first, last, place, args):
    shift = find_shift(place)
    return 0, last + shift + 1, 0, first + shift + 1


@triton.jit
def causal_query_range(first, last, place, args):
    shift = find_shift(place)
    return first - shift, place.queries, last - shift, place.queries


@triton.jit
def right_keep(m, n, place, args):
    (reach,) = args
    return n <= m + find_shift(place) + reach


@triton.jit
def right_key_range(first, last, place, args):
    (reach,) = args
    shift = find_shift(place) + reach
    return 0, last + shift + 1, 0, first + shift + 1


@triton.jit
def right_query_range(first, last, place, args):
    (reach,) = args
    shift = find_shift(place) + reach
    return first - shift, place.queries, last - shift, place.queries


@triton.jit
def left_keep(m, n, place, args):
    (reach,) = args
    return n >= m + find_shift(place) - reach


@triton.jit
def left_key_range(first, last, place, args):
    (reach,) = args
    shift = find_shift(place) - reach
    return first + shift, place.keys, last + shift, place.keys


@triton.jit
def left_query_range(first, last, place, args):
    (reach,) = args
    shift = find_shift(place) - reach
    return 0, last - shift + 1, 0, first - shift + 1


@triton.jit
def causal_from_first_keep(m, n, place, args):
    return n <= m


@triton.jit
def causal_from_first_key_range(first, last, place, args):
    return 0, last + 1, 0, first + 1


@triton.jit
def causal_from_first_query_range(first, last, place, args):
    return first, place.queries, last, place.queries


# Key lengths: each batch element has its own number of keys that count.


@triton.jit
def key_lengths_keep(m, n, place, args):
    (lengths,) = args
    return n < tl.load(lengths + place.batch)


@triton.jit
def key_lengths_key_range(first, last, place, args):
    (lengths,) = args
    length = tl.load(lengths + place.batch)
    return 0, length, 0, length


@triton.jit
def key_lengths_query_range(first, last, place, args):
    (lengths,) = args
    length = tl.load(lengths + place.batch)
    end = tl.where(first < length, place.queries, 0)
    return 0, end, tl.where(last < length, 0, end), end


# A boolean mask, as bytes.


@triton.jit
def load_kept(pointers, exists):
    """Where a mask is true, as a tile that is computed, which to the compiler no load is.

    Triton lays out the operand of a product by the narrowest load that goes into it, and the rows
    of scores by the latest: of bytes it would make products that add up in another order than those
    without a mask, and compute every weight twice. What a reduction gives it looks no further into.
    """
    loaded = tl.load(pointers, exists, other=0)
    return tl.max(loaded[:, :, None], 2) != 0


@triton.jit
def boolean_mask_keep(m, n, place, args):
    return load_kept(near_pointers(m, n, place, args), exists(m, n, place))


@triton.jit
def boolean_mask_of_rows_keep(m, n, place, args):
    return load_kept(row_pointers(m, n, place, args), exists_in_rows(m, n, place))


@triton.jit
def far_boolean_mask_keep(m, n, place, args):
    return load_kept(far_pointers(m, n, place, args), exists(m, n, place))


@triton.jit
def shared_boolean_mask_keep(m, n, place, args):
    return load_kept(shared_near_pointers(m, n, place, args), exists(m, n, place))


@triton.jit
def shared_boolean_mask_of_rows_keep(m, n, place, args):
    return load_kept(shared_row_pointers(m, n, place, args), exists_in_rows(m, n, place))


@triton.jit
def far_shared_boolean_mask_keep(m, n, place, args):
    return load_kept(shared_far_pointers(m, n, place, args), exists(m, n, place))


# Documents: a query sees the keys of its own document. Their numbers, (B, M) and (B, N), are
# integers of 32 or 64 bits.


@triton.jit
def same_document(m, n, place, query_ids, key_ids, stride_qb, stride_kb):
    of_query = tl.load(
        query_ids + place.batch * tl.cast(stride_qb, tl.int64) + m, m < place.queries, 0
    )
    of_key = tl.load(key_ids + place.batch * tl.cast(stride_kb, tl.int64) + n, n < place.keys, 0)
    return of_query == of_key


@triton.jit
def documents_keep(m, n, place, args):
    query_ids, key_ids, stride_qb, stride_kb = args
    return same_document(m, n, place, query_ids, key_ids, stride_qb, stride_kb)


@triton.jit
def listed_documents_keep(m, n, place, args):
    # Between the lists and their sizes, see lists.py.
    return same_document(m, n, place, args[4], args[5], args[6], args[7])


# A block mask: of a listed block all is seen.


@triton.jit
def block_mask_keep(m, n, place, args):
    return (m >= 0) & (n >= 0)


@triton.jit
def all_keys(first, last, place, args):
    return 0, place.keys, 0, place.keys


@triton.jit
def all_queries(first, last, place, args):
    return 0, place.queries, 0, place.queries


define(
    "causal",
    MaskFunctions(
        causal_keep,
        causal_key_range,
        causal_query_range,
        hides_last_keys=True,
        ends_with_keys=True,
    ),
)
define(
    "right",
    MaskFunctions(right_keep, right_key_range, right_query_range, hides_last_keys=True),
)
define(
    "left",
    MaskFunctions(left_keep, left_key_range, left_query_range, hides_first_keys=True),
)
define(
    "causal from first",
    MaskFunctions(
        causal_from_first_keep,
        causal_from_first_key_range,
        causal_from_first_query_range,
        hides_last_keys=True,
    ),
)
define(
    "key lengths",
    MaskFunctions(key_lengths_keep, key_lengths_key_range, key_lengths_query_range),
)
for name, keep in (
    ("boolean mask", boolean_mask_keep),
    ("boolean mask of rows", boolean_mask_of_rows_keep),
    ("far boolean mask", far_boolean_mask_keep),
    ("shared boolean mask", shared_boolean_mask_keep),
    ("shared boolean mask of rows", shared_boolean_mask_of_rows_keep),
    ("far shared boolean mask", far_shared_boolean_mask_keep),
):
    define(name, MaskFunctions(keep, loads_tiles=True))
define("documents", MaskFunctions(documents_keep, loads_tiles=True))
define("listed documents", MaskFunctions(listed_documents_keep, loads_tiles=True, listed=True))
define("block mask", MaskFunctions(block_mask_keep, all_keys, all_queries, listed=True))
