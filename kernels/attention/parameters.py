"""How attention's dQ kernel sums the gradients of what score terms learn.

A program sums, over the tiles that it goes over, what each score adds to a term's parameter: to one
number a head, or to one entry of a head's table. It stores its sums as a row of its own; the rows
are summed in a fixed order afterwards. A parameter with a number for each score has a kernel of its
own, see backward_bias.py.

TERMS.entries says how many entries each gradient has for a head, 0 where none is wanted.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def pad(entries):
    """The width of the tensor in which a table's gradient is summed; 1 where none is."""
    return triton.next_power_of_2(max(entries, 1))


@triton.jit
def start_sums(TERMS: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr):
    """The gradients of the terms' parameters before any key.

    What is summed are sums over keys for each query, and so of a table (BLOCK_M, entries).
    """
    sums = ()
    for i in tl.static_range(len(TERMS.entries)):
        if TERMS.entries[i] == 0:
            sums = sums + (tl.zeros((1,), ACC),)
        elif TERMS.indices[i] is None:
            sums = sums + (tl.zeros((BLOCK_M,), ACC),)
        else:
            sums = sums + (tl.zeros((BLOCK_M, pad(TERMS.entries[i])), ACC),)
    return sums


@triton.jit
def add_to_sums(sums, gradient, keep, m, n, place, args, TERMS: tl.constexpr):
    """The gradients of the terms' parameters with those of one more tile, a row a query.

    `gradient` is the tile's ScoreGradient, `keep` None where all of its scores count.
    """
    updated = ()
    for i in tl.static_range(len(TERMS.entries)):
        if TERMS.entries[i] == 0:
            updated = updated + (sums[i],)
        else:
            added = TERMS.parameters_backward[i](
                gradient.after[len(TERMS.scores) - 1 - TERMS.learners[i]],
                gradient.given[TERMS.learners[i]],
                m,
                n,
                place,
                args[TERMS.learners[i]],
            )
            if keep is not None:
                added = tl.where(keep, added, 0.0)
            if TERMS.indices[i] is None:
                updated = updated + (sums[i] + tl.sum(added, 1),)
            else:
                index = TERMS.indices[i](m, n, place, args[TERMS.learners[i]])
                index = tl.broadcast_to(index, added.shape)
                updated = updated + (
                    add_by_index(sums[i], added, index, TERMS.entries[i], pad(TERMS.entries[i])),
                )
    return updated


@triton.jit
def add_by_index(table, added, index, ENTRIES: tl.constexpr, PADDED: tl.constexpr):
    """The table with each element of a tile added to the entry that its index names.

    One sum for each entry between the least and the largest index of the tile: most tiles are far
    from the diagonal, and have one. Queries are summed last, outside of the loop over keys.
    """
    lowest = tl.maximum(tl.min(tl.min(index, 1), 0), 0)
    highest = tl.minimum(tl.max(tl.max(index, 1), 0), ENTRIES - 1)
    entries = tl.arange(0, PADDED)[None, :]
    for entry in range(lowest, highest + 1):
        total = tl.sum(tl.where(index == entry, added, 0.0), 1)
        table += tl.where(entries == entry, total[:, None], 0.0)
    return table


@triton.jit
def store_sums(pointers, sums, row, TERMS: tl.constexpr):
    """Store what a program summed as a row of each wanted gradient (rows, entries)."""
    for i in tl.static_range(len(TERMS.entries)):
        if TERMS.entries[i] > 0:
            if TERMS.indices[i] is None:
                tl.store(pointers[i] + row, tl.sum(sums[i], 0))
            else:
                entries = tl.arange(0, pad(TERMS.entries[i]))
                tl.store(
                    pointers[i] + row.to(tl.int64) * TERMS.entries[i] + entries,
                    tl.sum(sums[i], 0),
                    entries < TERMS.entries[i],
                )
