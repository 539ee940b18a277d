"""The block sizes that every product gets on every kind of device."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn.kernels.config import INTERPRETER, Target, cdiv
from fastattn.kernels.matmul.config import (
    MatmulConfig,
    largest_tile,
    matmul_candidates,
    matmul_config,
    matmul_rule,
)
from fastattn.kernels.tuning import bucket
from fastattn.machine.driver import TARGETS as COMPILED_TARGETS

TARGETS = (
    INTERPRETER,
    *(
        Target(t.gpu.backend, t.gpu.arch, t.gpu.warp_size, t.multiprocessors, t.shared_memory)
        for t in COMPILED_TARGETS.values()
    ),
)
KINDS = (
    ("bfloat16", "ieee", 2),
    ("float16", "ieee", 2),
    ("float32", "ieee", 4),
    ("float32", "tf32", 4),
)
SIZES = (1, 7, 16, 100, 1024, 4096, 16384, 131072)

every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))


def config_of(
    target: Target,
    m: int,
    n: int,
    k: int,
    kind: tuple = KINDS[0],
    batch: int = 1,
    fused: bool = False,
) -> MatmulConfig:
    return matmul_rule(
        target,
        m=bucket(m),
        n=bucket(n),
        k=bucket(k),
        batch=bucket(batch),
        dtype=kind[0],
        precision=kind[1],
        units="kn",
        fused=fused,
    )


def check(config: MatmulConfig, target: Target, itemsize: int) -> None:
    """What tensor cores and Triton demand of a tile, and what a block can hold."""
    for block in (config.block_m, config.block_n, config.block_k):
        assert block >= 16
        assert block & (block - 1) == 0
    assert config.num_warps in (4, 8)
    # Half of the 255 registers of a thread at most are accumulators.
    accumulators = config.block_m * config.block_n / (config.num_warps * target.warp_size)
    assert accumulators <= 128
    operands = (config.block_m + config.block_n) * config.block_k * itemsize
    assert config.num_stages * operands <= target.shared_memory
    assert config.splits >= 1
    assert not config.persistent


@every_target
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_tiles_fit(target, kind, fused):
    for m, n, k in itertools.product(SIZES, SIZES, SIZES):
        check(config_of(target, m, n, k, kind, fused=fused), target, kind[2])


@given(
    target=st.sampled_from(TARGETS),
    kind=st.sampled_from(KINDS),
    sizes=st.tuples(*[st.integers(0, 1 << 20)] * 3),
    batch=st.integers(1, 1 << 12),
    fused=st.booleans(),
)
def test_tiles_of_any_product_fit(target, kind, sizes, batch, fused):
    m, n, k = sizes
    check(config_of(target, m, n, k, kind, batch, fused), target, kind[2])


def test_the_stages_of_few_rows_fit_into_little_shared_memory():
    target = next(target for target in TARGETS if target.arch == 86)
    config = config_of(target, 17, 65, 33, ("bfloat16", "ieee", 2), 65, False)
    assert config.num_stages == 4
    check(config, target, 2)


@every_target
def test_the_exact_number_of_tokens_changes_nothing(target):
    for first in (16, 64, 1024, 8192):
        found = {
            matmul_config(m, 4096, 4096, 1, "bfloat16", "ieee", "kk", False, target)
            for m in (first // 2 + 1, first - 3, first)
        }
        assert len(found) == 1


@every_target
def test_a_layer_is_compiled_for_few_numbers_of_tokens(target):
    compiled_for = set()
    for power in range(20):
        config = config_of(target, 1 << power, 4096, 4096)
        compiled_for.add(replace(config, splits=min(config.splits, 2)))
    assert len(compiled_for) <= 8


@every_target
def test_large_products_get_the_largest_tile_unsplit(target):
    config = config_of(target, 8192, 8192, 8192)
    assert config == largest_tile(target, "bfloat16", "ieee", False)


@every_target
def test_few_tiles_with_a_long_sum_are_split(target):
    config = config_of(target, 16, 16, 1 << 17)
    assert config.splits > 1
    # But never into so little that the sum of the splits would take longer.
    for k in (16, 256, 1024):
        config = config_of(target, 16, 16, k)
        assert config.splits == 1 or k // (config.splits * config.block_k) >= 4


@every_target
def test_splits_leave_no_more_programs_than_the_device_runs(target):
    for m, n in itertools.product(SIZES[:5], SIZES[:5]):
        config = config_of(target, m, n, 1 << 16)
        tiles = cdiv(bucket(m), config.block_m) * cdiv(bucket(n), config.block_n)
        assert config.splits == 1 or config.splits * tiles <= target.multiprocessors


@every_target
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_candidates_are_many_and_fit(target, kind):
    candidates = matmul_candidates(
        target,
        m=bucket(4096),
        n=bucket(4096),
        k=bucket(4096),
        batch=bucket(1),
        dtype=kind[0],
        precision=kind[1],
        units="kk",
        fused=False,
    )
    assert len(set(candidates)) == len(candidates)
    assert len(candidates) >= 8
    assert any(candidate.persistent for candidate in candidates)
    for candidate in candidates:
        operands = (candidate.block_m + candidate.block_n) * candidate.block_k * kind[2]
        assert candidate.num_stages * operands <= target.shared_memory
