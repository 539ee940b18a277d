"""Masks of caches: a tree of new tokens, and keys that begin later than the cache."""

from collections.abc import Sequence
from typing import Any

import torch

from .attention.terms import Index, MaskTerm, Sizes
from .core.arguments import check_constant, check_integers, check_shape


class TreeMask(MaskTerm):
    """Which of the new tokens, a sequence's last, see which of each other; all see those before.

    Args:
        mask: booleans (M, M) or (B or 1, M, M), True where a query sees a key.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self.tensors = (mask,)

    @classmethod
    def triton_functions(cls) -> Any:
        from ..kernels.decode.masks import TREE

        return TREE

    @property
    def integers(self) -> Sequence[int]:  # type: ignore[override]
        (mask,) = self.tensors
        return (mask.shape[-1] ** 2 if mask.shape[0] > 1 else 0,)

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        (mask,) = self.tensors
        check_constant(op, name, mask, q)
        if mask.dtype is not torch.bool:
            raise TypeError(f"{op}: {name} must be boolean, True where attended, got {mask.dtype}")
        batch, _, queries, _ = sizes
        if mask.shape not in ((queries, queries), *((b, queries, queries) for b in (1, batch))):
            raise ValueError(
                f"{op}: {name} must have shape ({batch} or 1, {queries}, {queries}), "
                f"got {tuple(mask.shape)}"
            )

    def prepared(self, sizes: Sizes) -> "TreeMask":
        """The mask as bytes (B or 1, 1, M, M)."""
        (mask,) = self.tensors
        queries = mask.shape[-1]
        return self.with_tensors(
            [mask.reshape(-1, 1, queries, queries).contiguous().view(torch.uint8)]
        )

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        (mask,) = self.tensors
        new = n - (keys - queries)
        inside = (new >= 0) & (new < queries)
        batch = torch.arange(len(mask), device=mask.device)[:, None, None, None]
        seen = mask[batch, 0, m, torch.where(inside, new, 0)] != 0
        return (new < 0) | (inside & seen)


class Starts(MaskTerm):
    """The first key of each sequence that counts, (B,) integers: before it there is padding."""

    def __init__(self, starts: torch.Tensor) -> None:
        self.tensors = (starts,)

    @classmethod
    def triton_functions(cls) -> Any:
        from ..kernels.decode.masks import START

        return START

    def check(self, op: str, name: str, q: torch.Tensor, sizes: Sizes) -> None:
        (starts,) = self.tensors
        check_constant(op, name, starts, q)
        check_integers(op, name, starts)
        check_shape(op, name, starts, q.shape[:1])

    def prepared(self, sizes: Sizes) -> "Starts":
        """The numbers as int32 (B, 1), which no key's number exceeds."""
        (starts,) = self.tensors
        return self.with_tensors([starts.clamp(0, 2**31 - 1).int()[:, None].contiguous()])

    def keep(self, m: Index, n: Index, queries: Index, keys: Index) -> torch.Tensor:
        (starts,) = self.tensors
        return n >= starts[:, :, None, None]
