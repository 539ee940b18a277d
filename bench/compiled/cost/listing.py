"""Machine code with what its encoding says of when each instruction may issue.

Since Volta an instruction carries its own schedule: cycles until the warp's next one, and six
barriers that it sets when it has its result, or has read its operands, and others wait for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..assembly import Instruction, parse_sass
from ..loops import innermost_loops


@dataclass(frozen=True, slots=True)
class Step(Instruction):
    """An instruction with its schedule.

    Attributes:
        stall: Cycles after which the warp's next instruction may issue.
        done: The barrier that is set until the result is there, or None.
        read: The barrier that is set until the operands have been read, or None.
        waits: The barriers that are waited for.
    """

    stall: int
    done: int | None
    read: int | None
    waits: tuple[int, ...]

    @property
    def name(self) -> str:
        """The mnemonic without its modifiers."""
        return self.opcode.partition(".")[0]


ENCODED = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)[^\n]*\n"
    r"\s*/\* 0x(?P<high>[0-9a-f]{16}) \*/"
)
BARRIERS = range(6)


def parse_listing(text: str) -> list[Step]:
    """Read what `nvdisasm -hex` prints of one function, after a line "Function :"."""
    instructions = parse_sass(text)
    encodings = [
        int(line["high"], 16) for line in ENCODED.finditer(text) if line["opcode"] != "NOP"
    ]
    return [
        _schedule(instruction, encoding)
        for instruction, encoding in zip(instructions, encodings, strict=True)
    ]


def _schedule(instruction: Instruction, encoding: int) -> Step:
    """The schedule stands in the upper half of the 128 bits, from bit 41 on."""
    done, read, waits = encoding >> 46 & 7, encoding >> 49 & 7, encoding >> 52 & 63
    return Step(
        instruction.opcode,
        instruction.operands,
        instruction.jumps_to,
        instruction.falls_through,
        stall=encoding >> 41 & 15,
        done=done if done in BARRIERS else None,
        read=read if read in BARRIERS else None,
        waits=tuple(barrier for barrier in BARRIERS if waits >> barrier & 1),
    )


def loop_bodies(code: Sequence[Step]) -> list[list[Step]]:
    """The innermost loops' instructions, in the order in which one pass meets them."""
    return [_in_order(code, body) for body in innermost_loops(code)]


def _in_order(code: Sequence[Step], body: Sequence[int]) -> list[Step]:
    """What stands out of line, behind the jump back, comes where it is branched to."""
    inside = set(body)
    last = max((i for i in body if code[i].jumps_to == body[0]), default=body[-1])
    ordered: list[Step] = []
    for i in body:
        if i > last:
            break
        ordered.append(code[i])
        target = code[i].jumps_to
        if target is None or target <= last:
            continue
        while target in inside:
            ordered.append(code[target])
            if not code[target].falls_through:
                break
            target += 1
    return ordered


LINE = re.compile(r"(?P<stall>\d+):(?P<done>[-\d]):(?P<read>[-\d]):(?P<waits>-|\d+) (?P<rest>.+)")


def format_body(body: Sequence[Step]) -> str:
    """A loop as text, a line an instruction: "stall:done:read:waits OPCODE operands"."""

    def one(barrier: int | None) -> str:
        return "-" if barrier is None else str(barrier)

    return "\n".join(
        f"{step.stall}:{one(step.done)}:{one(step.read)}:"
        f"{''.join(map(str, step.waits)) or '-'} {step.opcode} {step.operands}".rstrip()
        for step in body
    )


def parse_body(text: str) -> list[Step]:
    """Read what `format_body` wrote; lines that begin with # are left out.

    Raises:
        ValueError: a line is none of these.
    """
    steps = []
    for text_line in text.strip().splitlines():
        text_line = text_line.strip()
        if not text_line or text_line.startswith("#"):
            continue
        line = LINE.fullmatch(text_line)
        if line is None:
            raise ValueError(f"no line of a listing: {text_line!r}")
        opcode, _, operands = line["rest"].partition(" ")

        def barrier(name: str, line: re.Match[str] = line) -> int | None:
            return None if line[name] == "-" else int(line[name])

        waits = () if line["waits"] == "-" else tuple(map(int, line["waits"]))
        steps.append(
            Step(
                opcode,
                operands,
                None,
                True,
                int(line["stall"]),
                barrier("done"),
                barrier("read"),
                waits,
            )
        )
    return steps
