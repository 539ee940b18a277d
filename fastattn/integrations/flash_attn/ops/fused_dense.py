"""The linear layer of flash_attn.ops.fused_dense."""

from typing import Any

import torch

from ....nn import Linear
from ....ops import linear
from ..arguments import refuse


def fused_dense_func(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    return_residual: bool = False,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Any:
    """x weight^T + bias, and x itself if it is asked for.

    Args:
        x: (..., C), float16, bfloat16, float32 or float64.
        weight: (F, C).
        bias: (F,), or None.
        return_residual: return x as well.
        process_group: must be None: columns over several processes are not supported.
        sequence_parallel: means nothing without a process_group.

    Returns:
        (..., F); with return_residual (that, x).

    Raises:
        TypeError, ValueError: as in `fastattn.linear`.
        NotImplementedError: there is a process_group.

    Source: flash_attn/ops/fused_dense.py of flash-attn 2.8.

    Example:
        >>> fused_dense_func(torch.ones(1, 2), torch.ones(3, 2)).tolist()
        [[2.0, 2.0, 2.0]]
    """
    refuse("fused_dense_func", process_group=process_group)
    y = linear(x, weight, bias)
    return (y, x) if return_residual else y


class FusedDense(Linear):
    """A linear layer with flash-attn's arguments.

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        return_residual: return the input as well.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `fused_dense_func`, when called.

    Source: as `fused_dense_func`.

    Example:
        >>> FusedDense(2, 3)(torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: torch.Tensor, process_group: Any = None) -> Any:
        """(..., in_features) to (..., out_features), and x as well with return_residual."""
        refuse("FusedDense", process_group=process_group)
        y = super().forward(x)
        return (y, x) if self.return_residual else y
