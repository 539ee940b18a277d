"""How attention to caches is cut on every kind of device."""

import itertools

import pytest
import torch

from fastattn.kernels.config import INTERPRETER, Target, cdiv
from fastattn.kernels.decode.config import (
    FEW_BLOCKS,
    MOST_PARTS,
    ROWS,
    choose_rows,
    decode_rules,
    part_keys,
)
from fastattn.machine.driver import TARGETS as COMPILED_TARGETS

GPUS = [
    Target(t.gpu.backend, t.gpu.arch, t.gpu.warp_size, t.multiprocessors, t.shared_memory)
    for t in COMPILED_TARGETS.values()
]
HOPPER = next(target for target in GPUS if target.arch == 90)
HEADS = [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (576, 0)]
"""Columns of keys, and of values that are no columns of the keys."""


@pytest.mark.parametrize("target", [INTERPRETER, *GPUS], ids=lambda target: str(target.arch))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tiles_fit(target, dtype):
    for (key_dim, value_dim), rows in itertools.product(HEADS, ROWS):
        given = (key_dim, value_dim or 512, dtype, "ieee", "plain", target)
        config = decode_rules[rows](*given)
        assert 16 <= config.block_m <= rows
        for block in (config.block_m, config.block_n):
            assert block >= 16
            assert block & (block - 1) == 0
        assert config.num_warps in (4, 8)
        if target is not INTERPRETER:
            keys = config.num_stages * config.block_n * (key_dim + value_dim)
            held = (keys + config.block_m * key_dim) * dtype.itemsize
            # AMD's compiler keeps a single step's operands in registers.
            assert held <= target.shared_memory or (target.backend, config.num_stages) == ("hip", 1)


def test_rows_of_a_tile_are_the_queries_that_share_keys():
    for rows, expected in ((1, 16), (4, 16), (16, 16), (17, 32), (33, 64), (500, 64)):
        assert choose_rows(rows, False) == expected
        # Otherwise a token's place in a tile would hang on its company.
        assert choose_rows(rows, True) == ROWS[0]


def test_keys_are_parted_until_all_multiprocessors_have_work():
    # One sequence of 32 heads that share 8: 8 programs for 132 multiprocessors.
    parts = part_keys(8, 131072, 64, HOPPER)
    assert 8 * parts > 0.8 * 132
    for programs, keys in itertools.product((1, 2, 8, 64, 100, 105), (1, 300, 4096, 131072)):
        parts = part_keys(programs, keys, 64, HOPPER)
        blocks = cdiv(keys, 64)
        assert 1 <= parts <= min(MOST_PARTS, blocks)
        if blocks > FEW_BLOCKS and parts > 1:
            own, most = (
                programs * n / 132 / cdiv(programs * n, 132) for n in (parts, min(128, blocks))
            )
            assert own >= 0.85 * most


@pytest.mark.parametrize(
    ("programs", "keys"), [(106, 131072), (1000, 131072), (1, 256), (1, 0)], ids=str
)
def test_full_devices_and_short_caches_are_left_whole(programs, keys):
    assert part_keys(programs, keys, 64, HOPPER) == 1
