"""The gated activation of flash_attn.ops.activations."""

import torch

from ....ops import swiglu as _swiglu


def swiglu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """silu(x) * y, rounded once.

    Args:
        x: any shape, float16, bfloat16, float32 or float64.
        y: shaped like x, of its dtype.

    Returns:
        A tensor shaped like x and of its dtype, differentiable in both.

    Raises:
        TypeError, ValueError: as in `fastattn.swiglu`.

    Source: flash_attn/ops/activations.py of flash-attn 2.8; Shazeer, "GLU Variants Improve
    Transformer" (2020).

    Example:
        >>> swiglu(torch.zeros(2), torch.ones(2)).tolist()
        [0.0, 0.0]
    """
    return _swiglu(x, y)
