"""PTX text as instructions in basic blocks.

PTX is the assembly language that Triton ends with: one program that all threads of a block (a CTA)
run, with as many registers as it likes. NVIDIA's assembler makes machine code of it, which only
renames registers and reorders what does not depend on each other. So what a kernel computes, and
what it touches in memory, is all said here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class PtxError(Exception):
    """The program did what a GPU would punish or leave undefined, or what this machine cannot."""


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        line: Its line in the text, from 1.
        guard: The predicate register that says which threads execute it, or None.
        negated: Whether those threads do whose predicate is false.
        opcode: The first part of its name, such as ``setp``.
        modifiers: The other parts, such as ``("lt", "s32")``.
        operands: Registers, numbers, ``[addresses]`` and ``{vectors}``, the result first.
    """

    line: int
    guard: str | None
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    def __str__(self) -> str:
        """As it might stand in the text, shortened."""
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        name = ".".join((self.opcode, *self.modifiers))
        return f"{guard}{name} {', '.join(self.operands)}"[:120].strip()


@dataclass
class Kernel:
    """A parsed kernel.

    Attributes:
        name: Its name.
        parameters: The name and PTX type of each parameter.
        threads: How many threads a CTA has.
        registers: The PTX type of each register by name.
        blocks: The basic blocks. Control enters at their first instruction, leaves after their
            last, and falls from one to the next.
        labels: The index of the block that each label names.
    """

    name: str
    parameters: list[tuple[str, str]]
    threads: int
    registers: dict[str, str] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)

    def registers_in(self, operand: str) -> list[str]:
        """The registers that an operand names."""
        return [name for name in re.findall(REGISTER, operand) if name in self.registers]


# Inline assembly opens scopes with registers of its own, whose names then begin with the scope's
# number.
REGISTER = r"(?:\d+:)?%?[A-Za-z_]\w*"

_LABEL = re.compile(r"([$\w]+):\s*")
_STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)$", re.DOTALL)
_DEBUGGING = (".loc", ".file", ".pragma")
_DEBUGGING_LABELS = ("$L__tmp", "$L__func")


def parse(text: str) -> Kernel:
    """Parse a file with one kernel in it."""
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.DOTALL)
    threads = re.search(r"\.reqntid\s+(\d+)", text)
    if head is None or threads is None:
        raise PtxError("there is no kernel with a known number of threads in this text")
    name, parameters = (
        head[1],
        re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", head[2].strip()),
    )
    kernel = Kernel(name, [(parameter, kind) for kind, parameter in parameters], int(threads[1]))
    _parse_body(kernel, text[head.end() :], 1 + text.count("\n", 0, head.end()))
    return kernel


def _parse_body(kernel: Kernel, body: str, first_line: int) -> None:
    scopes: list[str] = []
    scopes_seen = 0
    statement, started = "", 0
    for number, raw in enumerate(body.split("\n"), first_line):
        rest = raw.partition("//")[0].strip()
        if rest.startswith(_DEBUGGING):
            continue
        while rest:
            if not statement:
                started = number
                if rest[0] == "{":
                    scopes_seen += 1
                    scopes.append(f"{scopes_seen}:")
                    rest = rest[1:].lstrip()
                    continue
                if rest[0] == "}":
                    if not scopes:
                        return
                    scopes.pop()
                    rest = rest[1:].lstrip()
                    continue
                if label := _LABEL.match(rest):
                    if not label[1].startswith(_DEBUGGING_LABELS):
                        _begin_block(kernel)
                        kernel.labels[label[1]] = len(kernel.blocks) - 1
                    rest = rest[label.end() :]
                    continue
            before, semicolon, rest = rest.partition(";")
            statement += before + " "
            rest = rest.lstrip()
            if semicolon:
                _parse_statement(kernel, statement.strip(), scopes, started)
                statement = ""


def _parse_statement(kernel: Kernel, text: str, scopes: list[str], line: int) -> None:
    if text.startswith(".reg"):
        _declare(kernel, text, scopes[-1] if scopes else "")
        return
    match = _STATEMENT.match(text)
    if match is None or text.startswith("."):
        raise PtxError(f"line {line}: this machine knows no such statement: {text}")

    def resolve(name: str) -> str:
        return next((s + name for s in reversed(scopes) if s + name in kernel.registers), name)

    negated, guard, name, rest = match.groups()
    operands = rest
    if scopes:
        operands = re.sub(r"(?<![\w$.])%?[A-Za-z_]\w*", lambda found: resolve(found[0]), rest)
    opcode, *modifiers = name.split(".")
    instruction = Instruction(
        line,
        resolve(guard) if guard else None,
        bool(negated),
        opcode,
        tuple(modifiers),
        tuple(_split(operands)),
    )
    kernel.blocks[-1].append(instruction)
    if opcode in ("bra", "ret", "exit"):
        kernel.blocks.append([])


def _begin_block(kernel: Kernel) -> None:
    if kernel.blocks[-1]:
        kernel.blocks.append([])


def _declare(kernel: Kernel, statement: str, scope: str) -> None:
    _, kind, names = statement.split(None, 2)
    for name in names.split(","):
        name = name.strip()
        # %r<5> declares %r0 to %r4.
        if many := re.fullmatch(r"(%?\w+)<(\d+)>", name):
            for index in range(int(many[2])):
                kernel.registers[f"{scope}{many[1]}{index}"] = kind[1:]
        else:
            kernel.registers[scope + name] = kind[1:]


def _split(operands: str) -> list[str]:
    """The operands of an instruction: commas inside of braces and brackets do not part them."""
    found, depth, start = [], 0, 0
    for index, character in enumerate(operands):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            found.append(operands[start:index].strip())
            start = index + 1
    last = operands[start:].strip()
    return [*found, last] if last else found


def elements(operand: str) -> list[str]:
    """The parts of a vector ``{a, b}``, or the operand itself as its only part."""
    return [part.strip() for part in operand.strip("{} ").split(",")]
