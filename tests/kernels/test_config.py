"""The block sizes that each width gets on each kind of device: rules, so no device is needed."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn.kernels.config import (
    INTERPRETER,
    WIDEST_BACKWARD_ROW,
    WIDEST_FORWARD_ROW,
    Target,
    cdiv,
)
from fastattn.kernels.cross_entropy_config import (
    cross_entropy_backward_config,
    cross_entropy_forward_config,
)
from fastattn.kernels.elementwise import elementwise_config
from fastattn.kernels.norm.config import norm_backward_config, norm_forward_config
from fastattn.kernels.rotary import rotary_config
from fastattn.kernels.softmax import softmax_backward_config, softmax_forward_config

TARGETS = (
    INTERPRETER,
    Target("cuda", 80, 32, multiprocessors=108, shared_memory=166912),
    Target("cuda", 86, 32, multiprocessors=28, shared_memory=101376),
    Target("cuda", 89, 32, multiprocessors=128, shared_memory=101376),
    Target("cuda", 90, 32, multiprocessors=132, shared_memory=232448),
    Target("cuda", 100, 32, multiprocessors=148, shared_memory=232448),
    Target("cuda", 120, 32, multiprocessors=188, shared_memory=101376),
    Target("hip", "gfx942", 64, multiprocessors=304, shared_memory=65536),
    Target("hip", "gfx1100", 32, multiprocessors=96, shared_memory=65536),
)

# What a block may have on every device, and what Triton allows in a tensor.
MOST_THREADS = 1024
MOST_ELEMENTS = 1 << 20

# Around every power of two, where rules change, and the widths of known models.
WIDTHS = sorted(
    {max(1, (1 << power) + step) for power in range(19) for step in (-1, 0, 1)} - {2**18 + 1}
    | {768, 1600, 2560, 3072, 5120, 7168, 11008, 14336, 50257, 151936}
)

# A rotation holds a head's angles whole; no head is wider than twice the last of these.
HALVES = [width for width in WIDTHS if width <= 8192]

WHOLE_ROW_RULES = {
    norm_forward_config: WIDEST_FORWARD_ROW,
    norm_backward_config: WIDEST_BACKWARD_ROW,
    softmax_forward_config: WIDEST_FORWARD_ROW,
    softmax_backward_config: WIDEST_BACKWARD_ROW,
}
"""The rules for rows that are read whole up to a width, and that width."""

TILED_RULES = (
    elementwise_config,
    cross_entropy_forward_config,
    cross_entropy_backward_config,
)
"""The rules for rows that may take several tiles, whatever their width."""

every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
every_rule = pytest.mark.parametrize(
    "rule", [*WHOLE_ROW_RULES, *TILED_RULES, rotary_config], ids=lambda rule: rule.__name__
)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def check_tile(block_m: int, block_n: int, num_warps: int, target: Target) -> None:
    """What Triton demands of a tile, and what a block of threads can hold."""
    assert is_power_of_two(block_m)
    assert is_power_of_two(block_n)
    assert block_m * block_n <= MOST_ELEMENTS
    assert is_power_of_two(num_warps)
    assert num_warps * target.warp_size <= MOST_THREADS
    # Four columns share the numbers of one Philox counter.
    assert block_n % 4 == 0
    # A tile wider than its registers spills: 32 elements a thread leave room for four such tiles.
    assert block_m * block_n <= 32 * num_warps * target.warp_size


def widths_of(rule: Callable) -> list[int]:
    return HALVES if rule is rotary_config else WIDTHS


@every_target
@every_rule
def test_tiles_fit_every_device(rule, target):
    for cols in widths_of(rule):
        config = rule(cols, target)
        check_tile(config.block_m, config.block_n, config.num_warps, target)


@every_target
@every_rule
def test_wider_rows_get_wider_tiles_of_fewer_rows_and_no_fewer_warps(rule, target):
    configs = [rule(cols, target) for cols in widths_of(rule)]
    whole = [config for config in configs if getattr(config, "whole_row", True)]
    # A row that is not read whole is wider than all that are.
    assert configs[: len(whole)] == whole
    for narrow, wide in pairwise(whole):
        assert narrow.block_n <= wide.block_n
        assert narrow.block_m >= wide.block_m
        assert narrow.num_warps <= wide.num_warps


@every_target
@pytest.mark.parametrize(
    ("rule", "widest"), WHOLE_ROW_RULES.items(), ids=[rule.__name__ for rule in WHOLE_ROW_RULES]
)
def test_rows_are_whole_up_to_a_width(rule, widest, target):
    for cols in WIDTHS:
        config = rule(cols, target)
        assert config.whole_row is (cols <= widest), cols
        assert config.whole_row is (config.block_n >= cols), cols
        # The kernels of wide rows take one row a program.
        assert config.whole_row or config.block_m == 1, cols


@every_target
def test_the_weight_gradient_of_wide_rows_has_tiles_of_its_own(target):
    for cols in WIDTHS:
        config = norm_backward_config(cols, target)
        assert config.most_programs >= 1, cols
        if not config.whole_row:
            # Its kernel runs with four warps.
            check_tile(config.weight_block_m, config.weight_block_n, 4, target)


@every_target
@pytest.mark.parametrize("rule", TILED_RULES, ids=lambda rule: rule.__name__)
def test_tiles_are_no_wider_than_a_row_needs(rule, target):
    for cols in WIDTHS:
        # Sixteen columns are the narrowest tile.
        assert rule(cols, target).block_n < max(17, 2 * cols), cols


@every_target
def test_a_rotation_holds_all_angles_of_a_head(target):
    for half in HALVES:
        config = rotary_config(half, target)
        assert half <= config.block_n < max(9, 2 * half), half
        assert config.heads >= 1, half


@every_target
def test_programs_of_a_backward_fill_the_device_and_no_more(target):
    for cols in WIDTHS:
        config = norm_backward_config(cols, target)
        # Partial rows of the weight's gradient, in float32.
        assert config.most_programs * cols * 4 <= 128 << 20, cols
        programs = config.most_programs
        if not config.whole_row:
            programs *= cdiv(cols, config.weight_block_n)
        assert programs >= target.multiprocessors, cols


@given(
    cols=st.integers(1, 1 << 18),
    target=st.sampled_from(TARGETS),
    rule=st.sampled_from([*WHOLE_ROW_RULES, *TILED_RULES]),
)
def test_any_width_gets_valid_tiles(cols, target, rule):
    config = rule(cols, target)
    check_tile(config.block_m, config.block_n, config.num_warps, target)


@pytest.mark.parametrize(
    ("numerator", "denominator", "quotient"),
    [(0, 4, 0), (1, 4, 1), (4, 4, 1), (2**40 + 1, 2, 2**39 + 1)],
)
def test_cdiv_rounds_up(numerator, denominator, quotient):
    assert cdiv(numerator, denominator) == quotient
