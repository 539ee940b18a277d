"""The launchers of grouped products, which grouped_linear and mixture share.

DTensor has no rule for them: which rows an expert has, no shard knows. Public functions refuse it.
"""

from typing import TYPE_CHECKING

import torch

from .lazy_imports import lazy_module
from .registration import kernel_op

if TYPE_CHECKING:
    from ...kernels.experts import grouped_gradients as gradient_kernels
    from ...kernels.experts import grouped_linear as kernels
else:
    gradient_kernels = lazy_module("fastattn.kernels.experts.grouped_gradients")
    kernels = lazy_module("fastattn.kernels.experts.grouped_linear")


def count_rows(x: torch.Tensor, index: torch.Tensor | None) -> int:
    """The rows of a product: those that an index names, or all of x."""
    return x.shape[0] if index is None else index.shape[0]


@kernel_op(
    kernels.grouped_linear_forward,
    flops=lambda x, weight, offsets, bias, index, *_: (
        2 * count_rows(x, index) * weight.shape[1] * weight.shape[2]
    ),
)
def grouped_linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    index: torch.Tensor | None,
    fill: int,
    tf32: int,
    batch_invariant: bool,
) -> torch.Tensor:
    """y, see grouped_linear_forward in kernels/experts/grouped_linear.py."""
    return x.new_empty((count_rows(x, index), weight.shape[1]))


@kernel_op(
    gradient_kernels.grouped_weight_gradient,
    flops=lambda dy, x, offsets, dy_index, *_: (
        2 * count_rows(dy, dy_index) * dy.shape[1] * x.shape[1]
    ),
)
def grouped_weight_gradient(
    dy: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    dy_index: torch.Tensor | None,
    x_index: torch.Tensor | None,
    tf32: int,
) -> torch.Tensor:
    """dW, see grouped_weight_gradient in kernels/experts/grouped_gradients.py."""
    return x.new_empty((offsets.shape[0] - 1, dy.shape[1], x.shape[1]))


@kernel_op(gradient_kernels.grouped_bias_gradient)
def grouped_bias_gradient(
    dy: torch.Tensor,
    offsets: torch.Tensor,
    index: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_index: torch.Tensor | None,
) -> torch.Tensor:
    """db, see grouped_bias_gradient in kernels/experts/grouped_gradients.py."""
    return dy.new_empty((offsets.shape[0] - 1, dy.shape[1]))
