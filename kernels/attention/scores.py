"""The Triton functions of the library's own score terms, and their names.

What each function is given and returns is said in functions.py. The classes that users meet stand
in fastattn/ops/attention; they name what is defined here.
"""

import triton
import triton.language as tl

from ..common import tanh
from .composition import define
from .functions import ScoreFunctions
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
from .terms import LOG2E

# A bias.


@triton.jit
def additive_bias_score(score, m, n, place, args):
    bias = tl.load(near_pointers(m, n, place, args), exists(m, n, place), other=0.0)
    return score + bias.to(score.dtype)


@triton.jit
def additive_bias_of_rows_score(score, m, n, place, args):
    bias = tl.load(row_pointers(m, n, place, args), exists_in_rows(m, n, place), other=0.0)
    return score + bias.to(score.dtype)


@triton.jit
def far_additive_bias_score(score, m, n, place, args):
    bias = tl.load(far_pointers(m, n, place, args), exists(m, n, place), other=0.0)
    return score + bias.to(score.dtype)


# A bias that several batch elements share.


@triton.jit
def shared_additive_bias_score(score, m, n, place, args):
    bias = tl.load(shared_near_pointers(m, n, place, args), exists(m, n, place), other=0.0)
    return score + bias.to(score.dtype)


@triton.jit
def shared_additive_bias_of_rows_score(score, m, n, place, args):
    bias = tl.load(shared_row_pointers(m, n, place, args), exists_in_rows(m, n, place), other=0.0)
    return score + bias.to(score.dtype)


@triton.jit
def far_shared_additive_bias_score(score, m, n, place, args):
    bias = tl.load(shared_far_pointers(m, n, place, args), exists(m, n, place), other=0.0)
    return score + bias.to(score.dtype)


# ALiBi: a slope a head, or a batch element and head, times the distance to the key.


@triton.jit
def alibi_score(score, m, n, place, args):
    slopes, stride_b, stride_h = args
    slope = tl.load(slopes + place.batch * stride_b + place.head * stride_h)
    return score - slope.to(score.dtype) * tl.abs(m + find_shift(place) - n)


@triton.jit
def alibi_parameter_backward(dscore, score, m, n, place, args):
    return -dscore * tl.abs(m + find_shift(place) - n)


@triton.jit
def pass_gradient(dscore, score, m, n, place, args):
    """The gradient of what adds to the score, and that of what is added."""
    return dscore


# A bias by distance, as T5 has it: a table (1, H, buckets), the bucket of each distance from -reach
# to reach, beyond which it stays the same, and each head's bias at these distances.


@triton.jit
def place_of_distance(m, n, place, reach):
    distance = n - m - find_shift(place)
    return tl.minimum(tl.maximum(distance, -reach), reach) + reach


@triton.jit
def bucket_index(m, n, place, args):
    _table, buckets, _values, reach = args
    return tl.load(buckets + place_of_distance(m, n, place, reach))


@triton.jit
def relative_bias_score(score, m, n, place, args):
    _table, _buckets, values, reach = args
    of_head = values + place.head * (2 * reach + 1)
    return score + tl.load(of_head + place_of_distance(m, n, place, reach)).to(score.dtype)


# Softcap: cap * tanh(score / cap), exact in float32 or to 16 bits.


@triton.jit
def softcap_score(score, m, n, place, args):
    (cap,) = args
    ratio = score * (1.0 / cap)
    e = tl.exp2(ratio * (2.0 * LOG2E))
    capped = cap - 2.0 * cap / (e + 1.0)
    # Near zero that cancels, all the more the larger the cap: there, the first terms of the series.
    square = ratio * ratio
    series = square * (square * (square * (-17.0 / 315.0) + 2.0 / 15.0) - 1.0 / 3.0)
    return tl.where(square < 0.0625, score + score * series, capped)


@triton.jit
def softcap_exact_score(score, m, n, place, args):
    (cap,) = args
    ratio = score / cap
    # A ratio so small that the cap changes no digit of the score may have lost its own.
    return tl.where(tl.abs(ratio) < 2.0**-27, score, cap * tanh(ratio)[0])


@triton.jit
def softcap_score_backward(dscore, score, m, n, place, args):
    (cap,) = args
    e = tl.exp2(tl.abs(score) * (-2.0 * LOG2E / cap))
    return dscore * (4.0 * e / ((1.0 + e) * (1.0 + e)))


for name, score in (
    ("additive bias", additive_bias_score),
    ("additive bias of rows", additive_bias_of_rows_score),
    ("far additive bias", far_additive_bias_score),
    ("shared additive bias", shared_additive_bias_score),
    ("shared additive bias of rows", shared_additive_bias_of_rows_score),
    ("far shared additive bias", far_shared_additive_bias_score),
):
    functions = ScoreFunctions(
        score, pass_gradient, parameter_backward=pass_gradient, hides=True, loads_tiles=True
    )
    define(name, functions._replace(shared="shared" in name))
define(
    "relative bias",
    ScoreFunctions(
        relative_bias_score,
        pass_gradient,
        parameter_backward=pass_gradient,
        index=bucket_index,
        loads_tiles=True,
    ),
)
define("alibi", ScoreFunctions(alibi_score, pass_gradient, alibi_parameter_backward))
define("softcap", ScoreFunctions(softcap_score, softcap_score_backward))
define("softcap exact", ScoreFunctions(softcap_exact_score, softcap_score_backward))
