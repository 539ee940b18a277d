"""The ops: public functions, each a torch.autograd.Function around Triton's kernels."""

import torch.fx

from . import public
from .core.catalog import OPERATIONS
from .public import *  # noqa: F403

# As `__all__` itself type checkers would take it for an empty list, and every name for private.
globals()["__all__"] = [name for name in vars(public) if not name.startswith("_")]

# For torch.fx a call of an op is one node. It finds functions where they are called from.
for _name in OPERATIONS:
    torch.fx.wrap(_name)
