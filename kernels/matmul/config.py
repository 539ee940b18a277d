"""Block sizes of matrix products."""

import functools
from dataclasses import dataclass, replace

from ..config import INVARIANT_ROWS, Target, cdiv
from ..tuning import Bucket, bucket, choose


@dataclass(frozen=True)
class MatmulConfig:
    """How a product is cut: one program a tile of (block_m, block_n), in steps of block_k."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    """How many steps' operands are in shared memory at once."""
    group_m: int = 8
    """Rows of tiles that are handed out together, so that they share operands in L2."""
    splits: int = 1
    """Programs that share a tile, each with its part of K."""
    persistent: bool = False
    """Whether a program takes one tile after another. No rule says so; a measured table may."""


def matmul_config(
    m: int,
    n: int,
    k: int,
    batch: int,
    dtype: str,
    precision: str,
    units: str,
    fused: bool,
    target: Target,
    *,
    batch_invariant: bool = False,
) -> MatmulConfig:
    """The configuration of `batch` products (m, k) x (k, n).

    All sizes count as powers of two, so that the exact number of tokens changes nothing.

    Args:
        m, n, k, batch: the sizes.
        dtype: the operands' dtype by name.
        precision: "ieee" or "tf32", for float32.
        units: the dimensions along which a and b have neighbouring elements, such as "kn".
        fused: whether more follows than a bias and a comparison, which takes registers.
        target: the device.
        batch_invariant: leave m and batch out of it, and never split K.
    """
    if batch_invariant:
        m, batch = INVARIANT_ROWS, 1
    config = choose(
        "matmul",
        matmul_rule,
        target,
        m=bucket(m),
        n=bucket(n),
        k=bucket(k),
        batch=bucket(batch),
        dtype=dtype,
        precision=precision,
        units=units,
        fused=fused,
    )
    return _drop_splits(config) if batch_invariant else config


@functools.cache
def _drop_splits(config: MatmulConfig) -> MatmulConfig:
    return replace(config, splits=1)


LARGE_SHARED_MEMORY = 3 * (128 + 256) * 64 * 2
"""Three stages of the largest tile: sm_80, sm_90 and sm_100 have them."""


@functools.cache
def largest_tile(target: Target, dtype: str, precision: str, fused: bool) -> MatmulConfig:
    """The tile for products so large that it fills the device many times.

    All are such that nothing spills: 128 x 256 with an activation and a residual would, by hundreds
    of bytes, and so it would on sm_80, whose operands pass through registers, in steps of 64.
    """
    if target.backend == "interpreter":
        return MatmulConfig(32, 32, 32, num_warps=4, num_stages=2)
    if precision == "ieee" and dtype == "float32":
        # On the ordinary units: more than this unrolls into thousands of instructions.
        return MatmulConfig(64, 64, 16, num_warps=8 if fused else 4, num_stages=2)
    if target.backend == "hip":
        if target.warp_size == 64:
            return MatmulConfig(128, 128, 32, num_warps=4, num_stages=2)
        return MatmulConfig(64, 64, 32, num_warps=4, num_stages=2)
    if dtype == "float32":
        return MatmulConfig(128, 128, 32, num_warps=8, num_stages=3)
    if fused or target.shared_memory < LARGE_SHARED_MEMORY:
        return MatmulConfig(128, 128, 64, num_warps=8, num_stages=3)
    if int(target.arch) < 90:
        return MatmulConfig(128, 256, 32, num_warps=8, num_stages=4)
    return MatmulConfig(128, 256, 64, num_warps=8, num_stages=3)


SMALLEST_BLOCK = 16
"""What tensor cores take, in every dimension."""

NARROWEST_COPY = 4
"""Bytes that NVIDIA's GPUs copy to shared memory without passing through registers, at least."""

MOST_SINGLE_ELEMENTS = 32
"""Elements of a step that a thread may load one by one. With twice as many, addresses spill."""


