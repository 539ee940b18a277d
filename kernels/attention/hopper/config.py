"""How the warp-specialised forward is cut, and whether it is taken at all: not unless measured.

The rule never takes it. A table that `python -m fastattn tune` has written does, where it was the
faster one on the device of the table, see ../../tuning.py.
"""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ...config import Target
from ...tuning import choose

ROWS = 64
"""Queries of a consumer: as many rows has a product of one warpgroup."""

WARPS = 4
"""Warps of a warpgroup."""

CONSUMERS_REGISTERS = {2: 240, 3: 160}
"""What `setmaxnreg` gives each thread of so many consumers; the producer keeps a few."""

PRODUCERS_REGISTERS = 24


@dataclass(frozen=True)
class HopperConfig:
    """How the warp-specialised forward is cut."""

    consumers: int
    """Warpgroups, each with 64 queries of its own."""
    block_n: int
    """Keys of a block."""
    stages: int
    """Blocks of keys, and of values, that shared memory holds."""
    alternates: bool = False
    """Whether consumers issue their products one after the other."""
    used: bool = False
    """Whether this forward is taken, and not the one of all devices."""

    @property
    def block_m(self) -> int:
        """Queries of a program."""
        return ROWS * self.consumers

    @property
    def num_warps(self) -> int:
        """Warps of a program; Triton takes a whole warpgroup for the one that copies."""
        return WARPS * (self.consumers + 1)


class Cut(NamedTuple):
    """How the kernel is cut, as a constexpr."""

    block_m: int
    block_n: int
    divisor: int
    """What divides the strides of o."""
    consumers: int
    stages: int
    registers: int
    """Of each thread of the consumers but the first, which has what is left."""
    producers_registers: int
    alternates: bool
    clears: bool
    """Whether there may be rows behind a sequence's last key that are not its own, see
    `clear_values`."""


RULE = {
    (64, 64): HopperConfig(3, 64, 4, alternates=True),
    (96, 96): HopperConfig(2, 128, 2),
    (128, 128): HopperConfig(2, 128, 2),
    (192, 128): HopperConfig(2, 128, 2),
}
"""By the columns of keys and values: the fastest that is predicted and does not spill."""

HopperRule = Callable[[int, int, Target], HopperConfig]


def hopper_rule(target: Target, *, key_dim: int, value_dim: int) -> HopperConfig:
    """The configuration where no table has an entry: one that is not used."""
    return RULE[key_dim, value_dim]


def hopper_forward_config(key_dim: int, value_dim: int, target: Target) -> HopperConfig:
    """The configuration for heads of so many columns, which RULE must have."""
    return choose(
        "attention_hopper_forward", hopper_rule, target, key_dim=key_dim, value_dim=value_dim
    )


def hopper_candidates(target: Target, *, key_dim: int, value_dim: int) -> list[HopperConfig]:
    """What `python -m fastattn tune` tries beside the forward of all devices; none elsewhere."""
    if target.arch != 90:
        return []
    rule = RULE[key_dim, value_dim]
    cuts = itertools.product(CONSUMERS_REGISTERS, (64, 128), (2, 3, 4), (False, True))
    return [dataclasses.replace(rule, used=True)] + [
        config
        for config in (HopperConfig(*cut, used=True) for cut in cuts)
        if config != dataclasses.replace(rule, used=True)
    ]
