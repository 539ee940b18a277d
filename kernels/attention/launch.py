"""How attention's kernels are launched: what their launchers share on the host."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..config import Target, find_target
from ..launch import (
    POINTER_ALIGNMENT,
    allocator,
    common_divisor,
    contiguous_strides,
    dropout_scalars,
    launchable,
)
from ..structures import make_odd
from ..tuning import forgetters
from .composition import Composition, compose, join_arguments
from .config import NARROWEST, AttentionConfig, head_chunks
from .structures import Columns, Cut, Heads

WIDEST_STRIDE = 2**24
"""From here on the offsets within a tile, of 128 rows at most, need 64 bits."""

MOST_BOUND = 1024
"""Launches kept. Features are few; with more, something varies that should not count."""

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
    delta: torch.Tensor


class Features(NamedTuple):
    """All that a kernel's code depends on, besides the device."""

    key_dim: int
    value_dim: int
    heads: int
    group: int
    """The query heads that share a key head."""
    dtype: torch.dtype
    scale: float | None
    """The scale in float64, where a kernel needs it as a constexpr: as an argument it would be
    float32. Otherwise None."""
    positive: bool
    """Whether the scale is."""
    precision: str
    terms: str
    divisor: int
    """What divides all strides."""
    wide: bool
    """Whether some stride of rows reaches WIDEST_STRIDE."""
    has_sinks: bool
    has_dropout: bool
    entries: tuple[int, ...]
    """For each tensor that terms learn how many numbers it has for a head, 0 where its gradient is
    not wanted."""
    batch_invariant: bool


@functools.lru_cache(MOST_BOUND)
def bound_launch(
    kernel: launchable, rule: Rule, target: Target, given: tuple
) -> tuple[Callable[..., None], AttentionConfig]:
    """A kernel's launch bound to all that does not vary with lengths, and its configuration.

    `given` are Features, as a plain tuple, which takes less time to be made.
    """
    features = Features(*given)
    composition = compose(features.terms)
    config = _choose_config(rule, target, features, composition)
    folded = features.positive and _folds(features.dtype, composition)
    constants: dict[str, Any] = {
        "TERMS": composition.terms._replace(entries=features.entries),
        "HEADS": Heads(
            features.heads,
            features.group,
            Columns(features.key_dim, *head_chunks(features.key_dim)),
            Columns(features.value_dim, *head_chunks(features.value_dim)),
            features.scale,
            folded,
        ),
        "CUT": Cut(
            config.block_m,
            config.block_n,
            features.divisor,
            features.wide,
            features.precision,
            config.reloads,
            composition.terms.hides_first or config.one_loop,
            features.batch_invariant and features.dtype is not torch.float64,
        ),
    }
    if not composition.has_arguments:
        constants["terms_args"] = ()
    if not features.has_sinks:
        constants["sinks_ptr"] = None
    if not features.has_dropout:
        constants["dropout_view"] = None
    if not any(features.entries):
        constants["sums_args"] = ()
    launch = kernel.bind(
        config.num_warps,
        config.num_stages,
        **{name: value for name, value in constants.items() if name in kernel.parameters},
    )
    return launch, config


forgetters.append(bound_launch.cache_clear)


def _choose_config(
    rule: Rule, target: Target, features: Features, composition: Composition
) -> AttentionConfig:
    # Random numbers of a tile take as many registers as one that is loaded.
    as_tensor = features.has_dropout or features.batch_invariant
    config = rule(
        features.key_dim,
        features.value_dim,
        features.dtype,
        features.precision,
        "tensor" if as_tensor else composition.term_class,
        target,
    )
    most_queries, most_keys = composition.largest_tile
    if max(features.entries, default=0) > 1:
        # A table's gradient asks for each score's entry besides, and for its sums.
        share = 2 if features.key_dim <= 128 else 4
        most_queries = min(most_queries, max(NARROWEST, config.block_m // share))
    return dataclasses.replace(
        config,
        block_m=min(config.block_m, most_queries),
        block_n=min(config.block_n, most_keys),
    )


def prepare(
    kernel: launchable,
    rule: Rule,
    call: Call,
    others: dict[str, torch.Tensor],
    sinks: torch.Tensor | None = None,
    entries: tuple[int, ...] = (),
) -> tuple[Callable[..., None], dict[str, Any], AttentionConfig]:
    """The launch of a kernel, the arguments that all kernels have, and its configuration.

    `others` are the tensors (B, H, rows, columns) that it takes besides q, k and v.
    """
    q, k, v = call.q, call.k, call.v
    composition = compose(call.terms)
    strides: list[int] = []
    given: dict[str, Any] = {"scale": call.scale}
    # Views as plain tuples, which take a fraction of the time that named ones take to be made.
    for name, x in (("q_view", q), ("k_view", k), ("v_view", v), *others.items()):
        stride_b, stride_h, stride_row, _ = x.stride()
        strides += (stride_b, stride_h, stride_row)
        given[name] = (x, 2 * stride_b + 3, 2 * stride_h + 3, 2 * stride_row + 3)
    _, heads, queries, key_dim = q.shape
    _, key_heads, keys, value_dim = v.shape
    dtype, scale, seed = q.dtype, call.scale, call.seed
    features = (
        key_dim,
        value_dim,
        heads,
        heads // key_heads,
        dtype,
        scale if dtype is torch.float64 else None,
        scale > 0.0,
        call.precision,
        call.terms,
        common_divisor(*strides),
        # Only rows are within a tile.
        max(strides[2::3]) >= WIDEST_STRIDE,
        sinks is not None,
        seed is not None,
        entries,
        call.batch_invariant,
    )
    launch, config = bound_launch(kernel, rule, find_target(q), features)
    given["queries_view"] = (call.cu_seqlens_q, 2 * queries + 3)
    given["keys_view"] = (call.cu_seqlens_k, 2 * keys + 3)
    if composition.has_arguments:
        given["terms_args"] = join_arguments(call.tensors, call.floats, call.integers)
    if sinks is not None:
        given["sinks_ptr"] = sinks
    if seed is not None:
        threshold, _ = dropout_scalars(call.dropout_p)
        given["dropout_view"] = (seed, make_odd(threshold), make_odd(call.max_seqlen_q))
    return launch, given, config


def _folds(dtype: torch.dtype, composition: Composition) -> bool:
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
