"""Which configuration a kernel is launched with: measured tables first, then an analytic rule.

    config = choose("matmul", matmul_rule, target, m=bucket(m), n=bucket(n), dtype="bfloat16")

asks, in this order, the user's table for the device's architecture, the table that ships with the
package, both again for each lower compute capability, and the rule. Nothing is timed here; tables
are what `python -m fastattn tune` has written. The answer is a pure function of the arguments and
of the tables, and is remembered.

A table is a JSON file named by architecture (sm90.json, gfx942.json), never by device name:

    {"format": 1, "gpu": "...", "triton": "...", "torch": "...", "date": "...",
     "kernels": {"matmul": [{"features": {"m": 4096, "n": 4096, "dtype": "bfloat16"},
                             "config": {"block_m": 128, ...},
                             "shared_memory": 98304, "microseconds": 210.4}]}}

`config` has the fields of the kernel's configuration, a frozen dataclass; `shared_memory` is what
the compiled kernel asked for, and an entry that asks for more than the device has is passed over:
a table measured on one card must not fail on a smaller one of the same architecture or a newer.
Whatever else an entry holds is for people to read.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .config import Target

Config = TypeVar("Config")

TABLE_FORMAT = 1

SHIPPED_TABLES = Path(__file__).parent / "tuned"

MOST_DOUBLINGS = 2
"""How far, in powers of two over all sizes together, a measured shape may be from the one asked."""

MOST_ANSWERS = 8192
"""Answers remembered. Features are few; with more, something varies that should not count."""


class Bucket(int):
    """A size rounded up to a power of two, which matches measured sizes near it."""


def bucket(size: int) -> Bucket:
    """The bucket of a size: the power of two that holds it, at least 1."""
    return Bucket(1 << max(0, size - 1).bit_length())


_answers: dict[tuple, Any] = {}


def choose(kernel: str, rule: Callable[..., Config], target: Target, **features: Any) -> Config:
    """The configuration of a kernel.

    Args:
        kernel: the name that tables know the kernel by.
        rule: called as rule(target, **features) where no table has an entry. A pure function that
            returns a frozen dataclass; an entry of a table is made into an object of that class.
        target: the device.
        features: what the configuration may depend on, always given in the same order. A `bucket`
            matches an exact entry first and then the nearest; anything else (a flag, a name of a
            dtype, a head dim) has to be equal, and must be a number, a string, a flag or None.

    Raises:
        ValueError: a table cannot be read; the message names the file.
    """
    key = (kernel, target, *features.values())
    answer = _answers.get(key)
    if answer is None:
        answer = rule(target, **features)
        measured = _find_measured(kernel, target, features)
        if measured is not None:
            answer = _read_config(measured, type(answer), kernel)
        if len(_answers) >= MOST_ANSWERS:
            _answers.clear()
        _answers[key] = answer
    return answer


def user_tables() -> Path:
    """The folder of the user's own tables, which `python -m fastattn tune` writes to."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastattn" / "tuned"


def table_name(target: Target) -> str | None:
    """The name of the tables of an architecture; None in the interpreter, which has none."""
    if target.backend == "interpreter":
        return None
    return f"sm{target.arch}" if target.backend == "cuda" else str(target.arch)


forgetters: list[Callable[[], None]] = []
"""What else forgets answers when tables are to be read anew."""


def forget_tables() -> None:
    """Read tables anew from now on, for whoever has written one."""
    _answers.clear()
    _read.cache_clear()
    for forget in forgetters:
        forget()


def _find_measured(
    kernel: str, target: Target, features: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """The entry to use: of the first table that has one near enough."""
    for table in _tables(target):
        near = [
            (distance, place)
            for place, entry in enumerate(table["kernels"].get(kernel, []))
            if entry["shared_memory"] <= target.shared_memory
            and (distance := _distance(entry["features"], features)) <= MOST_DOUBLINGS
        ]
        if near:
            return table["kernels"][kernel][min(near)[1]]
    return None


def _distance(measured: Mapping[str, Any], asked: Mapping[str, Any]) -> float:
    """Doublings between two shapes; infinite where anything but the sizes differs."""
    if measured.keys() != asked.keys():
        return float("inf")
    doublings = 0
    for name, value in asked.items():
        if isinstance(value, Bucket):
            doublings += abs(value.bit_length() - bucket(measured[name]).bit_length())
        elif value != measured[name]:
            return float("inf")
    return doublings


def _tables(target: Target) -> Iterator[Mapping[str, Any]]:
    name = table_name(target)
    if name is None:
        return
    folders = (user_tables(), SHIPPED_TABLES)
    names = [name]
    if target.backend == "cuda":
        found = {path.stem for folder in folders for path in folder.glob("sm*.json")}
        capabilities = sorted(
            (int(n[2:]) for n in found if re.fullmatch(r"sm\d+", n)), reverse=True
        )
        names += [f"sm{number}" for number in capabilities if number < int(target.arch)]
    for name in names:
        for folder in folders:
            table = _read(folder / f"{name}.json")
            if table is not None:
                yield table


@functools.cache
def _read(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        table = json.loads(path.read_text())
        if table["format"] != TABLE_FORMAT:
            raise ValueError(
                f"its format is {table['format']!r}, and this version reads {TABLE_FORMAT}"
            )
        for entries in table["kernels"].values():
            for entry in entries:
                _ = entry["features"], entry["config"], entry["shared_memory"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no table of block sizes ({error!r}); remove it, or write it anew with "
            "python -m fastattn tune"
        ) from error
    return table


def _read_config(entry: Mapping[str, Any], kind: type, kernel: str) -> Any:
    fields = {field.name for field in dataclasses.fields(kind)}
    if entry["config"].keys() != fields:
        raise ValueError(
            f"a measured configuration of {kernel} has the fields {sorted(entry['config'])}, and "
            f"this version knows {sorted(fields)}; write it anew with python -m fastattn tune"
        )
    return kind(**entry["config"])
