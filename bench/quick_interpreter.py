"""Triton's interpreter without what takes four fifths of its time and has no effect."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastattn.ops.backends import INTERPRETED


def quicken_interpreter() -> None:
    """Spare the interpreter repeated work, where it is on.

    At every call of a device function it prepares the language again as that function's module sees
    it, and at every sum and product of integers it computes whether they overflow, to assert it in
    debug mode alone.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    prepared = set()

    def call(self: Any, *args: Any, **arguments: Any) -> Any:
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **arguments)

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
