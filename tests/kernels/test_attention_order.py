"""The order in which the grids of attention's kernels go over heads and tiles."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from bench.compiled.cost.hardware import HARDWARE
from bench.compiled.cost.l2 import (
    PROGRAMS,
    Attention,
    count_traffic,
    describe_device,
    order_programs,
)
from fastattn.kernels.attention.order import find_program, part_pairs
from fastattn.kernels.config import INTERPRETER
from support import DEVICE

H100 = describe_device("sm_90")

# Pairs, tiles, pairs of a group, groups: one group, equal ones, a larger last one, single pairs.
ORDERS = [(5, 3, 2, 1), (6, 3, 2, 3), (7, 2, 2, 3), (4, 3, 1, 4), (1, 1, 1, 1), (3, 2, 8, 1)]

TRAINING = Attention(4, 32, 32, 4096, 128, causal=True)


@triton.jit
def order_kernel(out_ptr, pairs, pairs_of_group, groups):
    program = find_program(pairs, pairs_of_group, groups)
    tl.store(out_ptr + 2 * tl.program_id(0), program.pair)
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, program.tile)


@pytest.mark.kernels
@pytest.mark.parametrize("order", ORDERS)
def test_programs_find_their_places_in_the_order(order):
    pairs, tiles, *groups = order
    out = torch.full((pairs * tiles, 2), -1, dtype=torch.int32, device=DEVICE)
    order_kernel[(pairs * tiles,)](out, pairs, *groups)
    assert list(map(tuple, out.tolist())) == list(order_programs(*order))


@pytest.mark.parametrize("order", ORDERS)
def test_every_tile_of_every_pair_is_visited_once(order):
    pairs, tiles, *_ = order
    visited = list(order_programs(*order))
    assert sorted(visited) == list(itertools.product(range(pairs), range(tiles)))


def test_a_group_ends_before_the_next_begins_and_its_tiles_come_in_turn():
    visited = list(order_programs(7, 2, 2, 3))
    assert visited[:4] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert visited[8:] == [(4, 0), (5, 0), (6, 0), (4, 1), (5, 1), (6, 1)]


def test_a_group_is_what_the_cache_holds():
    # Keys and values of 4096 tokens with heads of 128 are 2 MB.
    megabytes = 2_097_152
    pairs_of_group, groups = part_pairs(H100, 128, 32, 8, megabytes)
    assert pairs_of_group == 11
    assert groups == 11, "18 pairs are left for the end, where two programs an SM are needed"
    assert part_pairs(H100, 128, 32, 4, megabytes)[1] == 11, "or four programs of four warps"
    assert part_pairs(H100, 128, 32, 8, megabytes, sharing=4)[0] == 44
    assert part_pairs(H100, 4, 1024, 8, 100 * megabytes) == (1, 4), "more than the cache holds"
    assert part_pairs(H100, 8, 16, 8, megabytes) == (11, 1), "all at once"
    assert part_pairs(INTERPRETER, 4, 3, 4, 1)[1] > 1, "the interpreter has groups too"


def last_end(programs, slots):
    """When the last program ends, if each takes a step a block and starts where one has ended."""
    ends = [0] * slots
    for program in programs:
        first = min(range(slots), key=ends.__getitem__)
        ends[first] += len(program) + 1
    return max(ends)


@pytest.mark.parametrize("kernel", PROGRAMS)
@pytest.mark.parametrize("target", HARDWARE)
def test_keys_come_from_hbm_about_once_and_all_end_together(monkeypatch, kernel, target):
    traffic = count_traffic(target, kernel, TRAINING, 128, 8, 1)
    assert traffic.moved < 1.2 * traffic.least
    slots = HARDWARE[target].multiprocessors
    grouped = PROGRAMS[kernel](TRAINING, 128, 8, target)
    monkeypatch.setattr("bench.compiled.cost.l2.part_pairs", lambda device, pairs, *_: (pairs, 1))
    longest_first = PROGRAMS[kernel](TRAINING, 128, 8, target)
    assert sorted(map(len, grouped)) == sorted(map(len, longest_first))
    assert last_end(grouped, slots) <= 1.02 * last_end(longest_first, slots)
