"""Softmax and LogSoftmax as modules."""

import torch
import torch.nn as nn

from .. import functional


class Softmax(nn.Softmax):
    """`torch.nn.Softmax` on fastattn's kernels: same arguments.

    Example:
        >>> fastattn.nn.Softmax(-1)(torch.zeros(1, 2)).tolist()
        [[0.5, 0.5]]
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize the exponentials of `input` along dimension `dim`."""
        return functional.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(nn.LogSoftmax):
    """`torch.nn.LogSoftmax` on fastattn's kernels: same arguments.

    Example:
        >>> fastattn.nn.LogSoftmax(-1)(torch.zeros(1, 2)).exp().tolist()
        [[0.5, 0.5]]
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The logarithm of what `Softmax` gives."""
        return functional.log_softmax(input, self.dim, _stacklevel=5)
