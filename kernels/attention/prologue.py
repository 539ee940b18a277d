"""How each of attention's kernels begins: where its program is, and in which sequences."""

import triton
import triton.language as tl

from .functions import Place
from .order import find_program
from .views import find_sequence


@triton.jit
def locate(batch, head, first_m, first_n, queries_view, keys_view):
    """The place of a tile, and the sequences of its queries and of its keys."""
    queries = find_sequence(queries_view, batch)
    keys = find_sequence(keys_view, batch)
    return Place(batch, head, queries.length, keys.length, first_m, first_n), queries, keys


@triton.jit
def locate_queries(
    queries_view,
    keys_view,
    pairs,
    pairs_of_group,
    groups,
    TERMS: tl.constexpr,
    HEADS: tl.constexpr,
    CUT: tl.constexpr,
):
    """`locate` for a program with a tile of queries of one head.

    `pairs` is the number of sequences times that of heads. Heads that share keys are neighbours in
    the grid, see order.py, and where earlier queries see fewer keys the last tiles come first.
    """
    program = find_program(pairs, pairs_of_group, groups)
    tile = program.tile
    if TERMS.hides_last:
        tile = program.tiles - 1 - tile
    return locate(
        program.pair // HEADS.count,
        program.pair % HEADS.count,
        tile * CUT.block_m,
        0,
        queries_view,
        keys_view,
    )


@triton.jit
def locate_keys(
    queries_view, keys_view, pairs, pairs_of_group, groups, HEADS: tl.constexpr, CUT: tl.constexpr
):
    """`locate` for a program with a tile of keys of one key head, and its first query head.

    `pairs` is the number of sequences times that of key heads.
    """
    program = find_program(pairs, pairs_of_group, groups)
    KEY_HEADS: tl.constexpr = HEADS.count // HEADS.group
    return locate(
        program.pair // KEY_HEADS,
        program.pair % KEY_HEADS * HEADS.group,
        0,
        program.tile * CUT.block_n,
        queries_view,
        keys_view,
    )
