"""What is said about an op so that its compiled code and its cost on the host can be checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.ops.catalog import Sample

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One public op.

    Attributes:
        name: The op's name, unique in the list.
        call: The public function; everything that it returns with a gradient is differentiated.
        arguments: Its keyword arguments at a shape, as `Sample` takes them: a tuple stands for a
            tensor of that shape which needs a gradient.
        shapes: The shapes to compile at.
        quick_shapes: Those of them that the tests compile.
        small: A shape so small that the host's cost is all there is.
        dtypes: The dtypes to compile at.
        torch: The same in PyTorch, called with the same arguments.
    """

    name: str
    call: Callable[..., Any]
    arguments: Callable[..., dict[str, Any]]
    shapes: Sequence[Shape]
    quick_shapes: Sequence[Shape]
    small: Shape
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
    torch: Callable[..., Any] | None = None

    def sample(self, shape: Shape) -> Sample:
        """The arguments at a shape."""
        return Sample("x".join(map(str, shape)), **self.arguments(*shape))
