"""What a loop does with products and copies that run beside it, read from its machine code.

A warpgroup's product (wgmma) runs on while its warps go on, until they wait for it. Where the
assembler does not understand the loop it makes each product wait for the one before: it serializes
them. Whatever writes a register that an unfinished product has yet to read, or to write, is a
hazard; assemblers before CUDA 13.3 could make one (triton-lang/triton pull request 11781).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .listing import Step
from .pipes import bits_of, kind_of, operand_registers, product_shape

NO_REGISTERS = (
    "STG STS STL STSM ST RED BAR BRA BSSY BSYNC EXIT RET CALL LDGSTS UTMALDG UTMASTG SYNCS "
    "WARPGROUP WARPSYNC DEPBAR LDGDEPBAR MEMBAR FENCE CCTL ERRBAR ELECT NANOSLEEP ISETP FSETP "
    "PLOP3 HSETP2 R2P R2UR VOTEU"
)
WRITES_NO_REGISTER = frozenset(NO_REGISTERS.split())


def is_serialized(body: Sequence[Step]) -> bool:
    """Whether every product that adds to the sums of the one before waits for it."""
    chained: list[bool] = []
    before: str | None = None
    waited = False
    for step in body:
        if awaited_products(step) == 0:
            waited = True
        if kind_of(step) != "HGMMA":
            continue
        sums = step.operands.partition(",")[0]
        if sums == before and _adds(step):
            chained.append(waited)
        before, waited = sums, False
    return bool(chained) and all(chained)


def _adds(step: Step) -> bool:
    """Whether a product adds to what its registers hold: the first of a chain begins at zero."""
    return "!UPT" not in step.operands


def awaited_products(step: Step) -> int | None:
    """How many groups of products may still run after a wait; None for what waits for none."""
    if step.name != "WARPGROUP" or "DEPBAR" not in step.opcode:
        return None
    return _last_number(step)


def awaited_copies(step: Step) -> int | None:
    """The same of copies (cp.async)."""
    if step.name != "DEPBAR" or not step.operands.startswith("SB0"):
        return None
    return _last_number(step)


def _last_number(step: Step) -> int:
    return int(step.operands.rpartition(",")[2], 0)


def steps_ahead(body: Sequence[Step]) -> float | None:
    """Passes of the loop between a group of copies (cp.async) and the wait for it, the fewest.

    Below 1 nothing of a pass runs in between, however fast it would be: the copy's latency shows.
    None for a loop that copies nothing, or that never waits for it.
    """
    started: list[int] = []
    pending = False
    fewest: int | None = None
    for position, step in enumerate([*body] * 8):
        if kind_of(step) == "cp.async":
            pending = True
        elif step.name == "LDGDEPBAR" and pending:
            started.append(position)
            pending = False
        elif (left := awaited_copies(step)) is not None and len(started) > left:
            newest = started[len(started) - left - 1]
            fewest = min(fewest or position - newest, position - newest)
            started = started[len(started) - left :]
    return None if fewest is None else fewest / len(body)


@dataclass(frozen=True)
class Running:
    """A product that has not been waited for, and the registers it reads and writes."""

    operand: frozenset[int]
    sums: frozenset[int]


def find_hazards(body: Sequence[Step]) -> list[str]:
    """Instructions that write a register of an unfinished product, in two passes of a loop."""
    groups: list[list[Running]] = []
    current: list[Running] = []
    found: dict[str, None] = {}
    for step in [*body, *body]:
        if kind_of(step) == "HGMMA":
            current.append(_running(step))
            if "gsb0" in step.operands:
                groups.append(current)
                current = []
            continue
        left = awaited_products(step)
        if left is not None:
            groups = groups[len(groups) - left :] if left else []
        written = written_registers(step)
        unfinished = [product for group in [*groups, current] for product in group]
        if any(written & (product.operand | product.sums) for product in unfinished):
            found[f"{step.opcode} {step.operands}"] = None
    return list(found)


def _running(step: Step) -> Running:
    _, columns, _ = product_shape(step)
    first = re.match(r"R(\d+)", step.operands)
    sums = range(int(first[1]), int(first[1]) + columns // 2) if first else ()
    return Running(frozenset(operand_registers(step)), frozenset(sums))


def written_registers(step: Step) -> frozenset[int]:
    """The registers that an instruction writes."""
    if step.name in WRITES_NO_REGISTER:
        return frozenset()
    # A predicate may be written first.
    first = re.match(r"(?:U?P[\dT]+, )*R(\d+)\b", step.operands)
    if first is None:
        return frozenset()
    count = 1
    if step.name == "LDSM":
        count = int(step.opcode[-1]) if step.opcode[-1] in "24" else 1
    elif kind_of(step) in ("LDS", "LDG", "spill"):
        count = max(1, bits_of(step) // 32)
    elif ".WIDE" in step.opcode or step.opcode.endswith(".64") or step.name == "CS2R":
        count = 2
    return frozenset(range(int(first[1]), int(first[1]) + count))
