"""Block sizes of the products of experts.

The rows of a product count by how many an expert has on average, a shape: how the router spread
them is known on the device alone.
"""

import functools
from dataclasses import dataclass, replace

from ..config import INVARIANT_ROWS, Target, cdiv
from ..matmul.config import SMALLEST_BLOCK
from ..tuning import Bucket, bucket, choose


@dataclass(frozen=True)
class ExpertsConfig:
    """How a product of experts is cut: one program a tile (block_m, block_n), in steps of block_k.

    block_m are rows and block_n columns of the result. Of the gradient of a weight both are
    features, and block_k are rows.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    """How many steps' operands are in shared memory at once."""
    group_m: int = 8
    """Rows of tiles that are handed out together, so that they share operands in L2."""


def experts_config(
    rule_name: str,
    rows: int,
    experts: int,
    n: int,
    k: int,
    dtype: str,
    precision: str,
    target: Target,
    *,
    batch_invariant: bool = False,
) -> ExpertsConfig:
    """The configuration of a product of `rows` rows with the weights of their experts.

    Sizes count as powers of two, so that the exact number of rows changes nothing.

    Args:
        rule_name: "grouped_linear", "experts_forward", "experts_backward" or "grouped_weight".
        rows: of all experts together.
        experts: how many share them.
        n, k: columns of the result and the length of a sum; of "grouped_weight" columns and rows
            of an expert's weight.
        dtype: the operands' dtype by name.
        precision: "ieee" or "tf32", for float32.
        target: the device.
        batch_invariant: leave the rows out of it.
    """
    share = INVARIANT_ROWS if batch_invariant else cdiv(rows, max(experts, 1))
    return choose(
        rule_name,
        RULES[rule_name],
        target,
        rows=bucket(share),
        n=bucket(n),
        k=bucket(k),
        dtype=dtype,
        precision=precision,
    )


MOST_ROWS = 128


@functools.cache
def largest_tile(target: Target, dtype: str, precision: str) -> ExpertsConfig:
    """The tile of a plain product of experts with many rows, such that nothing spills."""
    if target.backend == "interpreter":
        return ExpertsConfig(16, 32, 32, num_warps=4, num_stages=2)
    cdna = target.backend == "hip" and target.warp_size == 64
    rdna = target.backend == "hip" and not cdna
    if dtype == "float32" and (rdna or (precision == "ieee" and not cdna)):
        # On the ordinary units: more than this unrolls into thousands of instructions.
        return ExpertsConfig(64, 32, 16, num_warps=4, num_stages=2)
    # Elements in 128 bytes.
    line = 32 if dtype == "float32" else 64
    if cdna:
        return ExpertsConfig(128, 128, 32, num_warps=8, num_stages=2)
    if rdna:
        return ExpertsConfig(64, 64, 32, num_warps=4, num_stages=2)
    return ExpertsConfig(128, 128, line, num_warps=8, num_stages=3)


def _fit(config: ExpertsConfig, rows: int, n: int, k: int) -> ExpertsConfig:
    """The configuration with blocks no larger than what there is."""
    block_m = min(config.block_m, max(SMALLEST_BLOCK, rows))
    block_n = min(config.block_n, max(SMALLEST_BLOCK, n))
    block_k = min(config.block_k, max(SMALLEST_BLOCK, k))
    warps = config.num_warps * block_m * block_n // (config.block_m * config.block_n)
    return replace(
        config,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        num_warps=max(min(4, config.num_warps), warps),
    )


def product_rule(
    target: Target, *, rows: Bucket, n: Bucket, k: Bucket, dtype: str, precision: str
) -> ExpertsConfig:
    """The tile of a product that is stored as it is."""
    config = _fit(largest_tile(target, dtype, precision), min(rows, MOST_ROWS), n, k)
    if target.backend == "cuda" and config.block_m <= 32:
        # So few rows wait for the memory that the weights come from.
        config = replace(config, num_stages=4)
    return config


def activated_rule(
    target: Target, *, rows: Bucket, n: Bucket, k: Bucket, dtype: str, precision: str
) -> ExpertsConfig:
    """The tile of gate and up, half as wide as that of a plain product, for there are two."""
    config = largest_tile(target, dtype, precision)
    if target.backend != "interpreter":
        config = replace(config, block_n=max(32, config.block_n // 2))
    return _fit(config, min(rows, MOST_ROWS), n, k)


def slope_rule(
    target: Target, *, rows: Bucket, n: Bucket, k: Bucket, dtype: str, precision: str
) -> ExpertsConfig:
    """The tile of a gradient that goes through the activation.

    Half as high where eight warps have it: beside the sum there are gates and ups, and then the
    gradients of both and what they made, which would spill hundreds of bytes.
    """
    config = activated_rule(target, rows=rows, n=n, k=k, dtype=dtype, precision=precision)
    if target.backend == "cuda" and config.num_warps == 8:
        config = replace(config, block_m=config.block_m // 2)
    return config


def weight_rule(
    target: Target, *, rows: Bucket, n: Bucket, k: Bucket, dtype: str, precision: str
) -> ExpertsConfig:
    """The tile (n, k) of a weight's gradient, summed over an expert's rows, block_k at a time."""
    config = largest_tile(target, dtype, precision)
    if target.backend == "cuda" and int(target.arch) < 90:
        # Triton's own triton_kernels pipelines no sum there whose length the device alone knows,
        # for wrong results on an A100. Executed by fastattn.machine such code was right.
        config = replace(config, num_stages=1)
    return _fit(config, n, k, rows)


RULES = {
    "grouped_linear": product_rule,
    "experts_forward": activated_rule,
    "experts_backward": slope_rule,
    "grouped_weight": weight_rule,
}


CANDIDATE_TILES = ((16, 64), (16, 128), (32, 128), (64, 64), (64, 128), (128, 64), (128, 128))
CANDIDATE_STEPS = ((32, 2), (32, 4), (64, 1), (64, 3), (64, 4))
"""block_k and num_stages."""

OPERANDS = {"grouped_linear": 1, "experts_forward": 2, "experts_backward": 1, "grouped_weight": 1}
"""How many tiles of weights a step of each kernel has beside its tile of rows."""


def experts_candidates(
    kernel: str,
    target: Target,
    *,
    rows: Bucket,
    n: Bucket,
    k: Bucket,
    dtype: str,
    precision: str,
) -> list[ExpertsConfig]:
    """Configurations that `python -m fastattn tune` tries beside the rule's."""
    itemsize, count = 4 if dtype == "float32" else 2, OPERANDS[kernel]
    rule = RULES[kernel](target, rows=rows, n=n, k=k, dtype=dtype, precision=precision)
    # Of a weight's gradient the tile is made of features, and what is summed over are rows.
    most_m = n if kernel == "grouped_weight" else rows
    found = [
        ExpertsConfig(block_m, block_n, block_k, num_warps, num_stages)
        for block_m, block_n in CANDIDATE_TILES
        for block_k, num_stages in CANDIDATE_STEPS
        for num_warps in (4, 8)
        if block_m <= max(SMALLEST_BLOCK, most_m)
        # Accumulators of a thread.
        if 8 <= count * block_m * block_n // (num_warps * target.warp_size) <= 128
        if num_stages * (block_m + count * block_n) * block_k * itemsize <= target.shared_memory
    ]
    return [config for config in found if config != rule]
