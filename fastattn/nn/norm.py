"""LayerNorm and RMSNorm as modules."""

import torch
import torch.nn as nn

from .. import functional


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` on fastattn's kernels: same arguments, parameters and state_dict."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize the last `len(normalized_shape)` dimensions of `input`; its dtype is kept."""
        shape = self.normalized_shape
        return functional.layer_norm(input, shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` on fastattn's kernels: same arguments, parameters and state_dict."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the last `len(normalized_shape)` dimensions of `x`; its dtype is kept."""
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
