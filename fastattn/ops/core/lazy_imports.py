"""Functions of modules that are imported when one of them is first called.

Importing fastattn needs no Triton, so an op names the launchers of its kernels like this:

    if TYPE_CHECKING:
        from ..kernels import dropout as kernels
    else:
        kernels = lazy_module("fastattn.kernels.dropout")

A type checker and an editor follow the first branch to the kernels' file; the second one runs.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

PACKAGE = __name__.removesuffix(".ops.core.lazy_imports")
"""What the package was loaded as: `fastattn`, or where it was copied, another name."""


def own_name(name: str) -> str:
    """The name of a module of ours, `fastattn.` and so on, within the package as it was loaded."""
    return PACKAGE + name.removeprefix("fastattn")


class LazyFunction:
    """A function of a module, both of which are looked for when it is first called."""

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.found(*args, **kwargs)

    @functools.cached_property
    def found(self) -> Callable[..., Any]:
        """The function itself."""
        return getattr(importlib.import_module(self.module), self.name)


class lazy_module:
    """The module of this absolute name, whose attributes are all lazy functions.

    `fastattn` stands for the package, whatever name it was loaded under.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = own_name(name)

    def __getattr__(self, name: str) -> LazyFunction:
        return LazyFunction(self.__name__, name)


def find(function: Callable[..., Any]) -> Callable[..., Any]:
    """A lazy function itself, any other function as it is."""
    return function.found if isinstance(function, LazyFunction) else function
