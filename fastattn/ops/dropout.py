"""Dropout with a seed that can be replayed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import reference
from .core.apply import call
from .core.arguments import check_float_tensor, check_probability, check_seed
from .core.backends import use_triton
from .core.catalog import Sample, make_seed, operation
from .core.lazy_imports import lazy_module
from .core.random import draw_seed
from .core.registration import kernel_op
from .core.sharding import is_distributed, replicate

if TYPE_CHECKING:
    from ..kernels import dropout as kernels
else:
    kernels = lazy_module("fastattn.kernels.dropout")


@kernel_op(kernels.dropout_forward)
def dropout_forward(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """y, see dropout_forward in kernels/dropout.py."""
    return x.new_empty(x.shape)


@kernel_op(kernels.dropout_mask_forward)
def dropout_mask_forward(seed: torch.Tensor, shape: list[int], p: float) -> torch.Tensor:
    """What is kept, see dropout_mask_forward in kernels/dropout.py."""
    return seed.new_empty(shape, dtype=torch.bool)


class DropoutFunction(torch.autograd.Function):
    """dropout_forward, which is linear in x: its backward is the same launch on dy."""

    @staticmethod
    def forward(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
        return dropout_forward(x, seed, p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        _, seed, ctx.p = inputs
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        (seed,) = ctx.saved_tensors
        return call(DropoutFunction, dy, seed, ctx.p), None, None


@operation(
    reference=reference.dropout,
    samples=(
        Sample("smallest", x=(2, 5), p=0.4, seed=make_seed(6)),
        Sample("several rows a tile", x=(3, 7, 64), p=0.5, seed=make_seed(1)),
        Sample("odd width", x=(37, 131), p=0.1, seed=make_seed(2)),
        Sample("several tiles a row", x=(3, 5000), p=0.9, seed=make_seed(2**61)),
        Sample("one dimension", x=(33,), p=0.3, seed=make_seed(3)),
        Sample("one element a row", x=(70, 1), p=0.3, seed=make_seed(4)),
        Sample("no rows", x=(0, 16), p=0.3, seed=make_seed(5)),
    ),
)
def dropout(x: torch.Tensor, p: float = 0.5, *, seed: torch.Tensor | None = None) -> torch.Tensor:
    """Zero elements of x with probability p and scale the others by 1 / (1 - p).

    Which elements are kept is a function of the seed and of an element's row and column alone: the
    backward needs no stored mask, and every backend and device keeps the same ones.

    Args:
        x: any shape, float16, bfloat16, float32 or float64. A DTensor may be sharded in any way:
            each rank writes out the mask of the whole tensor and takes its part.
        p: the probability of a zero, in [0, 1).
        seed: int64, one element, on x's device; None draws one from PyTorch's generator there.

    Returns:
        A tensor shaped like x and of its dtype. Differentiable in x, any number of times.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Source: Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout" (2014).

    Example:
        >>> y = fastattn.dropout(torch.ones(1000), 0.5)
        >>> sorted(set(y.tolist()))
        [0.0, 2.0]
    """
    check_float_tensor("dropout", "x", x)
    check_probability("dropout", "p", p)
    if seed is None:
        seed = draw_seed(x)
    else:
        check_seed("dropout", seed, like=x)
    if p == 0.0:
        return x.clone()
    if is_distributed(x):
        # A shard does not know its place in the whole tensor, which decides what is kept.
        keep = replicate(dropout_mask(seed, x.shape, p), like=x)
        return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0)
    if not use_triton(x):
        return reference.dropout(x, p, seed=seed)
    if x.dim() == 0:
        return call(DropoutFunction, x[None], seed, p)[0]
    return call(DropoutFunction, x, seed, p)


def dropout_mask(seed: torch.Tensor, shape: Sequence[int], p: float) -> torch.Tensor:
    """The elements that dropout with this seed keeps in a tensor of `shape`: booleans.

    Args:
        seed: int64, one element.
        shape: the shape of the tensor that dropout would be applied to.
        p: the probability of a zero, in [0, 1).

    Returns:
        Booleans of `shape` on the seed's device, True where an element is kept.

    Example:
        >>> seed = torch.tensor(7)
        >>> fastattn.dropout_mask(seed, (2, 3), 0.5).shape
        torch.Size([2, 3])
    """
    check_seed("dropout_mask", seed, like=seed)
    check_probability("dropout_mask", "p", p)
    if not len(shape) or not use_triton(seed):
        return reference.dropout_mask(seed, shape, p)
    return dropout_mask_forward(seed, list(shape), p)
