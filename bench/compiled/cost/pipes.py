"""Which part of an SM an instruction keeps busy, and for how many cycles."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from .hardware import SHARED_BYTES, SUB_PARTITIONS, Hardware
from .listing import Step

Pipe = Literal["tensor", "shared", "special", "alu", "fp32", "uniform", "other"]

NAMES = {
    "HGMMA": "HGMMA QGMMA IGMMA BGMMA",
    "HMMA": "HMMA IMMA DMMA QMMA",
    "MUFU": "MUFU",
    "FP32": "FFMA FMUL FADD FSWZADD",
    "half": "HFMA2 HADD2 HMUL2",
    "compare": "FMNMX FSETP FSEL FSET FCHK HMNMX2 HSETP2 HSET2",
    "pack": "F2FP",
    "convert": "F2F F2I I2F FRND",
    "IMAD": "IMAD",
    "ALU": "IADD3 IADD LEA LOP3 LOP SHF SHL SHR ISETP IMNMX SEL VIADD VIADDMNMX VIMNMX PLOP3 PRMT "
    "IABS SGXT BMSK POPC MOV P2R R2P FLO BREV IDP I2FP LOP32I ISCADD",
    "LDG": "LDG LD",
    "cp.async": "LDGSTS",
    "TMA": "UTMALDG UTMASTG UBLKCP UTMAREDG UTMAPF",
    "STG": "STG ST RED ATOM ATOMG",
    "LDS": "LDS",
    "LDSM": "LDSM",
    "STS": "STS STSM ATOMS",
    "spill": "LDL STL",
    "SHFL": "SHFL",
    "BAR": "BAR",
}
KINDS = {name: kind for kind, names in NAMES.items() for name in names.split()}

PIPES: dict[str, Pipe] = {
    "HGMMA": "tensor",
    "HMMA": "tensor",
    "MUFU": "special",
    "convert": "special",
    "FP32": "fp32",
    "half": "fp32",
    "IMAD": "fp32",
    "compare": "alu",
    "pack": "alu",
    "ALU": "alu",
    "LDG": "shared",
    "cp.async": "shared",
    "STG": "shared",
    "LDS": "shared",
    "LDSM": "shared",
    "STS": "shared",
    "spill": "shared",
    "SHFL": "shared",
    "uniform": "uniform",
}
"""The pipe of each kind; "shared" is the unit of loads, stores and shared memory."""

COUNTED = ("tensor", "shared", "special", "alu", "fp32", "issue")
"""What a loop's cycles are counted of: the busiest pipes, and the slots to issue in."""

FIXED = {"MUFU": 8, "convert": 8, "half": 1, "IMAD": 2, "compare": 2, "pack": 2, "ALU": 2}
WARP = 32


def kind_of(step: Step) -> str:
    """What an instruction is counted as; "other" for what takes an issue slot alone."""
    if step.name in KINDS:
        return KINDS[step.name]
    return "uniform" if step.name.startswith("U") or step.name == "R2UR" else "other"


def pipe_of(kind: str) -> Pipe:
    """The pipe that a kind of instruction keeps busy."""
    return PIPES.get(kind, "other")


def cycles_of(step: Step, hardware: Hardware) -> float:
    """The cycles for which a warp's instruction holds its pipe of the warp's sub-partition."""
    kind = kind_of(step)
    if kind == "FP32":
        return hardware.fp32_cycles
    if kind == "HGMMA":
        _, columns, depth = product_shape(step)
        return 2 * 16 * columns * depth / (hardware.tensor / SUB_PARTITIONS)
    if kind == "HMMA":
        rows, columns, depth = product_shape(step)
        speed = hardware.tensor * hardware.mma_sync / SUB_PARTITIONS
        # A multiplication of TF32 numbers takes as long as two of 16 bits.
        return 2 * rows * columns * depth * (1 + ("TF32" in step.opcode)) / speed
    if kind == "LDSM" or step.name == "STSM":
        # Each matrix has 8 rows of 16 bytes.
        matrices = re.search(r"\.([124])(?:\.|$)", step.opcode)
        return int(matrices[1]) * 128 / (SHARED_BYTES / SUB_PARTITIONS) if matrices else 4
    if pipe_of(kind) == "shared":
        bits = 32 if kind == "SHFL" else bits_of(step)
        return max(4, bits / 8 * WARP / (SHARED_BYTES / SUB_PARTITIONS))
    if kind == "uniform":
        return 2
    return FIXED.get(kind, 1)


def bits_of(step: Step) -> int:
    """The bits that each thread loads or stores."""
    width = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", step.opcode)
    return int(width[1]) if width else 32


def product_shape(step: Step) -> tuple[int, int, int]:
    """Rows, columns and depth of a product on the tensor cores: HGMMA.64x128x16, HMMA.16816."""
    wide = re.search(r"\.(\d+)x(\d+)x(\d+)", step.opcode)
    if wide is not None:
        return int(wide[1]), int(wide[2]), int(wide[3])
    narrow = re.search(r"\.(16|8)(8)(\d{1,2})(?=\.|$)", step.opcode)
    if narrow is None:
        raise ValueError(f"no shape in {step.opcode}")
    return int(narrow[1]), int(narrow[2]), int(narrow[3])


def operand_cycles(step: Step) -> float:
    """Cycles of the SM's shared memory that a warpgroup's product takes to read its operands.

    A row of either has 32 bytes for every dtype. A comes from registers where it is named so.
    """
    if kind_of(step) != "HGMMA":
        return 0.0
    rows, columns, _ = product_shape(step)
    return 32 * ((0 if operand_registers(step) else rows) + columns) / SHARED_BYTES


def operand_registers(step: Step) -> range:
    """The registers of operand A of a warpgroup's product; none where it is in shared memory."""
    registers = re.match(r"R\d+, R(\d+), gdesc", step.operands)
    return range(int(registers[1]), int(registers[1]) + 4) if registers else range(0)


def count_kinds(body: Sequence[Step]) -> dict[str, int]:
    """How many instructions of each kind."""
    return dict(Counter(map(kind_of, body)))


def count_cycles(body: Sequence[Step], hardware: Hardware, warps: float) -> dict[str, float]:
    """Cycles that each pipe of an SM is busy while `warps` of each sub-partition pass a loop."""
    cycles: dict[str, float] = dict.fromkeys(COUNTED, 0.0)
    for step in body:
        pipe = pipe_of(kind_of(step))
        if pipe in cycles:
            cycles[pipe] += cycles_of(step, hardware) * warps
        cycles["shared"] += operand_cycles(step) * warps
        cycles["issue"] += warps
    return cycles
