"""The Triton functions of the library's own score terms and masks, and their names.

What each function is given and returns is said in attention_composition.py. The classes that users
meet stand in fastattn/ops/attention/terms.py; they name what is defined here.
"""

import triton
import triton.language as tl

from ..common import tanh
from .composition import (
    LOG2E,
    MaskFunctions,
    ScoreFunctions,
    define,
)

# Causal attention and sliding windows. The last query stands at the last key, or, as torch has it,
# the first query at the first key.


@triton.jit
def shift_of(place):
    """The key at which query 0 stands when the last query stands at the last key."""
    return place[3] - place[2]


@triton.jit
def causal_keep(m, n, place, args):
    return n <= m + shift_of(place)


@triton.jit
def causal_key_range(first, last, place, args):
    shift = shift_of(place)
    return 0, last + shift + 1, 0, first + shift + 1


@triton.jit
def causal_query_range(first, last, place, args):
    shift = shift_of(place)
    return first - shift, place[2], last - shift, place[2]


@triton.jit
def right_keep(m, n, place, args):
    return n <= m + shift_of(place) + args[0]


@triton.jit
def right_key_range(first, last, place, args):
    shift = shift_of(place) + args[0]
    return 0, last + shift + 1, 0, first + shift + 1


@triton.jit
def right_query_range(first, last, place, args):
    shift = shift_of(place) + args[0]
    return first - shift, place[2], last - shift, place[2]


@triton.jit
def left_keep(m, n, place, args):
    return n >= m + shift_of(place) - args[0]


@triton.jit
def left_key_range(first, last, place, args):
    shift = shift_of(place) - args[0]
    return first + shift, place[3], last + shift, place[3]


@triton.jit
def left_query_range(first, last, place, args):
    shift = shift_of(place) - args[0]
    return 0, last - shift + 1, 0, first - shift + 1


@triton.jit
def causal_from_first_keep(m, n, place, args):
    return n <= m


@triton.jit
def causal_from_first_key_range(first, last, place, args):
    return 0, last + 1, 0, first + 1


@triton.jit
def causal_from_first_query_range(first, last, place, args):
    return first, place[2], last, place[2]


# Key lengths: each batch element has its own number of keys that count.


@triton.jit
def key_lengths_keep(m, n, place, args):
    return n < tl.load(args[0] + place[0])


@triton.jit
def key_lengths_key_range(first, last, place, args):
    length = tl.load(args[0] + place[0])
    return 0, length, 0, length


@triton.jit
def key_lengths_query_range(first, last, place, args):
    length = tl.load(args[0] + place[0])
    end = tl.where(first < length, place[2], 0)
    return 0, end, tl.where(last < length, 0, end), end


# A boolean mask, (B, H, M, N) by strides that are 0 where it is broadcast.


@triton.jit
def boolean_mask_keep(m, n, place, args):
    stride_b, stride_h, stride_m, stride_n = args[1], args[2], args[3], args[4]
    batch, head, queries, keys, first_m, first_n = place
    base = args[0] + batch * tl.cast(stride_b, tl.int64) + head * tl.cast(stride_h, tl.int64)
    base += first_m * tl.cast(stride_m, tl.int64) + first_n * tl.cast(stride_n, tl.int64)
    offsets = (m - first_m) * stride_m + (n - first_n) * stride_n
    return tl.load(base + offsets, (m < queries) & (n < keys), other=0) != 0


@triton.jit
def far_pointers(m, n, place, args):
    """The addresses of a tile's elements where offsets within it need 64 bits."""
    base = args[0] + place[0] * tl.cast(args[1], tl.int64) + place[1] * tl.cast(args[2], tl.int64)
    return base + m * tl.cast(args[3], tl.int64) + n * tl.cast(args[4], tl.int64)


@triton.jit
def far_boolean_mask_keep(m, n, place, args):
    """The same where offsets within a tile need 64 bits."""
    pointers = far_pointers(m, n, place, args)
    return tl.load(pointers, (m < place[2]) & (n < place[3]), other=0) != 0


@triton.jit
def boolean_mask_of_rows_keep(m, n, place, args):
    """The same where keys lie next to each other and rows are aligned to 16 bytes."""
    stride_m = args[3] // 16 * 16
    batch, head, queries, keys, first_m, first_n = place
    base = args[0] + batch * tl.cast(args[1], tl.int64) // 16 * 16
    base += head * tl.cast(args[2], tl.int64) // 16 * 16
    base += first_m * tl.cast(stride_m, tl.int64) + first_n
    offsets = (m - first_m) * stride_m + (n - first_n)
    return tl.load(base + offsets, (m < queries) & (n < keys), other=0) != 0


# A bias, (B, H, M, N) by strides like the mask's.


@triton.jit
def additive_bias_score(score, m, n, place, args):
    base = args[0] + place[0] * tl.cast(args[1], tl.int64) + place[1] * tl.cast(args[2], tl.int64)
    base += place[4] * tl.cast(args[3], tl.int64) + place[5] * tl.cast(args[4], tl.int64)
    offsets = (m - place[4]) * args[3] + (n - place[5]) * args[4]
    bias = tl.load(base + offsets, (m < place[2]) & (n < place[3]), other=0.0)
    return score + bias.to(score.dtype)


