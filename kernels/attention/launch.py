"""How attention's kernels are launched: what their launchers share on the host."""

import dataclasses
import functools
from collections.abc import Callable

import torch

from ..config import Target
from ..launch import (
    allocator,
    common_divisor,
    contiguous_strides,
    dropout_scalars,
    launchable,
)
from ..tuning import forgetters
from .composition import INTEGERS, Composition, compose
from .config import NARROWEST, AttentionConfig, head_chunks

WIDEST_STRIDE = 2**24
"""From here on the offsets within a tile, of 128 rows at most, need 64 bits."""

MOST_BOUND = 1024
"""Launches kept. Features are few; with more, something varies that should not count."""

Rule = Callable[[int, int, torch.dtype, str, str, Target], AttentionConfig]


@functools.lru_cache(MOST_BOUND)
def bound_launch(
    kernel: launchable,
    rule: Rule,
    key_dim: int,
    value_dim: int,
    heads: int,
    group: int,
    dtype: torch.dtype,
    scale: float | None,
    positive: bool,
    precision: str,
    terms: str,
    divisor: int,
    wide: bool,
    target: Target,
    has_sinks: bool,
    has_dropout: bool,
    entries: tuple[int, ...],
    batch_invariant: bool,
) -> tuple[Callable[..., None], AttentionConfig]:
    """A kernel's launch bound to all that does not vary with lengths, and its configuration.

    Args:
        kernel: one of attention's kernels, which takes some of the constants below.
        rule: the rule of its configuration.
        key_dim, value_dim, heads, dtype: of q, k and v.
        group: the query heads that share a key head.
        scale: the scale in float64, where a kernel needs it as a constexpr: as an argument it would
            be float32. Otherwise None.
        positive: whether the scale is.
        precision: how float32 is multiplied.
        terms: the terms' description.
        divisor: what divides all strides.
        wide: whether some stride of rows reaches WIDEST_STRIDE.
        target: the device.
        has_sinks, has_dropout: whether there are any.
        entries: for each score term how many numbers its parameter has for a head, 0 where its
            gradient is not wanted.
        batch_invariant: whether all terms shall have the same tiles.
    """
    composition = compose(terms)
    # Random numbers of a tile take as many registers as one that is loaded.
    term_class = "tensor" if has_dropout or batch_invariant else composition.term_class
    config = rule(key_dim, value_dim, dtype, precision, term_class, target)
    most_queries, most_keys = composition.largest_tile
    if max(entries, default=0) > 1:
        # A table's gradient asks for each score's entry besides, and for its sums.
        share = 2 if key_dim <= 128 else 4
        most_queries = min(most_queries, max(NARROWEST, config.block_m // share))
    config = dataclasses.replace(
        config,
        block_m=min(config.block_m, most_queries),
        block_n=min(config.block_n, most_keys),
    )
    key_width, key_tail = head_chunks(key_dim)
    value_width, value_tail = head_chunks(value_dim)
    constants = {
        "HEADS": heads,
        "GROUP": group,
        "SCALE": scale,
        "FOLDED": positive and _folds(dtype, composition),
        "WIDE": wide,
        "PRECISION": precision,
        "DIVISOR": divisor,
        "RELOADS": config.reloads,
        "ONE_LOOP": composition.hides_first_keys or config.one_loop,
        "DK": key_dim,
        "DK_WIDTH": key_width,
        "DK_TAIL": key_tail,
        "DV": value_dim,
        "DV_WIDTH": value_width,
        "DV_TAIL": value_tail,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "ENTRIES": entries,
        **composition.constants,
        **dict.fromkeys(INTEGERS[composition.integers :], 0),
    }
    if not composition.has_arguments:
        constants |= composition.arguments((), (), ())
    if not has_sinks:
        constants["sinks_ptr"] = None
    if not has_dropout:
        constants |= {"seed_ptr": None, "dropout_threshold": 0}
        # Where it serves for dropout alone.
        if "max_keys" not in kernel.parameters:
            constants["max_queries"] = 0
    if not any(entries):
        constants["gathered_args"] = ()
    launch = kernel.bind(
        config.num_warps,
        config.num_stages,
        **{name: value for name, value in constants.items() if name in kernel.parameters},
    )
    return launch, config


forgetters.append(bound_launch.cache_clear)


def prepared(
    kernel: launchable,
    rule: Rule,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    strides: tuple[int, ...],
    scale: float,
    precision: str,
    terms: str,
    tensors: list[torch.Tensor],
    floats: list[float],
    integers: list[int],
    target: Target,
    *,
    sinks: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    max_queries: int = 0,
    entries: tuple[int, ...] = (),
    batch_invariant: bool = False,
) -> tuple[Callable[..., None], AttentionConfig]:
    """The launch of a kernel on q, k and v, given all that does not vary with lengths as well as
    the arguments for terms, sinks and dropout, and its configuration."""
    composition = compose(terms)
    _, heads, _, key_dim = q.shape
    dtype = q.dtype
    launch, config = bound_launch(
        kernel,
        rule,
        key_dim,
        v.shape[3],
        heads,
        heads // k.shape[1],
        dtype,
        scale if dtype is torch.float64 else None,
        scale > 0.0,
        precision,
        terms,
        common_divisor(*strides),
        # Of each tensor's batch, heads and rows. Only rows are within a tile.
        max(strides[2::3]) >= WIDEST_STRIDE,
        target,
        sinks is not None,
        seed is not None,
        entries,
        batch_invariant,
    )
    arguments = {}
    if composition.has_arguments:
        arguments = composition.arguments(tensors, floats, integers)
    if sinks is not None:
        arguments["sinks_ptr"] = sinks
    if seed is not None:
        threshold, _ = dropout_scalars(dropout_p)
        arguments |= {"seed_ptr": seed, "max_queries": max_queries, "dropout_threshold": threshold}
    return functools.partial(launch, **arguments) if arguments else launch, config


def _folds(dtype: torch.dtype, composition: Composition) -> bool:
    """Whether a positive scale may wait until a score is taken to base 2.

    That saves a multiplication, but asks for a scale that is positive, because the largest score
    is looked for before it, and for no terms, which take scores as they are. In float32 its one
    rounding more shows.
    """
    return dtype.itemsize == 2 and not composition.constants["SCORES"]


def statistics_dtype(q: torch.Tensor) -> torch.dtype:
    """The dtype of a query's lse."""
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where the columns of a row lie next to each other, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def like_queries(q: torch.Tensor, dim: int, cumulative: torch.Tensor | None) -> torch.Tensor:
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


def statistics_like(q: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor (B, H, M) to be filled with a number for each query."""
    batch, heads, queries, _ = q.shape
    shape = (batch, heads, queries)
    return allocator(q.device)(shape, contiguous_strides(shape), statistics_dtype(q))
