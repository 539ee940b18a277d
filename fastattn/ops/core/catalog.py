"""The catalogue of ops: each one beside its reference, with samples that cover its regimes.

`python -m fastattn check` and the shared tests walk it, so that an op is checked by being defined.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch

OpFunction = TypeVar("OpFunction", bound=Callable[..., Any])


@dataclass(frozen=True)
class Normal:
    """A tensor argument of normally distributed numbers.

    Args:
        shape: its shape.
        dtype: its dtype where that differs from the tested one.
        scale: its standard deviation.
        mean: its mean.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    scale: float = 1.0
    mean: float = 0.0


class Sample:
    """Arguments of an op that stand for one regime.

    Among the arguments a tuple is the shape of a `Normal` tensor, and a function is called with the
    device to make a tensor that has no gradient. All others are passed as they are.

    Example:
        Sample("odd width", x=(3, 130), weight=(130,), eps=1e-6)
    """

    def __init__(self, name: str, /, **arguments: Any) -> None:
        self.name = name
        self.arguments = {
            key: Normal(value) if isinstance(value, tuple) else value
            for key, value in arguments.items()
        }

    def __repr__(self) -> str:
        return f"Sample({self.name!r})"

    def make(self, dtype: torch.dtype, device: str | torch.device, seed: int = 0) -> dict[str, Any]:
        """The arguments with tensors in place: the same numbers for the same seed on any device."""
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, Any] = {}
        for name, value in self.arguments.items():
            if isinstance(value, Normal):
                tensor = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                tensor = tensor * value.scale + value.mean
                kept = _mix(value.dtype or dtype, dtype)
                made[name] = tensor.to(device=device, dtype=kept).requires_grad_()
            elif isinstance(value, torch.dtype):
                made[name] = _mix(value, dtype)
            elif isinstance(value, Callable):
                made[name] = value(device)
            else:
                made[name] = value
        return made


def _mix(asked: torch.dtype, tested: torch.dtype) -> torch.dtype:
    """float64 mixes with no other dtype, so where it is tested it displaces the one asked for."""
    return tested if tested is torch.float64 else asked


@dataclass(frozen=True)
class Operation:
    """A public op, the reference that defines it, and its samples.

    The first sample is the smallest that is not degenerate, which every numerical derivative can
    afford; the second the most ordinary one.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: tuple[Sample, ...]
    own_gradients: bool = True
    """Whether kernels compute its gradients; else PyTorch does, and a compiler may fuse that."""
    dtypes: tuple[torch.dtype, ...] = field(
        default=(torch.float32, torch.float16, torch.bfloat16, torch.float64)
    )


_operations: dict[str, Operation] = {}

OPERATIONS: Mapping[str, Operation] = MappingProxyType(_operations)
"""Every op by its name, in the order of definition."""


def operation(
    reference: Callable[..., Any], samples: tuple[Sample, ...], own_gradients: bool = True
) -> Callable[[OpFunction], OpFunction]:
    """Enter the decorated op into the catalogue; it is returned unchanged."""

    def decorate(function: OpFunction) -> OpFunction:
        name = function.__name__
        _operations[name] = Operation(name, function, reference, samples, own_gradients)
        return function

    return decorate


def make_seed(value: int) -> Callable[[str | torch.device], torch.Tensor]:
    """For samples: a dropout seed."""
    return lambda device: torch.tensor([value], dtype=torch.int64, device=device)
