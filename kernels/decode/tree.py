"""The mask of a tree of new tokens: which of the last M keys each of the M queries sees."""

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


TREE = MaskFunctions(tree_keep, loads_tiles=True)
