"""In which order warps and asynchronous work go on: chosen at random, or as badly as possible.

PTX promises no order but what barriers make, so any choice is one that a GPU might make. Choices
are drawn from a seed, so that a run can be repeated: `--schedule late:3`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

POLICIES = {
    "random": "anything that can go on, by chance",
    "priorities": "whoever has the highest priority, which are drawn and change now and then",
    "late": "products and copies when nothing else can go on",
    "early": "products and copies at once",
    "late-products": "products when nothing else can go on, the rest by chance",
    "low-warps": "the warpgroup of the lowest number first",
    "high-warps": "the warpgroup of the highest number first",
}
"""What goes first under each policy."""

CHANGE = 0.02
"""How often, under priorities, who was chosen has the lowest priority from then on."""


@dataclass(frozen=True)
class Schedule:
    """A policy, and the seed of what it leaves to chance."""

    policy: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what is no policy."""
        if self.policy not in POLICIES:
            raise ValueError(f"expected one of {', '.join(POLICIES)}, got {self.policy!r}")

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule that is written ``policy:seed``, or as a policy alone."""
        policy, _, seed = text.partition(":")
        return cls(policy, int(seed or 0))

    def __str__(self) -> str:
        """As `parse` takes it."""
        return f"{self.policy}:{self.seed}"


DEFAULT_SCHEDULE = Schedule()


class Event(NamedTuple):
    """Something that can happen next: a warp's next block, its next product, or a copy's arrival.

    Attributes:
        kind: ``warp``, ``product`` or ``copy``.
        number: Which.
    """

    kind: str
    number: int


Some = TypeVar("Some")


class Chooser:
    """Chooses what happens next in a CTA."""

    def __init__(self, schedule: Schedule, cta: int) -> None:
        self.policy = schedule.policy
        self._random = np.random.default_rng([schedule.seed, cta])
        self._priorities: dict[Event, float] = {}

    def choose(self, events: list[Event]) -> Event:
        """What happens next."""
        ranks = [self._rank(event) for event in events]
        best = max(ranks)
        chosen = self.draw([e for e, rank in zip(events, ranks, strict=True) if rank == best])
        if self.policy == "priorities" and self._random.random() < CHANGE:
            self._priorities[chosen] = min(self._priorities.values()) - 1.0
        return chosen

    def _rank(self, event: Event) -> float:
        warp = event.kind == "warp"
        match self.policy:
            case "priorities":
                return self._priorities.setdefault(event, self._random.random())
            case "late":
                return float(warp)
            case "early":
                return float(not warp)
            case "late-products":
                return float(event.kind != "product")
            case "low-warps" | "high-warps":
                # Of the others one goes first every now and then.
                lowest = self._random.integers(-8, 8) if not warp else -(event.number // 4)
                return float(lowest if self.policy == "low-warps" or not warp else -lowest)
            case _:
                return 0.0

    def draw(self, some: list[Some]) -> Some:
        """One of some, by chance."""
        return some[int(self._random.integers(len(some)))]

    def arrives_late(self) -> bool:
        """Whether a copy is seen no sooner than it must be."""
        return self.policy == "late" or (self.policy != "early" and self._random.random() < 0.5)

    def cut(self, pieces: int) -> int:
        """Where a copy of some pieces is cut into two that arrive one by one."""
        return int(self._random.integers(pieces))
