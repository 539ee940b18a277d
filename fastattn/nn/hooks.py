"""Who listens when a module is called.

Where kernels do the work of several modules those are not called, so whoever listens to one of
them is asked for first: then it is called as torch's would be.
"""

import torch.nn as nn

from ..kernels.private import has_any_global_hook, has_own_hooks

__all__ = ["has_hooks", "has_own_hooks"]


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run when a module is called, or when its gradients are computed.

    Its own, or those for every module, as register_module_forward_hook adds them.
    """
    return has_own_hooks(module) or bool(has_any_global_hook())
