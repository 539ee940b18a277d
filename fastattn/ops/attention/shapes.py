"""Shapes and strides of what broadcasts to the scores of a call, (B, H, M, N)."""

from __future__ import annotations

import torch

Sizes = tuple[int, int, int, int]
"""Of a call: batch elements, query heads, queries and keys."""


def insert_dimension(x: torch.Tensor, dim: int, *, at: int) -> torch.Tensor:
    """`x` of `dim` dimensions with one of size 1 more. What else was given is left to `check`."""
    return x.unsqueeze(at) if is_dense(x) and x.dim() == dim else x


def expand_dimensions(x: torch.Tensor) -> torch.Tensor:
    """`x` with leading dimensions of size 1. What is no tensor is left to `check`."""
    return x[(None,) * (4 - x.dim())] if is_dense(x) and x.dim() < 4 else x


def is_dense(x: object) -> bool:
    """Whether it is a tensor of one shape; what is not has nothing done to it before `check`."""
    return isinstance(x, torch.Tensor) and not x.is_nested


def check_broadcast(op: str, name: str, x: torch.Tensor, sizes: Sizes) -> None:
    """A tensor that broadcasts to (B, H, M, N)."""
    if x.dim() == 4 and all(size in (1, full) for size, full in zip(x.shape, sizes, strict=True)):
        return
    shape = list(x.shape)
    while len(shape) in (2, 3, 4) and shape[0] == 1:
        del shape[0]
    raise ValueError(f"{op}: {name} must broadcast to {sizes}, got {tuple(shape)}")


def broadcast_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides, 0 along dimensions of size 1."""
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def layout_name(name: str, tensor: torch.Tensor) -> str:
    """The name of the functions that read a tensor (B, H, M, N)."""
    strides = broadcast_strides(tensor)
    # Offsets within a tile, of at most 128 queries and keys, may need 64 bits.
    if max(strides[2:]) >= 2**23:
        return f"far {name}"
    *others, last = strides
    aligned = last == 1 and all(map(_is_multiple_of_16, (*others, tensor.shape[3])))
    return f"{name} of rows" if aligned else name


def _is_multiple_of_16(number: int) -> bool:
    if not torch.compiler.is_exporting():
        return number % 16 == 0
    # What is exported is for all lengths, also for those that it was not traced with.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(number % 16 == 0)
