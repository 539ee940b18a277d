"""Transformer building blocks as Triton kernels with exact, hand-written gradients."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if os.path.isfile(os.path.join(os.path.dirname(__file__), "kernels")):
    raise ImportError(
        "fastattn/kernels is a text file where the repository has a symbolic link to ../kernels: "
        "check out again with `git config core.symlinks true`, or install fastattn with pip"
    )

import torch.fx

from . import functional as functional
from . import losses as losses
from . import nn as nn
from . import patching as patching
from ._version import __version__ as __version__
from .functional import replace_sdpa as replace_sdpa
from .ops import public as _public
from .ops.core.catalog import OPERATIONS as _OPERATIONS
from .ops.public import *  # noqa: F403
from .patching import patch as patch
from .patching import unpatch as unpatch

if TYPE_CHECKING:
    AutoModelForCausalLM: Any

# As `__all__` itself type checkers would take it for an empty list, and every name for private.
globals()["__all__"] = [
    "__version__",
    "functional",
    "losses",
    "nn",
    "patch",
    "patching",
    "replace_sdpa",
    "unpatch",
    *(name for name in vars(_public) if not name.startswith("_")),
]

# What stands above this module is imported when it is first asked for, and is not in `__all__`: a
# name, and the module of that name or with it.
_LATER = {
    "AutoModelForCausalLM": f"{__name__}.integrations.transformers",
    "generate": f"{__name__}.generation",
    "generation": f"{__name__}.generation",
    "models": f"{__name__}.models",
    "stream": f"{__name__}.generation",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_LATER[name])
    return module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)


# For torch.fx a call of an op is one node, as a call of torch's own functions is.
for _name in _OPERATIONS:
    torch.fx.wrap(_name)
