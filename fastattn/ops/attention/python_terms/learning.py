"""Captured tensors that a function reads and that learn: where it reads them, and how they lie.

A tensor's gradient is summed by kernels that know three kinds: a number for each head, a table for
each head, of which a score asks for one entry, and a number for each score. Which one a tensor is
follows from its indices: those that are b, h, q_idx or kv_idx themselves, and all others, which
make up the entry of a table.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..terms import Sizes

MOST_ENTRIES = 1024
"""The largest table that a program of the kernels sums for a head."""

LEADING = ("b", "h")

OF_SCORES = ("q_idx", "kv_idx")


class Read(NamedTuple):
    """Where a function reads a number of a tensor that learns."""

    tensor: torch.Tensor
    indices: tuple[Any, ...]
    """Of each dimension: a scalar, or an integer."""
    value: torch.Tensor


class Layout(NamedTuple):
    """A tensor that learns, and which input of the function indexes each dimension."""

    tensor: torch.Tensor
    roles: tuple[str | None, ...]
    """None for what is computed, or has been there already."""

    @property
    def per_score(self) -> bool:
        """Whether it has a number for each score."""
        return None not in self.roles and any(role in OF_SCORES for role in self.roles)

    @property
    def entries(self) -> list[int]:
        """The dimensions of the tables."""
        if self.per_score:
            return []
        return [dim for dim, role in enumerate(self.roles) if role not in LEADING]

    @property
    def order(self) -> list[int]:
        """The dimensions as the kernels have them: batch, heads, and then queries and keys."""
        leading = [self.roles.index(role) for role in LEADING if role in self.roles]
        scores = [self.roles.index(role) for role in OF_SCORES if role in self.roles]
        return [*leading, *(scores if self.per_score else self.entries)]

    def check(self) -> None:
        """Raise an error where it is a table that is too large."""
        count = math.prod(self.tensor.shape[dim] for dim in self.entries)
        if count > MOST_ENTRIES:
            raise ValueError(
                f"it captures a tensor {tuple(self.tensor.shape)} that requires a gradient, of "
                f"which each head has a table of {count} entries: kernels sum {MOST_ENTRIES} at "
                "most, or a tensor that is indexed by q_idx and kv_idx themselves"
            )

    def arrange(self, sizes: Sizes) -> torch.Tensor:
        """The tensor as the kernels have its gradient, for a call of these sizes."""
        x = self.tensor
        full: dict[str, int] = dict(zip((*LEADING, *OF_SCORES), sizes, strict=True))
        for dim, role in enumerate(self.roles):
            if dim not in self.entries:
                x = x.narrow(dim, 0, full[str(role)])
        x = x.permute(self.order)
        shape = [full[role] if role in self.roles else 1 for role in LEADING]
        if self.per_score:
            shape += [full[role] if role in self.roles else 1 for role in OF_SCORES]
        elif self.entries:
            shape.append(-1)
        return x.reshape(shape)

    def restore(self, arranged: torch.Tensor) -> torch.Tensor:
        """The tensor of another that is arranged so, without what its call does not reach."""
        shape = list(self.tensor.shape)
        places: dict[str, int] = dict(zip((*LEADING, *OF_SCORES), range(4), strict=True))
        for dim, role in enumerate(self.roles):
            if dim not in self.entries:
                shape[dim] = arranged.shape[places[str(role)]]
        x = arranged.reshape([shape[dim] for dim in self.order])
        return x.permute([self.order.index(dim) for dim in range(len(shape))])


def find_layouts(reads: Sequence[Read], inputs: dict[str, torch.Tensor]) -> list[Layout]:
    """How the tensors lie that learn, in the order in which they are first read."""
    layouts: dict[int, Layout] = {}
    for read in reads:
        roles: list[str | None] = []
        for index in read.indices:
            named = [name for name, scalar in inputs.items() if index is scalar]
            roles += [name if name not in roles else None for name in named] or [None]
        layout = Layout(read.tensor, tuple(roles))
        known = layouts.setdefault(id(read.tensor), layout)
        if known.roles != layout.roles:
            raise ValueError(
                "it captures a tensor that requires a gradient and indexes it in two ways, once "
                f"by {_shown(known)} and once by {_shown(layout)}"
            )
        layout.check()
    return list(layouts.values())


def _shown(layout: Layout) -> str:
    return f"[{', '.join(role or 'another' for role in layout.roles)}]"


def entry_of(read: Read, layout: Layout) -> torch.Tensor:
    """Which entry of its table a read is of."""
    entry = torch.zeros((), dtype=torch.int64)
    for dim in layout.entries:
        index, size = read.indices[dim], layout.tensor.shape[dim]
        if isinstance(index, int):
            index = index % size
        else:
            index = torch.where(index < 0, index + size, index)
        entry = entry * size + index
    return entry