def loads_single_elements(divisor: int, itemsize: int, target: Target) -> bool:
    """Whether operands whose strides `divisor` divides are loaded one by one, through registers.

    So are 16-bit operands of an odd width. AMD's GPUs load them so too, but have the registers.
    """
    return target.backend == "cuda" and divisor * itemsize < NARROWEST_COPY


def block_k_of_single_elements(rows: int, block_k: int, num_warps: int, target: Target) -> int:
    """block_k where the operands' `rows` of a step are loaded one by one, each with its address."""
    threads = num_warps * target.warp_size
    while rows * block_k > MOST_SINGLE_ELEMENTS * threads and block_k > SMALLEST_BLOCK:
        block_k //= 2
    return block_k


SMALLEST_LARGE_BLOCK = 64
"""Tiles of a matrix that is not itself smaller are not cut below this to get more of them."""

FEW_ROWS = 32

MOST_SPLITS = 32
LEAST_STEPS = 4
"""Steps of block_k that a split must leave to a program: fewer would not pay for the sum."""


def matmul_rule(
    target: Target,
    *,
    m: Bucket,
    n: Bucket,
    k: Bucket,
    batch: Bucket,
    dtype: str,
    precision: str,
    units: str,
    fused: bool,
) -> MatmulConfig:
    """The largest tile that still gives every multiprocessor one, and splits where none does."""
    config = largest_tile(target, dtype, precision, fused)
    block_m = min(config.block_m, max(SMALLEST_BLOCK, m))
    block_n = min(config.block_n, max(SMALLEST_BLOCK, n))
    block_k = min(config.block_k, max(SMALLEST_BLOCK, k))

    def tiles() -> int:
        return batch * cdiv(m, block_m) * cdiv(n, block_n)

    while tiles() < target.multiprocessors and max(block_m, block_n) > SMALLEST_LARGE_BLOCK:
        if block_n >= block_m:
            block_n //= 2
        else:
            block_m //= 2
    splits = 1
    while (
        2 * splits * tiles() <= target.multiprocessors
        and splits < MOST_SPLITS
        and k >= 2 * splits * LEAST_STEPS * block_k
    ):
        splits *= 2
    warps = config.num_warps * block_m * block_n // (config.block_m * config.block_n)
    stages = config.num_stages
    if target.backend == "cuda" and block_m <= FEW_ROWS:
        # So few rows wait for the memory that the other operand comes from.
        step = (block_m + block_n) * block_k * (4 if dtype == "float32" else 2)
        stages = min(5, target.shared_memory // step)
    return replace(
        config,
        num_stages=stages,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        num_warps=max(min(4, config.num_warps), warps),
        splits=splits,
    )


CANDIDATE_TILES = (
    (16, 64),
    (16, 128),
    (64, 64),
    (64, 128),
    (128, 64),
    (128, 128),
    (128, 256),
    (256, 128),
)
CANDIDATE_STEPS = ((32, 2), (32, 4), (64, 3), (64, 4))
"""block_k and num_stages."""


def matmul_candidates(
    target: Target,
    *,
    m: Bucket,
    n: Bucket,
    k: Bucket,
    batch: Bucket,
    dtype: str,
    precision: str,
    units: str,
    fused: bool,
) -> list[MatmulConfig]:
    """Configurations that `python -m fastattn tune` tries beside the rule's."""
    itemsize = 4 if dtype == "float32" else 2
    rule = matmul_rule(
        target,
        m=m,
        n=n,
        k=k,
        batch=batch,
        dtype=dtype,
        precision=precision,
        units=units,
        fused=fused,
    )
    return [
        MatmulConfig(
            block_m,
            block_n,
            block_k,
            num_warps,
            num_stages,
            splits=rule.splits,
            persistent=persistent,
        )
        for block_m, block_n in CANDIDATE_TILES
        for block_k, num_stages in CANDIDATE_STEPS
        for num_warps in (4, 8)
        for persistent in (False, True)
        if block_m <= max(SMALLEST_BLOCK, m)
        # Accumulators of a thread.
        if 16 <= block_m * block_n // (num_warps * target.warp_size) <= 128
        if num_stages * (block_m + block_n) * block_k * itemsize <= target.shared_memory
    ]
