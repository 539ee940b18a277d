"""Assembly text of NVIDIA (SASS) and AMD (amdgcn) GPUs, read into one list of instructions.

Only what the budget asks about is told apart: where an instruction may jump, how wide its memory
access is, and whether it runs on the tensor cores.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["load", "store", "atomic", "bulk", "spill"]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction and where control may go after it.

    Attributes:
        opcode: The full mnemonic with its modifiers, such as ``LDG.E.128``.
        operands: The text after the mnemonic.
        jumps_to: The index of the instruction that it may jump to, if it is a branch or a call.
        falls_through: Whether the next instruction may follow it.
    """

    opcode: str
    operands: str
    jumps_to: int | None
    falls_through: bool


@dataclass(frozen=True, slots=True)
class MemoryAccess:
    """What an instruction does to memory outside the block.

    Attributes:
        kind: A load, store or atomic of global memory, a bulk copy by the copy engine (TMA), or
            a load or store of a thread's own stack.
        bits: The width for each thread; 0 for bulk copies and atomics.
        asynchronous: Whether a load goes to shared memory without waiting in registers.
    """

    kind: Kind
    bits: int
    asynchronous: bool = False


SASS_LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;"
)
SASS_BRANCHES = {"BRA", "JMP", "CALL"}
SASS_ENDS = {"EXIT", "RET", "BRX", "KILL"}


def parse_sass(text: str) -> list[Instruction]:
    """Read what `cuobjdump -sass` prints; the padding at the end of a function is left out."""
    instructions: list[Instruction] = []
    for function in text.split("Function :")[1:]:
        lines = [line for line in SASS_LINE.finditer(function) if line["opcode"] != "NOP"]
        index_at = {int(line["address"], 16): len(instructions) + i for i, line in enumerate(lines)}
        for line in lines:
            name = line["opcode"].partition(".")[0]
            target = re.search(r"\b0x([0-9a-f]+)$", line["operands"])
            jumps_to = None
            if name in SASS_BRANCHES and target is not None:
                jumps_to = index_at.get(int(target[1], 16))
            # A branch may carry its condition as a first operand: BRA.U UP0, 0x1c0.
            conditional = line["predicate"] is not None or "," in line["operands"]
            stops = name in SASS_ENDS or (name in SASS_BRANCHES and name != "CALL")
            instructions.append(
                Instruction(
                    line["opcode"],
                    line["operands"],
                    jumps_to,
                    falls_through=conditional or not stops,
                )
            )
    return instructions


AMDGCN_LINE = re.compile(r"^\s+(?P<opcode>[a-z]\w*)\s*(?P<operands>[^;]*?)\s*(?:;.*)?$")
AMDGCN_LABEL = re.compile(r"^(?P<label>\.?\w+):")


def parse_amdgcn(text: str) -> list[Instruction]:
    """Read the assembly text that Triton keeps for AMD targets."""
    index_at: dict[str, int] = {}
    lines: list[re.Match[str]] = []
    inside = False
    for text_line in text.splitlines():
        if label := AMDGCN_LABEL.match(text_line):
            if label["label"].startswith(".Lfunc_"):
                inside = label["label"].startswith(".Lfunc_begin")
            index_at[label["label"]] = len(lines)
        elif inside and (line := AMDGCN_LINE.match(text_line)):
            lines.append(line)
    return [
        Instruction(
            line["opcode"],
            line["operands"],
            jumps_to=index_at.get(line["operands"]) if "branch" in line["opcode"] else None,
            falls_through=line["opcode"] not in ("s_branch", "s_endpgm", "s_setpc_b64"),
        )
        for line in lines
    ]


SASS_ACCESS: dict[str, Kind] = {
    "LDG": "load",
    "LD": "load",
    "LDGSTS": "load",
    "STG": "store",
    "ST": "store",
    "ATOM": "atomic",
    "ATOMG": "atomic",
    "RED": "atomic",
    "UTMALDG": "bulk",
    "UTMASTG": "bulk",
    "UTMAREDG": "bulk",
    "UBLKCP": "bulk",
    "LDL": "spill",
    "STL": "spill",
}
SASS_WIDTH = re.compile(r"\.(?:[US]?(8|16|64|128|256))(?=\.|$)")
AMDGCN_ACCESS = re.compile(r"(global|buffer|flat|scratch)_(load|store|atomic)_(\w+)$")
AMDGCN_WIDTH = re.compile(
    r"(?P<dwords>dword(?:x(?P<count>\d))?)|b(?P<bits>\d+)$|[iu](?P<int>8|16)$"
)


def memory_access(instruction: Instruction) -> MemoryAccess | None:
    """Return what the instruction does to global memory or to the stack, or None."""
    name = instruction.opcode.partition(".")[0]
    if name in SASS_ACCESS:
        kind = SASS_ACCESS[name]
        if kind in ("bulk", "atomic"):
            return MemoryAccess(kind, 0)
        width = SASS_WIDTH.search(instruction.opcode)
        return MemoryAccess(kind, int(width[1]) if width else 32, asynchronous=name == "LDGSTS")
    access = AMDGCN_ACCESS.match(instruction.opcode)
    if access is None:
        return None
    memory, action, suffix = access.groups()
    if memory == "scratch":
        return MemoryAccess("spill", _amdgcn_bits(suffix))
    if action == "atomic":
        return MemoryAccess("atomic", 0)
    to_shared = suffix.startswith("lds_") or instruction.operands.endswith(" lds")
    kind = "load" if action == "load" else "store"
    return MemoryAccess(kind, _amdgcn_bits(suffix), asynchronous=to_shared)


def _amdgcn_bits(suffix: str) -> int:
    """The width that names such as dwordx4, b128, ushort or short_d16_hi state."""
    width = AMDGCN_WIDTH.search(suffix)
    if width is None:
        return 8 if "byte" in suffix else 16
    if width["dwords"]:
        return 32 * int(width["count"] or 1)
    return int(width["bits"] or width["int"])


TENSOR_CORE = re.compile(r"(UTC)?[A-Z]G?MMA\b|v_(mfma|smfmac|wmma|swmmac)_")


def uses_tensor_cores(instruction: Instruction) -> bool:
    """Whether the instruction is a matrix product on the tensor cores."""
    return TENSOR_CORE.match(instruction.opcode) is not None
