"""The block sizes that each width gets on each kind of device: rules, so no device is needed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn.kernels.config import (
    INTERPRETER,
    Target,
    cdiv,
    dropout_config,
    norm_backward_config,
    norm_forward_config,
)

TARGETS = (
    INTERPRETER,
    Target("cuda", 80, 32, multiprocessors=108, shared_memory=166912),
    Target("cuda", 86, 32, multiprocessors=28, shared_memory=101376),
    Target("cuda", 90, 32, multiprocessors=132, shared_memory=232448),
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

every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))


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


@every_target
def test_forward_tiles(target):
    for cols in WIDTHS:
        config = norm_forward_config(cols, target)
        check_tile(config.block_m, config.block_n, config.num_warps, target)
        assert config.whole_row is (config.block_n >= cols), cols
        # The kernel of wide rows takes one row a program.
        assert config.whole_row or config.block_m == 1, cols


@every_target
def test_backward_tiles(target):
    for cols in WIDTHS:
        config = norm_backward_config(cols, target)
        check_tile(config.block_m, config.block_n, config.num_warps, target)
        assert config.whole_row is (config.block_n >= cols), cols
        assert config.most_programs >= 1, cols
        if not config.whole_row:
            assert config.block_m == 1, cols
            # The kernel of the weight's gradient runs with four warps.
            check_tile(config.weight_block_m, config.weight_block_n, 4, target)


@every_target
def test_dropout_tiles(target):
    for cols in WIDTHS:
        config = dropout_config(cols, target)
        check_tile(config.block_m, config.block_n, config.num_warps, target)


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


@given(cols=st.integers(1, 1 << 18), target=st.sampled_from(TARGETS))
def test_any_width_gets_valid_tiles(cols, target):
    forward = norm_forward_config(cols, target)
    check_tile(forward.block_m, forward.block_n, forward.num_warps, target)
    backward = norm_backward_config(cols, target)
    check_tile(backward.block_m, backward.block_n, backward.num_warps, target)
    dropout = dropout_config(cols, target)
    check_tile(dropout.block_m, dropout.block_n, dropout.num_warps, target)


@pytest.mark.parametrize(
    ("numerator", "denominator", "quotient"),
    [(0, 4, 0), (1, 4, 1), (4, 4, 1), (2**40 + 1, 2, 2**39 + 1)],
)
def test_cdiv_rounds_up(numerator, denominator, quotient):
    assert cdiv(numerator, denominator) == quotient
