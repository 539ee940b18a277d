"""The gradient of a tile of scores, for the kernels that own tiles of queries or of a bias."""

import triton
import triton.language as tl

from .composition import composed_score, composed_score_backward, scaled, weight_of
from .tiles import dot_of_rows, dropout_factor, in_hand


@triton.jit
def score_gradient(
    # tiles
    q,
    k,
    v,
    do,
    lse,
    delta,
    offs_m,
    n,
    place,
    # scalars and arguments
    scale,
    dropout,
    score_args,
    # flags
    SCORES: tl.constexpr,
    SCORES_BACKWARD: tl.constexpr,
    SCALE: tl.constexpr,
    FOLDED: tl.constexpr,
    RELOADS: tl.constexpr,
    PRECISION: tl.constexpr,
    # blocks
    DK: tl.constexpr,
    DK_WIDTH: tl.constexpr,
    DK_TAIL: tl.constexpr,
    DV: tl.constexpr,
    DV_WIDTH: tl.constexpr,
    DV_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of a tile's scores (BLOCK_M, BLOCK_N): before all terms, after each of them from
    the last to the first, and what each was given. Masks have not been applied yet.

    q, do and v are as `held_tile` gives them.
    """
    ACC: tl.constexpr = delta.dtype
    m = offs_m[:, None]
    own_q = in_hand(q, DK_WIDTH, DK_TAIL, DK, RELOADS)
    score = dot_of_rows(own_q, k, DK_TAIL, ACC, PRECISION)  # (BLOCK_M, BLOCK_N)
    given = ()
    if not FOLDED:
        score = scaled(score, scale, SCALE)
        score, given = composed_score(score, m, n, place, score_args, SCORES)
    weights = weight_of(score, lse[:, None], scale, FOLDED)
    own_do = in_hand(do, DV_WIDTH, DV_TAIL, DV, RELOADS)
    own_v = in_hand(v, DV_WIDTH, DV_TAIL, DV, RELOADS)
    dweights = dot_of_rows(own_do, own_v, DV_TAIL, ACC, PRECISION)
    if len(dropout) > 0:
        dweights *= dropout_factor(dropout, offs_m, place[5], BLOCK_M, BLOCK_N)
    dscore = weights * (dweights - delta[:, None])
    dscore, after = composed_score_backward(dscore, given, m, n, place, score_args, SCORES_BACKWARD)
    return dscore, after, given
