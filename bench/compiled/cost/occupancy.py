"""How many CTAs of a kernel an SM holds, and what keeps it from holding more."""

from __future__ import annotations

from dataclasses import dataclass

from .hardware import MAX_BLOCKS, RESERVED_SHARED_MEMORY, SUB_PARTITIONS, Hardware


@dataclass(frozen=True)
class Occupancy:
    """CTAs an SM, and what limits them: "registers", "shared memory", "warps" or "CTAs"."""

    blocks: int
    limit: str


REGISTER_UNIT = 256
"""A warp's registers are given out by so many."""


def occupancy_of(registers: int, shared: int, warps: int, hardware: Hardware) -> Occupancy:
    """The occupancy of a kernel with so many registers a thread, bytes and warps a CTA."""
    by_warp = -(-max(registers, 1) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    # Each sub-partition has registers of its own.
    held = hardware.registers // SUB_PARTITIONS // by_warp * SUB_PARTITIONS
    limits = {
        "registers": held // warps,
        "shared memory": hardware.shared_memory // (shared + RESERVED_SHARED_MEMORY),
        "warps": hardware.warps // warps,
        "CTAs": MAX_BLOCKS,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limit)
