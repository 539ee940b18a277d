"""Tiles of attention that `python -m fastattn tune` tries beside the rule's."""

import dataclasses
import itertools
from typing import Any

from ..config import Target
from .config import NARROWEST, AttentionConfig, attention_rule

WIDEST_BLOCK = 256

MOST_CANDIDATES = 24
"""Each takes seconds to compile."""


def attention_candidates(target: Target, **features: Any) -> list[AttentionConfig]:
    """Configurations near the rule's, the nearest first.

    Near is what has blocks of half or twice the size, twice or half the warps, and a stage more or
    less. `features` are those of `attention_rule`.
    """
    rule = attention_rule(target, **features)
    changes = itertools.product((0, -1, 1), (0, -1, 1), (0, -1, 1), (0, -1, 1))
    found: list[AttentionConfig] = []
    for rows, cols, warps, stages in sorted(changes, key=lambda change: sum(map(abs, change))):
        config = dataclasses.replace(
            rule,
            block_m=_double(rule.block_m, rows),
            block_n=_double(rule.block_n, cols),
            num_warps=_double(rule.num_warps, warps),
            num_stages=rule.num_stages + stages,
        )
        if (
            config != rule
            and NARROWEST <= config.block_m <= WIDEST_BLOCK
            and NARROWEST <= config.block_n <= WIDEST_BLOCK
            and 4 <= config.num_warps <= 16
            and 1 <= config.num_stages <= 5
        ):
            found.append(config)
    return found[:MOST_CANDIDATES]


def _double(size: int, times: int) -> int:
    """Doubled so many times, or halved as often as that is negative."""
    return size << times if times >= 0 else size >> -times
