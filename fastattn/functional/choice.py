"""Who computes: torch's own function, or fastattn's op."""

from typing import Any

import torch

from ..ops.core.backends import use_triton
from ..ops.core.tensor_kinds import is_foreign


def is_for_torch(
    input: Any, second: torch.Tensor | None = None, third: torch.Tensor | None = None
) -> bool:
    """Whether torch's own function runs.

    It does where no kernels do and it takes these dtypes everywhere, and where kernels cannot read
    what is given, as nested tensors: see `is_foreign`.
    """
    if isinstance(input, torch.Tensor) and not use_triton(input):
        return (second is None or second.dtype is input.dtype) and (
            third is None or third.dtype is input.dtype
        )
    return any_is_foreign(input, second, third)


def any_is_foreign(*tensors: Any) -> bool:
    """Whether one is a tensor that only torch's own functions can be called on."""
    return any(map(is_foreign, tensors))
