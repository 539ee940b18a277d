"""How attention's dQ kernel gathers the gradients of what score terms learn.

A program sums, over the tiles that it goes over, what each score adds to a term's parameter: to one
number a head, or to one entry of a head's table. It stores its sums as a row of its own; the rows
are summed in a fixed order afterwards. A parameter with a number for each score has a kernel of its
own, see attention_backward_bias.py.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def padded(entries):
    """The width of the tensor that gathers a table's gradient; 1 where nothing is gathered."""
    return triton.next_power_of_2(max(entries, 1))


@triton.jit
def nothing_gathered(
    ENTRIES: tl.constexpr, INDICES: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr
):
    """The gradients of the terms' parameters before any key, for each score term.

    ENTRIES says how many entries each term's gradient has for a head, 0 where none is wanted. What
    is gathered are sums over keys for each query, and so of a table (BLOCK_M, entries).
    """
    gathered = ()
    for i in tl.static_range(len(ENTRIES)):
        if ENTRIES[i] == 0:
            gathered = gathered + (tl.zeros((1,), ACC),)
        elif INDICES[i] is None:
            gathered = gathered + (tl.zeros((BLOCK_M,), ACC),)
        else:
            gathered = gathered + (tl.zeros((BLOCK_M, padded(ENTRIES[i])), ACC),)
    return gathered


@triton.jit
def gather_parameters(
    gathered,
    after,
    given,
    keep,
    m,
    n,
    place,
    args,
    ENTRIES: tl.constexpr,
    PARAMETERS_BACKWARD: tl.constexpr,
    INDICES: tl.constexpr,
):
    """The gradients of the terms' parameters with those of one more tile, a row a query."""
    updated = ()
    for i in tl.static_range(len(ENTRIES)):
        if ENTRIES[i] == 0:
            updated = updated + (gathered[i],)
        else:
            added = PARAMETERS_BACKWARD[i](
                after[len(ENTRIES) - 1 - i], given[i], m, n, place, args[i]
            )
            if keep is not None:
                added = tl.where(keep, added, 0.0)
            if INDICES[i] is None:
                updated = updated + (gathered[i] + tl.sum(added, 1),)
            else:
                index = tl.broadcast_to(INDICES[i](m, n, place, args[i]), added.shape)
                updated = updated + (
                    add_by_index(gathered[i], added, index, ENTRIES[i], padded(ENTRIES[i])),
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
def store_gathered(pointers, gathered, row, ENTRIES: tl.constexpr, INDICES: tl.constexpr):
    """Store what a program gathered as a row of each wanted term's tensor (rows, entries)."""
    for i in tl.static_range(len(ENTRIES)):
        if ENTRIES[i] > 0:
            if INDICES[i] is None:
                tl.store(pointers[i] + row, tl.sum(gathered[i], 0))
            else:
                entries = tl.arange(0, padded(ENTRIES[i]))
                tl.store(
                    pointers[i] + row.to(tl.int64) * ENTRIES[i] + entries,
                    tl.sum(gathered[i], 0),
                    entries < ENTRIES[i],
                )
