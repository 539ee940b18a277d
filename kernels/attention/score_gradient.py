"""The gradient of a tile of scores, for the kernels that own tiles of queries or of a bias."""

import triton
import triton.language as tl

from .structures import ScoreGradient
from .terms import apply_scale, apply_scores, apply_scores_backward, weigh
from .tiles import compute_dropout, multiply_rows, take_rows


@triton.jit
def compute_score_gradient(
    tile,
    k,
    v,
    n,
    place,
    args,
    scale,
    dropout,
    TERMS: tl.constexpr,
    HEADS: tl.constexpr,
    CUT: tl.constexpr,
):
    """The gradient of the scores of a tile of queries and keys. Masks are not applied yet.

    `v` is as `hold_rows` gives it.
    """
    DK: tl.constexpr = HEADS.k
    DV: tl.constexpr = HEADS.v
    ACC: tl.constexpr = tile.delta.dtype
    m = tile.offs_m[:, None]
    q = take_rows(tile.q, DK, CUT.block_m, CUT)
    score = multiply_rows(q, k, DK, ACC, CUT)  # (BLOCK_M, BLOCK_N)
    given = ()
    if not HEADS.folded:
        score = apply_scale(score, scale, HEADS.scale)
        score, given = apply_scores(score, m, n, place, args.scores, TERMS)
    weights = weigh(score, tile.log_sum[:, None], scale, HEADS.folded)
    do = take_rows(tile.do, DV, CUT.block_m, CUT)
    v_tile = take_rows(v, DV, CUT.block_n, CUT)
    dweights = multiply_rows(do, v_tile, DV, ACC, CUT)
    if len(dropout) > 0:
        dweights *= compute_dropout(dropout, tile.offs_m, place.first_n, CUT)
    dscore = weights * (dweights - tile.delta[:, None])
    dscore, after = apply_scores_backward(dscore, given, m, n, place, args.scores, TERMS)
    return ScoreGradient(dscore, after, given)
