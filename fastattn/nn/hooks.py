"""Who listens when a module is called.

Where kernels do the work of several modules those are not called, so whoever listens to one of
them is asked for first: then it is called as torch's would be.
"""

import torch.nn as nn
from torch.nn.modules.module import _has_any_global_hook


def has_own_hooks(module: nn.Module) -> bool:
    """Whether hooks of its own run when `module` is called, or when its gradients are."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_hooks(module: nn.Module) -> bool:
    """The same, or hooks for every module, as register_module_forward_hook adds them."""
    return has_own_hooks(module) or bool(_has_any_global_hook())
