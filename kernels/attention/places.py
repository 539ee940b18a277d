"""What kernels and terms do with the place of a tile."""

import triton
import triton.language as tl

from .functions import Place


@triton.jit
def find_shift(place):
    """The key at which query 0 stands when the last query stands at the last key."""
    return place.keys - place.queries


# A tensor (B, H, M, N) by strides that are 0 where it is broadcast: addresses of a tile's elements.


@triton.jit
def near_pointers(m, n, place, args):
    pointer, stride_b, stride_h, stride_m, stride_n = args
    base = pointer + place.batch * tl.cast(stride_b, tl.int64)
    base += place.head * tl.cast(stride_h, tl.int64)
    base += place.first_m * tl.cast(stride_m, tl.int64) + place.first_n * tl.cast(
        stride_n, tl.int64
    )
    return base + ((m - place.first_m) * stride_m + (n - place.first_n) * stride_n)


@triton.jit
def row_pointers(m, n, place, args):
    """The same where keys lie next to each other, and 16 divides all else and their number."""
    pointer, stride_b, stride_h, stride_m, _stride_n = args
    stride_m = stride_m // 16 * 16
    base = pointer + place.batch * (tl.cast(stride_b, tl.int64) // 16 * 16)
    base += place.head * (tl.cast(stride_h, tl.int64) // 16 * 16)
    base += place.first_m * tl.cast(stride_m, tl.int64) + place.first_n
    return base + ((m - place.first_m) * stride_m + (n - place.first_n))


@triton.jit
def far_pointers(m, n, place, args):
    """The same where offsets within a tile need 64 bits."""
    pointer, stride_b, stride_h, stride_m, stride_n = args
    base = pointer + place.batch * tl.cast(stride_b, tl.int64)
    base += place.head * tl.cast(stride_h, tl.int64)
    return base + m * tl.cast(stride_m, tl.int64) + n * tl.cast(stride_n, tl.int64)


# The same of a tensor that several batch elements share: each matrix serves `repeat` of them one
# after another, and after `matrices` of these the first comes again.


@triton.jit
def move_to_shared(place, args):
    """The place in such a tensor, whose args end with repeat and matrices."""
    batch = place.batch // args[5] % args[6]
    return Place(batch, place.head, place.queries, place.keys, place.first_m, place.first_n)


@triton.jit
def shared_near_pointers(m, n, place, args):
    own = (args[0], args[1], args[2], args[3], args[4])
    return near_pointers(m, n, move_to_shared(place, args), own)


@triton.jit
def shared_row_pointers(m, n, place, args):
    own = (args[0], args[1], args[2], args[3], args[4])
    return row_pointers(m, n, move_to_shared(place, args), own)


@triton.jit
def shared_far_pointers(m, n, place, args):
    own = (args[0], args[1], args[2], args[3], args[4])
    return far_pointers(m, n, move_to_shared(place, args), own)


@triton.jit
def exists(m, n, place):
    return (m < place.queries) & (n < place.keys)


@triton.jit
def exists_in_rows(m, n, place):
    """The same for `row_pointers`, and for all 16 keys where it is true of the first of them.

    One load reads them together then. What it reads beyond the last key counts nowhere.
    """
    return (m < place.queries) & (n // 16 * 16 < place.keys)


@triton.jit
def move_to_key(place, first_n):
    """The place of the tile of the same queries and of the keys from first_n on."""
    return Place(place.batch, place.head, place.queries, place.keys, place.first_m, first_n)


@triton.jit
def move_to_head(place, head):
    """The same tile of another head."""
    return Place(place.batch, head, place.queries, place.keys, place.first_m, place.first_n)


@triton.jit
def move_to_query(place, first_m):
    """The place of the tile of the same keys and of the queries from first_m on."""
    return Place(place.batch, place.head, place.queries, place.keys, first_m, place.first_n)
