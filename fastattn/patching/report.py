"""What a patch did to a model, and what it left alone."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .twins import describe_class

MOST_PLACES = 3
"""Places that a line of the printed report names; the report's attributes have all of them."""


@dataclass(frozen=True)
class Replaced:
    """A module that became one of ours."""

    places: tuple[str, ...]
    """Its names in the model, several if it is used in several places; "" is the model itself."""
    theirs: type
    ours: type


@dataclass(frozen=True)
class LeftAlone:
    """A module that stayed as it was."""

    places: tuple[str, ...]
    kind: type
    reason: str


@dataclass(frozen=True)
class Changed:
    """A setting of a model, or of a part of it, that is no module's class."""

    place: str
    """The name of the model that has it in the one that was patched; "" is that one itself."""
    setting: str
    before: str
    after: str


@dataclass(frozen=True)
class Report:
    """What `fastattn.patch` did; printed, a table with one line for modules that are alike."""

    replaced: tuple[Replaced, ...]
    left_alone: tuple[LeftAlone, ...]
    changed: tuple[Changed, ...] = ()

    def __str__(self) -> str:
        replaced = _alike(
            (r.theirs.__qualname__, describe_class(r.ours), r.places) for r in self.replaced
        )
        changed = _alike((f"{c.setting} {c.before}", c.after, (c.place,)) for c in self.changed)
        left = _alike((x.kind.__qualname__, x.reason, x.places) for x in self.left_alone)
        title = f"{len(self.replaced)} modules replaced, {len(self.left_alone)} left alone"
        tables = [
            _table(heading, rows)
            for heading, rows in (
                (("replaced", "by", "modules", "where"), replaced),
                (("changed", "to", "models", "where"), changed),
                (("left alone", "because", "modules", "where"), left),
            )
            if rows
        ]
        return "\n\n".join([title, *tables])


Row = tuple[str, str, str, str]


def _alike(modules: Iterable[tuple[str, str, tuple[str, ...]]]) -> list[Row]:
    """A row for each pair of first and second entry, in the order in which they come."""
    groups: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for first, second, places in modules:
        groups.setdefault((first, second), []).append(places)
    return [(*pair, str(len(found)), _where(found)) for pair, found in groups.items()]


def _where(modules: list[tuple[str, ...]]) -> str:
    """The places of modules, those that differ by the number of a layer alone as one."""
    patterns: dict[str, list[str]] = {}
    for name in (place or "(the model)" for places in modules for place in places):
        patterns.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    # A place that is like no other keeps its number.
    shown = [pattern if len(names) > 1 else names[0] for pattern, names in patterns.items()]
    more = len(shown) - MOST_PLACES
    return ", ".join(shown[:MOST_PLACES]) + (f" and {more} more" if more > 0 else "")


def _table(heading: Row, rows: list[Row]) -> str:
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(3)]
    lines = (
        f"{a:{widths[0]}}  {b:{widths[1]}}  {count:>{widths[2]}}  {where}"
        for a, b, count, where in (heading, *rows)
    )
    return "\n".join(lines)
