"""Masks of caches: a tree of new tokens, and keys that begin later than the cache."""

import triton
import triton.language as tl

from ..attention.functions import MaskFunctions
from ..attention.masks import load_kept
from ..attention.places import find_shift


@triton.jit
def tree_keep(m, n, place, args):
    """What is before the new tokens all see; among them a table (B or 1, 1, M, M) of bytes says."""
    table, batch_step = args
    new = n - find_shift(place)
    inside = (new >= 0) & (new < place.queries) & (m < place.queries)
    base = table + place.batch * batch_step.to(tl.int64)
    return (new < 0) | load_kept(base + (m * place.queries + new), inside)


@triton.jit
def start_keep(m, n, place, args):
    (starts,) = args
    return n >= tl.load(starts + place.batch)


@triton.jit
def start_key_range(first, last, place, args):
    (starts,) = args
    start = tl.load(starts + place.batch).to(tl.int32)
    return start, place.keys, start, place.keys


@triton.jit
def start_query_range(first, last, place, args):
    (starts,) = args
    start = tl.load(starts + place.batch).to(tl.int32)
    begin = tl.where(last >= start, 0, place.queries)
    return begin, place.queries, tl.where(first >= start, 0, place.queries), place.queries


TREE = MaskFunctions(tree_keep, loads_tiles=True)
START = MaskFunctions(start_keep, start_key_range, start_query_range, hides_first_keys=True)
