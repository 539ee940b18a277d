"""A call of attention as its launchers take it, and what they prepare and allocate."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..config import Target, find_target
from ..launch import POINTER_ALIGNMENT, allocator, contiguous_strides
from .composition import Composition, compose
from .config import AttentionConfig

FENCELESS = 90
"""The architecture whose products, when compiled by Triton, may lack a fence, see `make_rows`."""

Rule = Callable[[int, int, torch.dtype, str, str, Target], AttentionConfig]


class Call(NamedTuple):
    """A call of attention: what its kernels are told of it, one and all."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    seed: torch.Tensor | None
    dropout_p: float
    scale: float
    precision: str
    """How float32 is multiplied."""
    terms: str
    """The terms' description, as `compose` takes it."""
    tensors: list[torch.Tensor]
    floats: list[float]
    integers: list[int]
    batch_invariant: bool
    """Whether all terms shall have the same tiles, and sums that hang on no tile's layout."""

    @property
    def folded(self) -> bool:
        """Whether scores wait for the scale, see `folds`."""
        return self.scale > 0.0 and folds(self.q.dtype, compose(self.terms))

    @property
    def batches(self) -> int:
        """How many batch elements or packed sequences there are."""
        cumulative = self.cu_seqlens_q
        return self.q.shape[0] if cumulative is None else cumulative.numel() - 1

    @property
    def longest_queries(self) -> int:
        """How many queries the grid is made for."""
        queries = self.q.shape[2]
        return queries if self.cu_seqlens_q is None else min(self.max_seqlen_q, queries)

    @property
    def longest_keys(self) -> int:
        """How many keys the grid is made for."""
        keys = self.k.shape[2]
        return keys if self.cu_seqlens_k is None else min(self.max_seqlen_k, keys)


class Gradient(NamedTuple):
    """What comes to a backward kernel besides its call."""

    do: torch.Tensor
    lse: torch.Tensor
    log_sums: torch.Tensor
    """lse as the kernels of all devices take it, infinite for queries without keys."""
    delta: torch.Tensor


def folds(dtype: torch.dtype, composition: Composition) -> bool:
    """Whether a positive scale may wait until a score is taken to base 2.

    That saves a multiplication, but asks for a scale that is positive, because the largest score
    is looked for before it, and for no terms, which take scores as they are. In float32 its one
    rounding more shows.
    """
    return dtype.itemsize == 2 and not composition.terms.scores


def statistics_dtype(q: torch.Tensor) -> torch.dtype:
    """The dtype of a query's lse."""
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def make_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where the columns of a row lie next to each other, else a copy.

    For sm_90 so too where it does not begin at a multiple of 16 bytes: in Triton's code a product
    may read what was copied to shared memory with no fence between, where the other tensor of the
    loop is not aligned and goes through registers.
    """
    if x.data_ptr() % POINTER_ALIGNMENT and find_target(x).arch == FENCELESS:
        return x.clone(memory_format=torch.contiguous_format)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def allocate_like(q: torch.Tensor, dim: int, cumulative: torch.Tensor | None) -> torch.Tensor:
    """A tensor (B, H, M, dim) to be filled, in memory (B, M, H, dim) where q lies so.

    Where sequences are packed it is zero, for there may be rows that belong to none.
    """
    batch, heads, length, _ = q.shape
    _, head_stride, row_stride, _ = q.stride()
    if heads > 1 and length > 1 and head_stride < row_stride:
        of_batch, of_row, of_head, unit = contiguous_strides((batch, length, heads, dim))
        strides = (of_batch, of_head, of_row, unit)
    else:
        strides = contiguous_strides((batch, heads, length, dim))
    made = allocator(q.device)((batch, heads, length, dim), strides, q.dtype)
    return made if cumulative is None else made.zero_()


def allocate_statistics(q: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor (B, H, M) to be filled with a number for each query."""
    batch, heads, queries, _ = q.shape
    shape = (batch, heads, queries)
    return allocator(q.device)(shape, contiguous_strides(shape), statistics_dtype(q))