@triton.jit
def additive_bias_of_rows_score(score, m, n, place, args):
    """The same where keys lie next to each other and all else is divisible by 16."""
    stride_m = args[3] // 16 * 16
    base = args[0] + place[0] * (tl.cast(args[1], tl.int64) // 16 * 16)
    base += place[1] * (tl.cast(args[2], tl.int64) // 16 * 16)
    base += place[4] * tl.cast(stride_m, tl.int64) + place[5]
    offsets = (m - place[4]) * stride_m + (n - place[5])
    bias = tl.load(base + offsets, (m < place[2]) & (n < place[3]), other=0.0)
    return score + bias.to(score.dtype)


@triton.jit
def far_additive_bias_score(score, m, n, place, args):
    pointers = far_pointers(m, n, place, args)
    bias = tl.load(pointers, (m < place[2]) & (n < place[3]), other=0.0)
    return score + bias.to(score.dtype)


# ALiBi: a slope a head, or a batch element and head, times the distance to the key.


@triton.jit
def alibi_score(score, m, n, place, args):
    slope = tl.load(args[0] + place[0] * args[1] + place[1] * args[2])
    return score - slope.to(score.dtype) * tl.abs(m + shift_of(place) - n)


@triton.jit
def alibi_parameter_backward(dscore, score, m, n, place, args):
    return -dscore * tl.abs(m + shift_of(place) - n)


@triton.jit
def unchanged(dscore, score, m, n, place, args):
    """The gradient of what adds to the score, and that of what is added."""
    return dscore


# A bias by distance, as T5 has it: a table (1, H, buckets), the bucket of each distance from -reach
# to reach, beyond which it stays the same, and each head's bias at these distances.


@triton.jit
def place_of_distance(m, n, place, reach):
    distance = n - m - shift_of(place)
    return tl.minimum(tl.maximum(distance, -reach), reach) + reach


@triton.jit
def bucket_index(m, n, place, args):
    return tl.load(args[1] + place_of_distance(m, n, place, args[3]))


@triton.jit
def relative_bias_score(score, m, n, place, args):
    of_head = args[2] + place[1] * (2 * args[3] + 1)
    return score + tl.load(of_head + place_of_distance(m, n, place, args[3])).to(score.dtype)


# Documents: a query sees the keys of its own document. Their numbers, (B, M) and (B, N), are
# integers of 32 or 64 bits.


@triton.jit
def same_document(m, n, place, query_ids, key_ids, stride_qb, stride_kb):
    of_query = tl.load(query_ids + place[0] * tl.cast(stride_qb, tl.int64) + m, m < place[2], 0)
    of_key = tl.load(key_ids + place[0] * tl.cast(stride_kb, tl.int64) + n, n < place[3], 0)
    return of_query == of_key


@triton.jit
def documents_keep(m, n, place, args):
    return same_document(m, n, place, args[0], args[1], args[2], args[3])


@triton.jit
def listed_documents_keep(m, n, place, args):
    return same_document(m, n, place, args[4], args[5], args[6], args[7])


# A block mask: of a listed block all is seen.


@triton.jit
def block_mask_keep(m, n, place, args):
    return (m >= 0) & (n >= 0)


@triton.jit
def all_keys(first, last, place, args):
    return 0, place[3], 0, place[3]


@triton.jit
def all_queries(first, last, place, args):
    return 0, place[2], 0, place[2]


# Softcap: cap * tanh(score / cap), exact in float32 or to 16 bits.


@triton.jit
def softcap_score(score, m, n, place, args):
    ratio = score * (1.0 / args[0])
    e = tl.exp2(ratio * (2.0 * LOG2E))
    capped = args[0] - 2.0 * args[0] / (e + 1.0)
    # Near zero that cancels, all the more the larger the cap: there, the first terms of the series.
    square = ratio * ratio
    series = square * (square * (square * (-17.0 / 315.0) + 2.0 / 15.0) - 1.0 / 3.0)
    return tl.where(square < 0.0625, score + score * series, capped)


@triton.jit
def softcap_exact_score(score, m, n, place, args):
    ratio = score / args[0]
    # A ratio so small that the cap changes no digit of the score may have lost its own.
    return tl.where(tl.abs(ratio) < 2.0**-27, score, args[0] * tanh(ratio)[0])


@triton.jit
def softcap_score_backward(dscore, score, m, n, place, args):
    e = tl.exp2(tl.abs(score) * (-2.0 * LOG2E / args[0]))
    return dscore * (4.0 * e / ((1.0 + e) * (1.0 + e)))


define(
    "causal",
    MaskFunctions(causal_keep, causal_key_range, causal_query_range, hides_last_keys=True),
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
define("boolean mask", MaskFunctions(boolean_mask_keep, loads_tiles=True))
define("boolean mask of rows", MaskFunctions(boolean_mask_of_rows_keep, loads_tiles=True))
define("far boolean mask", MaskFunctions(far_boolean_mask_keep, loads_tiles=True))
define("documents", MaskFunctions(documents_keep, loads_tiles=True))
define("listed documents", MaskFunctions(listed_documents_keep, loads_tiles=True, listed=True))
define("block mask", MaskFunctions(block_mask_keep, all_keys, all_queries, listed=True))
for name, score in (
    ("additive bias", additive_bias_score),
    ("additive bias of rows", additive_bias_of_rows_score),
    ("far additive bias", far_additive_bias_score),
):
    define(
        name,
        ScoreFunctions(
            score, unchanged, parameter_backward=unchanged, hides=True, loads_tiles=True
        ),
    )
define(
    "relative bias",
    ScoreFunctions(
        relative_bias_score,
        unchanged,
        parameter_backward=unchanged,
        index=bucket_index,
        loads_tiles=True,
    ),
)
define("alibi", ScoreFunctions(alibi_score, unchanged, alibi_parameter_backward))
define("softcap", ScoreFunctions(softcap_score, softcap_score_backward))
define("softcap exact", ScoreFunctions(softcap_exact_score, softcap_score_backward))
