"""The quick interpreter, under which all tests of kernels run, does what Triton's own does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fastattn.ops.core.backends import INTERPRETED

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETED, reason="is about Triton's interpreter"),
]


class Held:
    """A class of the language, as Triton 3.8 has one, which is called like a function of it."""

    def __init__(self, value: int, _semantic: Any = None) -> None:
        self.value = value
        self.semantic = _semantic


def test_functions_and_classes_of_the_language_get_the_interpreter():
    import triton.language as tl
    from triton.runtime import interpreter

    @tl.core.builtin
    def held(value: int, _semantic: Any = None) -> Held:
        return Held(value, _semantic)

    target = SimpleNamespace()
    scope = SimpleNamespace(set_attr=setattr)
    for name, member in (("function", held), ("kind", Held)):
        interpreter._patch_attr(target, name, member, None, scope)
    for patched in (target.function, target.kind):
        found = patched(5)
        assert found.value == 5
        assert found.semantic is interpreter.interpreter_semantic
