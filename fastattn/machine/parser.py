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
        source: The file and line of the program that it was compiled from, if that is told.
    """

    line: int
    guard: str | None
    negated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    source: str = ""

    @property
    def place(self) -> str:
        """Where it stands in the text, and in the program that was compiled."""
        return f"line {self.line} ({self.source})" if self.source else f"line {self.line}"

    @property
    def name(self) -> str:
        """Opcode and modifiers."""
        return ".".join((self.opcode, *self.modifiers))

    def __str__(self) -> str:
        """As it might stand in the text, shortened."""
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.name} {', '.join(self.operands)}"[:120].strip()


@dataclass
class Kernel:
    """A parsed kernel.

    Attributes:
        name: Its name.
        parameters: The name and PTX type of each parameter.
        threads: How many threads a CTA has.
        register_limit: How many registers a thread has to begin with, if that is told.
        registers: The PTX type of each register by name.
        blocks: The basic blocks. Control enters at their first instruction, leaves after their
            last, and falls from one to the next.
        labels: The index of the block that each label names.
        tables: The labels in each table of an indexed branch.
    """

    name: str
    parameters: list[tuple[str, str]]
    threads: int
    register_limit: int | None = None
    registers: dict[str, str] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)

    @property
    def by_warp(self) -> bool:
        """Whether its warps go their own ways, so that each must be run by itself.

        That is so where it has mbarriers, bulk copies, barriers of some of the threads, registers
        handed from warp to warp, or an election of a thread.
        """
        instructions = [i for block in self.blocks for i in block]
        return any(
            i.opcode in ("mbarrier", "setmaxnreg", "elect")
            or i.name.startswith("cp.async.bulk")
            or (
                i.opcode in ("bar", "barrier")
                and i.operands != ("0",)
                and "warp" not in i.modifiers
            )
            for i in instructions
        )

    def cut_behind(self, names: re.Pattern[str]) -> None:
        """Have a block end behind every instruction whose name begins with a pattern."""
        blocks: list[list[Instruction]] = []
        begins = []
        for block in self.blocks:
            begins.append(len(blocks))
            blocks.append([])
            for i in block:
                if blocks[-1] and names.match(blocks[-1][-1].name):
                    blocks.append([])
                blocks[-1].append(i)
        self.blocks = blocks
        self.labels = {name: begins[index] for name, index in self.labels.items()}

    def registers_in(self, operand: str) -> list[str]:
        """The registers that an operand names."""
        return [name for name in re.findall(REGISTER, operand) if name in self.registers]


# Inline assembly opens scopes with registers of its own, whose names then begin with the scope's
# number.
REGISTER = r"(?:\d+:)?%?[A-Za-z_]\w*"

_LABEL = re.compile(r"([$\w]+):\s*")
_STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)$", re.DOTALL)
_DEBUGGING = (".file", ".pragma")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
# A tensor map is passed as an array of 128 bytes.
_PARAMETER = r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,]*?(\w+)(?:\[128\])?\s*(?:,|$)"
_DEBUGGING_LABELS = ("$L__tmp", "$L__func")


def parse(text: str) -> Kernel:
    """Parse a file with one kernel in it."""
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.DOTALL)
    threads = re.search(r"\.reqntid\s+(\d+)", text)
    if head is None or threads is None:
        raise PtxError("there is no kernel with a known number of threads in this text")
    name, parameters = (
        head[1],
        re.findall(_PARAMETER, head[2].strip()),
    )
    kernel = Kernel(name, [(parameter, kind) for kind, parameter in parameters], int(threads[1]))
    if limit := re.search(r"\.maxnreg\s+(\d+)", head[3]):
        kernel.register_limit = int(limit[1])
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]+)"', text))
    _parse_body(kernel, text[head.end() :], 1 + text.count("\n", 0, head.end()), files)
    return kernel


def _parse_body(kernel: Kernel, body: str, first_line: int, files: dict[str, str]) -> None:
    scopes: list[str] = []
    scopes_seen = 0
    statement, started, source = "", 0, ""
    for number, raw in enumerate(body.split("\n"), first_line):
        rest = raw.partition("//")[0].strip()
        if place := _LOCATION.match(rest):
            source = f"{files.get(place[1], '?')}:{place[2]}"
            continue
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
                        name = (scopes[-1] if scopes else "") + label[1]
                        kernel.labels[name] = len(kernel.blocks) - 1
                    rest = rest[label.end() :]
                    continue
            before, semicolon, rest = rest.partition(";")
            statement += before + " "
            rest = rest.lstrip()
            if semicolon:
                _parse_statement(kernel, statement.strip(), scopes, started, source)
                statement = ""


def _parse_statement(kernel: Kernel, text: str, scopes: list[str], line: int, source: str) -> None:
    if text.startswith(".reg"):
        _declare(kernel, text, scopes[-1] if scopes else "")
        return
    if text.startswith(".branchtargets"):
        kernel.tables[next(reversed(kernel.labels))] = _split(text.removeprefix(".branchtargets"))
        return
    match = _STATEMENT.match(text)
    if match is None or text.startswith("."):
        raise PtxError(f"line {line}: this machine knows no such statement: {text}")

    def resolve(name: str) -> str:
        names = (scope + name for scope in reversed(scopes))
        return next((n for n in names if n in kernel.registers or n in kernel.labels), name)

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
        source,
    )
    kernel.blocks[-1].append(instruction)
    if opcode in ("bra", "brx", "ret", "exit"):
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
