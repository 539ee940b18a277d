"""Block sizes of the fused gated linear layer."""

from dataclasses import dataclass

from ..config import INVARIANT_ROWS, Target
from ..tuning import Bucket, bucket, choose


@dataclass(frozen=True)
class GatedLinearConfig:
    """How gated_linear is cut: one program a tile (block_m, block_n) of both products."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    """How many steps' operands are in shared memory at once."""
    group_m: int = 8
    """Rows of tiles that are handed out together, so that they share operands in L2."""


def gated_linear_config(
    m: int,
    n: int,
    k: int,
    dtype: str,
    precision: str,
    backward: bool,
    target: Target,
    *,
    batch_invariant: bool = False,
) -> GatedLinearConfig:
    """The configuration of gated_linear on x (m, k) and weights (n, k).

    Sizes count as powers of two, so that the exact number of rows changes nothing.

    Args:
        m, n, k: the sizes.
        dtype: the operands' dtype by name.
        precision: "ieee" or "tf32", for float32.
        backward: whether the kernel turns dy into dgate and dup, or computes y.
        target: the device.
        batch_invariant: leave m out of it.
    """
    if batch_invariant:
        m = INVARIANT_ROWS
    return choose(
        "gated_linear",
        gated_linear_rule,
        target,
        m=bucket(m),
        n=bucket(n),
        k=bucket(k),
        dtype=dtype,
        precision=precision,
        backward=backward,
    )


FEW_ROWS = 16
"""What tensor cores take at once. So few rows wait for the weights alone."""

LARGE_SHARED_MEMORY = 4 * (128 + 2 * 128) * 128
"""Four stages of steps of 128 bytes at 128 x 128: sm_90 and sm_100 have them."""


def gated_linear_rule(
    target: Target,
    *,
    m: Bucket,
    n: Bucket,
    k: Bucket,
    dtype: str,
    precision: str,
    backward: bool,
) -> GatedLinearConfig:
    """The largest tile whose two accumulators, and what follows them, stay in registers.

    On sm_90 and sm_100 128 x 128 does in the forward; the backward, with three more tiles after the
    products, would spill 16 to 456 bytes there. mma.sync, on the other NVIDIA GPUs, holds operands
    in registers as well and spills at 128 x 128 in either direction. There, in the backward, steps
    of 128 bytes would spill 16.
    """
    if target.backend == "interpreter":
        return GatedLinearConfig(32, 32, 32, num_warps=4, num_stages=2)
    cdna = target.backend == "hip" and target.warp_size == 64
    rdna = target.backend == "hip" and not cdna
    if dtype == "float32" and (rdna or (precision == "ieee" and not cdna)):
        # On the ordinary units: more than this unrolls into thousands of instructions.
        return GatedLinearConfig(FEW_ROWS if m <= FEW_ROWS else 64, 32, 16, 4, 3)
    # Elements in 128 bytes.
    line = 32 if dtype == "float32" else 64
    if m <= FEW_ROWS:
        # Small tiles give every multiprocessor some, and many stages keep its memory busy.
        stages = 6 if target.backend == "cuda" else 2
        return GatedLinearConfig(FEW_ROWS, 32, line, num_warps=4, num_stages=stages)
    if cdna:
        # Twice as wide, the backward of 16 bits would spill.
        block_n = 64 if backward and dtype != "float32" else 128
        return GatedLinearConfig(128, block_n, line, num_warps=8, num_stages=2)
    if rdna:
        return GatedLinearConfig(128, 64, line // 2, num_warps=8, num_stages=2)
    if target.shared_memory >= LARGE_SHARED_MEMORY:
        return GatedLinearConfig(128, 64 if backward else 128, line, num_warps=8, num_stages=4)
    if backward:
        return GatedLinearConfig(128, 64, line // 2, num_warps=8, num_stages=4)
    return GatedLinearConfig(128, 64, line, num_warps=8, num_stages=3)
