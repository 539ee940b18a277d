"""How the warp-specialised backward kernels are cut, and whether they are taken: not unless
measured, as the forward, see config.py."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from ...config import Target
from ...tuning import choose
from .config import ROWS, WARPS

CONSUMERS = 2
"""Warpgroups of a program that multiply. With three, sums of 128 columns would not fit."""


@dataclass(frozen=True)
class HopperBackwardConfig:
    """How a warp-specialised backward kernel is cut."""

    rows: int
    """Of a block: the queries that a tile of keys meets in a turn, or the other way round."""
    stages: int
    """Blocks of each tensor that shared memory holds."""
    used: bool = False
    """Whether this kernel is taken, and not the one of all devices."""

    @property
    def tile(self) -> int:
        """Keys of a program, or queries of one."""
        return ROWS * CONSUMERS

    @property
    def num_warps(self) -> int:
        """Warps of a program; Triton takes a whole warpgroup for the one that copies."""
        return WARPS * (CONSUMERS + 1)


KEYS = "attention_hopper_keys_backward"
QUERIES = "attention_hopper_queries_backward"

RULES = {
    KEYS: {
        (64, 64): HopperBackwardConfig(64, 4),
        (96, 96): HopperBackwardConfig(64, 4),
        (128, 128): HopperBackwardConfig(64, 2),
        (192, 128): HopperBackwardConfig(32, 4),
    },
    QUERIES: {
        (64, 64): HopperBackwardConfig(64, 4),
        (96, 96): HopperBackwardConfig(64, 4),
        (128, 128): HopperBackwardConfig(64, 4),
        (192, 128): HopperBackwardConfig(64, 2),
    },
}
"""By the columns of keys and values, for each kernel: what does not spill in its loops. With a
power of two of stages the number of a buffer takes no division."""

HopperBackwardRule = Callable[[str, int, int, Target], HopperBackwardConfig]


def hopper_backward_rule(
    target: Target, *, kernel: str, key_dim: int, value_dim: int
) -> HopperBackwardConfig:
    """The configuration where no table has an entry: one that is not used."""
    return RULES[kernel][key_dim, value_dim]


def hopper_backward_config(
    kernel: str, key_dim: int, value_dim: int, target: Target
) -> HopperBackwardConfig:
    """The configuration of a kernel for heads of so many columns, which its rule must have."""
    rule = functools.partial(hopper_backward_rule, kernel=kernel)
    return choose(kernel, rule, target, key_dim=key_dim, value_dim=value_dim)


def hopper_backward_candidates(
    target: Target, *, kernel: str, key_dim: int, value_dim: int
) -> list[HopperBackwardConfig]:
    """What `python -m fastattn tune` tries beside the kernel of all devices; none elsewhere."""
    if target.arch != 90:
        return []
    first = RULES[kernel][key_dim, value_dim]
    cuts = dict.fromkeys((first.rows, stages) for stages in (first.stages, 2, 4))
    return [HopperBackwardConfig(*cut, used=True) for cut in cuts]
