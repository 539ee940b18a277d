"""Instructions that move control: branches, barriers and fences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import TYPES
from .group import ENDED
from .parser import Instruction, PtxError
from .translator import Step, Translator, instruction, not_here

if TYPE_CHECKING:
    from .group import Group


@instruction("bra", "uni")
def branch(t: Translator, i: Instruction) -> Step:
    """Control goes on at a label."""
    return _leave(t, i, t.kernel.labels[i.operands[0]])


@instruction("ret exit")
def end(t: Translator, i: Instruction) -> Step:
    """The thread has ended."""
    return _leave(t, i, ENDED)


def _leave(t: Translator, i: Instruction, target: int) -> Step:
    if i.guard is None:
        return lambda g: setattr(g, "target", target)
    taken = t.bits(i, i.guard, TYPES["pred"])
    if i.negated:
        return lambda g: g.branch(~taken(g), target)
    return lambda g: g.branch(taken(g), target)


@instruction("trap")
def trap(t: Translator, i: Instruction) -> Step:
    """The program has found a fault by itself."""
    active = t.active(i)

    def step(g: Group) -> None:
        mask = active(g)
        if mask is None or mask.any():
            raise PtxError(f"{i.place}: the kernel's own assertion failed")

    return step


@instruction("brx.idx", "uni")
def branch_by_number(t: Translator, i: Instruction) -> Step:
    """Control goes on at one of several labels."""
    number = t.bits(i, i.operands[0], TYPES["u32"])
    targets = np.array([t.kernel.labels[name] for name in t.kernel.tables[i.operands[1]]])
    if i.guard is not None:
        raise not_here(i)

    def step(g: Group) -> None:
        chosen = g.spread(number(g) if g.mask is None else np.where(g.mask, number(g), 0))
        if chosen.max() >= len(targets):
            raise not_here(i, f"there is no branch {chosen.max()}")
        places = targets[chosen]
        g.target = places if g.mask is None else np.where(g.mask, places, g.target)

    return step


@instruction("bar barrier", "sync arrive warp cta aligned")
def barrier(t: Translator, i: Instruction) -> Step | None:
    """All threads of the CTA, or so many, wait for each other; those of a warp do always here."""
    if "warp" in i.modifiers:
        return None
    active = t.active(i)
    if i.operands == ("0",) and "sync" in i.modifiers:
        return lambda g: g.barrier(i, active(g))
    reads = [t.bits(i, operand, TYPES["u32"]) for operand in i.operands]
    return lambda g: g.barrier_of_some(i, active(g), [int(read(g)[0, 0]) for read in reads])


@instruction("membar griddepcontrol", "cta gl sys wait launch_dependents")
def ordering(t: Translator, i: Instruction) -> Step | None:
    """Order between launches, or in memory, which nothing here departs from."""
    return None


@instruction("fence", "proxy async shared::cta")
def fence(t: Translator, i: Instruction) -> Step | None:
    """What was written to shared memory becomes visible to asynchronous products."""
    return (lambda g: g.shared.fence()) if "proxy" in i.modifiers else None


@instruction("activemask")
def active_threads(t: Translator, i: Instruction) -> Step:
    """Which threads of a warp are running: all, as long as they run together."""
    return t.assign_bits(i, i.operands[0], TYPES["u32"], t.bits(i, "-1", TYPES["u32"]))
