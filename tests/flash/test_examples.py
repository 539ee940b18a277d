"""Examples in the docstrings of flash-attn's functions run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

from fastattn.integrations import flash_attn

MODULES = [
    module.name for module in pkgutil.walk_packages(flash_attn.__path__, flash_attn.__name__ + ".")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name))]
    assert sum(bool(test.examples) for test in found) >= 6
