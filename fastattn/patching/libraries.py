"""Libraries whose models are patched by more than the table of rules.

`fastattn.integrations` has a module for each, which imports it; patching imports none of them. It
knows where to look when a model has a class of such a library, and loads the module by its name, as
an entry point is loaded.
"""

import importlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch.nn as nn

from .report import Changed, LeftAlone
from .rules import Finder, Wanted

MODULES: Mapping[str, str] = {
    "timm": "integrations.timm",
    "transformers": "integrations.transformers.patching",
}
"""The module of ours for each library that classes of models come from."""


class Library(Protocol):
    """What such a module offers."""

    def make_finders(self, model: nn.Module, wanted: Wanted) -> Sequence[Finder]:
        """Those for modules of the library, asked in this order before the table of rules."""
        ...

    def change_settings(self, model: nn.Module, wanted: Wanted) -> Sequence[Changed | LeftAlone]:
        """Change what is no module's class, and say what has been changed and what not."""
        ...

    def restore_settings(self, model: nn.Module) -> None:
        """Undo that, exactly; nothing where nothing was changed."""
        ...


def find_libraries(modules: Iterable[nn.Module]) -> list[Library]:
    """The modules of ours for the libraries that modules of a model come from."""
    packages = {
        base.__module__.partition(".")[0] for module in modules for base in type(module).__mro__
    }
    return [found for name in MODULES if name in packages and (found := _load(name)) is not None]


def _load(name: str) -> Library | None:
    root = __name__.partition(".")[0]
    try:
        return importlib.import_module(f"{root}.{MODULES[name]}")  # type: ignore[return-value]
    except ImportError as error:
        warnings.warn(
            f"patch: this version of {name} is not known, so that its own classes are left alone: "
            f"{error}",
            stacklevel=3,
        )
        return None
