"""Layers of the kernel that `python -m fastattn hub` writes, for Hugging Face's `kernels`.

`kernelize` gives a norm of another library the `forward` of one of these, which reads the weight
and the eps of the norm that it was given to. Which one fits a model is its reader's to say: classes
named RMSNorm round in three places.
"""

from typing import Any

import torch
import torch.nn as nn

from .. import ops


def _eps_of(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


class LlamaRMSNorm(nn.Module):
    """RMSNorm that rounds before it multiplies by its weight, as in Llama, Mistral and Qwen."""

    can_torch_compile: bool = True
    has_backward: bool = True
    weight: torch.Tensor

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Norm rows of `hidden_states` (..., N); the wider dtype of it and the weight."""
        dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        return ops.rms_norm(
            hidden_states, self.weight, _eps_of(self), casting="llama", out_dtype=dtype
        )


class GptOssRMSNorm(nn.Module):
    """RMSNorm that rounds once, at the end, as in gpt-oss."""

    can_torch_compile: bool = True
    has_backward: bool = True
    weight: torch.Tensor

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Norm rows of `hidden_states` (..., N), and keep its dtype."""
        return ops.rms_norm(hidden_states, self.weight, _eps_of(self))


class GemmaRMSNorm(nn.Module):
    """RMSNorm whose weight is around zero, and which rounds at the end, as in Gemma."""

    can_torch_compile: bool = True
    has_backward: bool = True
    weight: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm rows of `x` (..., N), and keep its dtype."""
        return ops.rms_norm(x, self.weight, _eps_of(self), weight_offset=1.0)
