"""Dropout as a module."""

import torch
import torch.nn as nn

from .. import functional
from .tracing import one_node


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` on fastattn's kernels: same arguments, no mask in memory.

    Example:
        >>> fastattn.nn.Dropout(0.5).eval()(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    @one_node
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Zero elements with probability p while training; the identity otherwise."""
        if not self.training:
            return input
        return functional.dropout(input, self.p, True, self.inplace)
