"""What products are computed in: autocast's dtype, and torch's setting for float32."""

import contextlib
from typing import Any

import torch

from ...kernels.private import allows_tf32


def product_precision(dtype: torch.dtype) -> str:
    """How operands of a dtype are multiplied: "ieee", or "tf32" where the user allowed it.

    The setting is torch's own: `torch.set_float32_matmul_precision("high")` or "medium" allow it.
    """
    if dtype is torch.float32 and allows_tf32():
        return "tf32"
    return "ieee"


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where autocast is on, as torch casts for a product.

    Float64 and integer tensors stay as they are, and so does what is None, but for the first.
    """
    # A device's type is a string, which takes longer to make than the question itself.
    device = "cuda" if tensors[0].is_cuda else tensors[0].device.type
    if not is_autocast_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
        else tensor
        for tensor in tensors
    )


def is_autocast_on(device_type: str) -> bool:
    """Whether autocast casts on such devices; meta tensors have none, and PyTorch's error."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def cast_to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)` for what a Function's forward returns.

    A cast that changes nothing is the same tensor again: torch.compile of PyTorch 2.11 takes it for
    a second output, and the gradient goes to the other one.
    """
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def disable_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """For what computes in float32 what autocast would compute as a product."""
    if not is_autocast_on(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
