"""What is predicted of a kernel whose warps have parts of their own (warp specialisation).

Its consumers are warpgroups that multiply. Each has barriers of its own, and counts as a CTA of
four warps here; all are taken to be in the same loop. What the producer does takes no time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .hardware import SUB_PARTITIONS, Hardware
from .hazards import awaited_products, written_registers
from .listing import Step, loop_bodies
from .pipes import kind_of, operand_registers, product_shape
from .predict import LoopCost, predict_loop
from .simulate import Turn


def predict_consumers(
    code: Sequence[Step], consumers: int, stages: int, hardware: Hardware
) -> list[LoopCost]:
    """Predict the loops of every consumer, those over blocks with masks among them."""
    return [
        predict_loop(body, SUB_PARTITIONS, consumers, stages, hardware, find_turn(body))
        for body in loop_bodies(code)
        if any(kind_of(step) == "HGMMA" for step in body)
    ]


def find_turn(body: Sequence[Step]) -> Turn | None:
    """Where consumers wait for their turn to issue products, and hand it on.

    A consumer hands a buffer back only after it has waited for the product that reads it. What it
    tells others before is that its products are issued.
    """
    for number, step in enumerate(body):
        if awaited_products(step) is not None:
            return None
        if step.name == "SYNCS" and "ARRIVE" in step.opcode:
            awaited = next(i for i, s in enumerate(body) if "PHASECHK" in s.opcode)
            return Turn(awaited, number)
    return None


def most_registers(code: Sequence[Step], registers: int) -> list[tuple[int, int]]:
    """How many registers are used under each limit: (limit, used).

    The kernel begins with `registers` for each thread, and each `setmaxnreg` gives another limit to
    the code that can be reached from it before the next one.
    """
    limits = {i: int(s.operands.rpartition(" ")[2], 0) for i, s in enumerate(code) if _limits(s)}
    found = []
    for first, limit in ((-1, registers), *limits.items()):
        pending, seen = [first + 1], set[int]()
        while pending:
            at = pending.pop()
            if at in seen or at >= len(code) or at in limits:
                continue
            seen.add(at)
            if (target := code[at].jumps_to) is not None:
                pending.append(target)
            if code[at].falls_through:
                pending.append(at + 1)
        found.append((limit, max((highest_register(code[i]) + 1 for i in seen), default=0)))
    return found


def _limits(step: Step) -> bool:
    return step.name == "USETMAXREG"


def highest_register(step: Step) -> int:
    """The highest register that an instruction names or writes; -1 where there is none."""
    named = {int(number) for number in re.findall(r"\bR(\d+)\b", step.operands)}
    named |= written_registers(step)
    if kind_of(step) == "HGMMA":
        _, columns, _ = product_shape(step)
        first = re.match(r"R(\d+)", step.operands)
        named |= set(operand_registers(step))
        named |= {int(first[1]) + columns // 2 - 1} if first else set()
    return max(named, default=-1)
