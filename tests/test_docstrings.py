"""Every public function and class has an example in its docstring, and each of them runs."""

import doctest
import importlib
import inspect
from typing import Any

import pytest
import torch

import fastattn

WITHOUT = {
    "ScoreTerm": "docs/terms.md derives from it",
    "MaskTerm": "likewise",
    "RelativeShift": "makes terms inside a model of relative positions",
    "OutOfPages": "an error",
    "ScorePositions": "what positions derive from",
    "shard_experts": "needs several processes",
    "gather_rows": "likewise",
    **dict.fromkeys(("Changed", "LeftAlone", "Replaced", "Report"), "made by patch alone"),
    **dict.fromkeys(("Finder", "Wanted", "make_twin", "plain_class"), "for integrations"),
    "Generated": "made by generate alone",
    "Step": "made by stream alone",
}
"""Names whose docstrings have none, and why."""

MODULES = ("fastattn", "fastattn.nn", "fastattn.functional", "fastattn.losses")
MODULES += ("fastattn.patching", "fastattn.generation")


def find_public() -> dict[str, Any]:
    """Functions and classes by their full names, each once."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        names = getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"])
        for name in names:
            value = getattr(module, name)
            if callable(value) and not inspect.ismodule(value):
                found.setdefault(id(value), (f"{module.__name__}.{name}", value))
    return dict(found.values())


PUBLIC = find_public()


def examples_of(name: str) -> list[doctest.Example]:
    """The lines of a docstring that are to be run."""
    return doctest.DocTestParser().get_examples(inspect.getdoc(PUBLIC[name]) or "")


def test_every_public_name_has_an_example_or_a_reason():
    assert len(PUBLIC) > 100
    without = {name.rpartition(".")[2] for name in PUBLIC if not examples_of(name)}
    assert without == WITHOUT.keys()


@pytest.mark.parametrize("name", [name for name in PUBLIC if examples_of(name)])
def test_the_example_runs(name, capsys):
    names = {"fastattn": fastattn, "torch": torch}
    text = inspect.getdoc(PUBLIC[name]) or ""
    example = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    failed = doctest.DocTestRunner().run(example).failed
    assert failed == 0, capsys.readouterr().out
