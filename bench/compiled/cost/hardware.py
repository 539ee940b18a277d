"""What the model takes GPUs to be: the one table of peaks and clocks, each with its source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """One GPU, as the model sees it.

    Attributes:
        card: The card that the numbers are of.
        multiprocessors: SMs that are switched on.
        gigahertz: The clock that is assumed under load.
        tensor: Dense 16-bit operations (a multiplication and an addition are two) that an SM's
            tensor cores do in a clock.
        mma_sync: The share of `tensor` that warp-wide products (HMMA) reach.
        fp32_cycles: Cycles for which a warp's FP32 instruction holds its sub-partition's lanes.
        shared_memory: Bytes of shared memory that the CTAs of an SM have together.
        registers: Registers of an SM.
        warps: Warps that an SM holds at most.
        memory_terabytes: Terabytes that HBM moves in a second.
        l2_megabytes: The L2 cache.
        source: Where the numbers are from.
    """

    card: str
    multiprocessors: int
    gigahertz: float
    tensor: int
    mma_sync: float
    fp32_cycles: int
    shared_memory: int
    registers: int
    warps: int
    memory_terabytes: float
    l2_megabytes: float
    source: str

    @property
    def teraflops(self) -> float:
        """The tensor cores' peak at the assumed clock."""
        return self.tensor * self.multiprocessors * self.gigahertz / 1e3


SUB_PARTITIONS = 4
"""An SM has as many schedulers, each with lanes and a tensor core of its own."""

MAX_BLOCKS = 32
"""CTAs that an SM holds at most, on sm_80 and sm_90 alike (CUDA C++ Programming Guide)."""

RESERVED_SHARED_MEMORY = 1024
"""Bytes that a CTA's shared memory takes beside its own (CUDA C++ Programming Guide)."""

SHARED_BYTES = 128
"""Bytes that an SM's shared memory moves in a clock (CUDA C++ Best Practices Guide)."""

HARDWARE = {
    "sm_80": Hardware(
        card="A100 SXM 80 GB",
        multiprocessors=108,
        gigahertz=1.41,
        tensor=2048,
        mma_sync=1.0,
        fp32_cycles=2,
        shared_memory=164 * 1024,
        registers=65536,
        warps=64,
        memory_terabytes=2.04,
        l2_megabytes=40,
        source="NVIDIA A100 whitepaper and data sheet: boost clock, 312 TFLOP/s",
    ),
    "sm_90": Hardware(
        card="H100 SXM",
        multiprocessors=132,
        gigahertz=1.7,
        tensor=4096,
        mma_sync=0.625,
        fp32_cycles=1,
        shared_memory=228 * 1024,
        registers=65536,
        warps=64,
        memory_terabytes=3.35,
        l2_megabytes=50,
        source="NVIDIA H100 whitepaper and data sheet; the clock is assumed, below the boost of "
        "1.83 GHz, for the power limit; the share of mma.sync is that of arXiv 2402.13499",
    ),
}
