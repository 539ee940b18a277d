"""What is predicted of a kernel: of each of its loops, and of the one that its time goes to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastattn.machine.driver import Kernel

from ..assembly import memory_access
from ..machine_code import MachineCode, disassemble
from .hardware import SUB_PARTITIONS, Hardware
from .hazards import find_hazards, is_serialized, steps_ahead
from .listing import Step, loop_bodies, parse_listing
from .occupancy import Occupancy, occupancy_of
from .pipes import WARP, count_cycles, count_kinds
from .simulate import ASSUMPTIONS, Turn, simulate

SHORTEST_LOOP = 12
"""Instructions; a shorter loop waits, or counts."""


@dataclass(frozen=True)
class LoopCost:
    """One loop, or all of a kernel that has none.

    Attributes:
        instructions: Instructions of a warp's pass by kind.
        cycles: Cycles that each pipe of the SM is busy while all its CTAs make a pass.
        predicted_cycles: Cycles of that pass, under the fastest assumption and the slowest.
        serialized: Whether products on the tensor core wait for each other.
        steps_ahead: Passes between copies and the wait for them, None where nothing is copied.
        hazards: Instructions that write registers of unfinished products.
        tensor_share: The predicted share of the tensor cores' peak, low and high; None without
            products.
        terabytes: The predicted terabytes a second that all SMs move between them and global
            memory, low and high; None where nothing is moved. It is what instructions and waits
            leave, whatever memory gives.
    """

    instructions: dict[str, int]
    cycles: dict[str, float]
    predicted_cycles: tuple[float, float]
    serialized: bool
    steps_ahead: float | None
    hazards: list[str]
    tensor_share: tuple[float, float] | None
    terabytes: tuple[float, float] | None


@dataclass(frozen=True)
class Cost:
    """One kernel.

    Attributes:
        tile: Rows and columns of the first product, () without one.
        stages: How many steps ahead Triton was asked to plan copies.
        occupancy: CTAs an SM and what limits them.
        loops: The innermost loops; all instructions as one where none moves or multiplies.
        main: Which of them most of the time goes to at long lengths: of those with products the
            one with the fewest cycles for them (what is left of it has masks), else the one that
            moves the most bytes.
    """

    tile: tuple[int, ...]
    stages: int
    occupancy: Occupancy
    loops: list[LoopCost]
    main: int

    @property
    def main_loop(self) -> LoopCost:
        return self.loops[self.main]


def predict_all(
    kernels: Sequence[Kernel], codes: Sequence[MachineCode], hardware: Hardware
) -> list[Cost]:
    """Predict kernels of one target."""
    return [
        predict(kernel, parse_listing(text), code.registers, hardware)
        for kernel, code, text in zip(kernels, codes, disassemble(kernels, "-hex"), strict=True)
    ]


def predict(kernel: Kernel, code: Sequence[Step], registers: int, hardware: Hardware) -> Cost:
    """Predict one kernel from its instructions and what Triton says of it."""
    warps, stages = kernel.metadata["num_warps"], kernel.metadata["num_stages"]
    occupancy = occupancy_of(registers, kernel.metadata["shared"], warps, hardware)
    bodies = [body for body in loop_bodies(code) if len(body) >= SHORTEST_LOOP]
    bodies = [body for body in bodies if _works(body)] or [list(code)]
    loops = [predict_loop(body, warps, occupancy.blocks, stages, hardware) for body in bodies]
    main = max(range(len(loops)), key=lambda i: _weight(loops[i]))
    return Cost(tile_of(kernel), stages, occupancy, loops, main)


def _works(body: Sequence[Step]) -> bool:
    return bytes_of(body) > 0 or any(kind in ("HGMMA", "HMMA") for kind in count_kinds(body))


def _weight(loop: LoopCost) -> tuple[float, float]:
    if loop.tensor_share is not None:
        return loop.cycles["tensor"] / loop.cycles["issue"], 0.0
    return 0.0, loop.terabytes[1] if loop.terabytes else 0.0


def predict_loop(
    body: Sequence[Step],
    warps: int,
    blocks: int,
    stages: int,
    hardware: Hardware,
    turn: Turn | None = None,
) -> LoopCost:
    """Predict one loop of CTAs of `warps` warps, `blocks` of them an SM, which may take turns."""
    on_each = max(1.0, warps * blocks / SUB_PARTITIONS)
    cycles = count_cycles(body, hardware, on_each)
    # What has no products has many warps, which need few passes to be in their rhythm.
    count = 9 if cycles["tensor"] else 4
    passes = [
        simulate(body, hardware, warps, blocks, assumption, count, stages, turn)
        for assumption in ASSUMPTIONS
    ]
    fast, slow = min(passes), max(passes)
    moved = bytes_of(body) * on_each * SUB_PARTITIONS * hardware.multiprocessors
    speed = moved * hardware.gigahertz / 1e3
    tensor = cycles["tensor"]
    return LoopCost(
        instructions=count_kinds(body),
        cycles=cycles,
        predicted_cycles=(fast, slow),
        serialized=is_serialized(body),
        steps_ahead=steps_ahead(body),
        hazards=find_hazards(body),
        tensor_share=(tensor / slow, tensor / fast) if tensor else None,
        terabytes=(speed / slow, speed / fast) if moved else None,
    )


def bytes_of(body: Sequence[Step]) -> int:
    """Bytes that a warp moves from and to global memory in a pass, were all its lanes inside."""
    accesses = [access for access in map(memory_access, body) if access is not None]
    return sum(access.bits * WARP // 8 for access in accesses if access.kind in ("load", "store"))


def tile_of(kernel: Kernel) -> tuple[int, ...]:
    """Rows and columns of the first product in a kernel's source."""
    dot = re.search(r"= tt\.dot .*-> tensor<(\d+)x(\d+)x", kernel.files["ttir"].read_text())
    return (int(dot[1]), int(dot[2])) if dot else ()
