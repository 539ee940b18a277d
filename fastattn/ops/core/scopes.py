"""Choices that hold inside a `with` block or a decorated function, in the thread that made them."""

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Entered = TypeVar("Entered", bound="Scope")


class Scope:
    """Gives one attribute of a thread's choices a value; leaving restores what it was.

    Args:
        choices: where the attribute is.
        name: the attribute.
        value: what it is inside.
    """

    def __init__(self, choices: threading.local, name: str, value: Any) -> None:
        self._choices = choices
        self._name = name
        self._value = value
        self._outer: list[Any] = []

    def __call__(self, function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        choices, name, value = self._choices, self._name, self._value

        @functools.wraps(function)
        def inside(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            # One of its own for each call, which may come from several threads at once.
            with Scope(choices, name, value):
                return function(*args, **kwargs)

        return inside

    def __enter__(self: Entered) -> Entered:
        self._outer.append(getattr(self._choices, self._name))
        setattr(self._choices, self._name, self._value)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self._choices, self._name, self._outer.pop())
