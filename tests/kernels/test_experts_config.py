"""The block sizes of products of experts on every kind of device."""

import itertools

import pytest

from fastattn.kernels.config import INTERPRETER, Target
from fastattn.kernels.experts.config import RULES, experts_config
from fastattn.machine.driver import TARGETS as COMPILED_TARGETS

GPUS = [
    Target(t.gpu.backend, t.gpu.arch, t.gpu.warp_size, t.multiprocessors, t.shared_memory)
    for t in COMPILED_TARGETS.values()
]
KINDS = [
    ("bfloat16", "ieee", 2),
    ("float16", "ieee", 2),
    ("float32", "ieee", 4),
    ("float32", "tf32", 4),
]
SIZES = (1, 100, 768, 2880, 14336)
# Rows and experts, from no rows at all to many of few experts.
SPREADS = [(0, 8), (16, 128), (4096, 128), (65536, 8)]

# Tiles of weights that a step has beside one of rows.
WEIGHTS = {"experts_forward": 2}


@pytest.mark.parametrize("target", [INTERPRETER, *GPUS], ids=lambda target: str(target.arch))
@pytest.mark.parametrize("rule", RULES)
def test_tiles_fit(target, rule):
    for (rows, experts), n, k, kind in itertools.product(SPREADS, SIZES, SIZES, KINDS):
        dtype, precision, itemsize = kind
        for batch_invariant in (False, True):
            config = experts_config(
                rule,
                rows,
                experts,
                n,
                k,
                dtype,
                precision,
                target,
                batch_invariant=batch_invariant,
            )
            for block in (config.block_m, config.block_n, config.block_k):
                assert block >= 16
                assert block & (block - 1) == 0
            assert config.num_warps in (1, 2, 4, 8)
            columns = config.block_n * WEIGHTS.get(rule, 1)
            accumulators = config.block_m * columns / (config.num_warps * target.warp_size)
            assert accumulators <= 128
            operands = (config.block_m + columns) * config.block_k * itemsize
            assert config.num_stages * operands <= target.shared_memory


@pytest.mark.parametrize("rule", RULES)
def test_rows_count_as_powers_of_two_and_not_at_all_for_invariant_bits(rule):
    def config(rows: int, *, batch_invariant: bool = False):
        sizes = (rows, 8, 4096, 4096, "bfloat16", "ieee", GPUS[0])
        return experts_config(rule, *sizes, batch_invariant=batch_invariant)

    assert config(8 * 33) == config(8 * 64)
    one, *others = (config(rows, batch_invariant=True) for rows in (0, 1, 64, 5000, 10**6))
    assert all(other == one for other in others)


def test_weights_gradients_are_not_pipelined_before_hopper():
    """As Triton's own library has it, for wrong results on an A100."""
    for target in GPUS:
        sizes = (32768, 128, 768, 2048, "bfloat16", "ieee", target)
        stages = experts_config("grouped_weight", *sizes).num_stages
        early = target.backend == "cuda" and int(target.arch) < 90
        assert (stages == 1) is early
