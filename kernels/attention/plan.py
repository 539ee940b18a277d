"""What a launch of attention's kernels is, but for its tensors' addresses: planned once a shape."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..config import Target, find_target
from ..launch import MOST_BOUND, common_divisor, dropout_scalars, launchable
from ..structures import make_odd
from ..tuning import forgetters
from .composition import Composition, compose, join_arguments
from .config import NARROWEST, AttentionConfig, head_chunks
from .launch import Call, Rule, folds
from .structures import Columns, Cut, Heads

WIDEST_STRIDE = 2**24
"""From here on the offsets within a tile, of 128 rows at most, need 64 bits."""


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
    kernel: launchable, rule: Rule, target: Target, features: Features
) -> tuple[Callable[..., None], AttentionConfig]:
    """A kernel's launch bound to all that does not vary with lengths, and its configuration."""
    composition = compose(features.terms)
    config = _choose_config(rule, target, features, composition)
    folded = features.positive and folds(features.dtype, composition)
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


class Plan(NamedTuple):
    """What a launch is but for its tensors' addresses, the same for operands of the same shapes."""

    launch: Callable[..., None]
    config: AttentionConfig
    grid: tuple[int, ...]
    views: list[tuple[int, ...]]
    """The first three strides of q, k, v and the other operands, as odd numbers."""
    given: dict[str, Any]
    """Arguments that are no tensors and belong to none."""
    queries: int
    """How many there are, and keys, as odd numbers."""
    keys: int


_plans: dict[tuple, Plan] = {}

forgetters.append(_plans.clear)

Order = Callable[[Call, AttentionConfig], tuple[tuple[int, ...], dict[str, int]]]
"""A launch's grid, and the arguments by which its programs find their places in it."""


def prepare(
    kernel: launchable,
    rule: Rule,
    call: Call,
    others: dict[str, torch.Tensor],
    order: Order | None = None,
    sinks: torch.Tensor | None = None,
    entries: tuple[int, ...] = (),
) -> tuple[Plan, dict[str, Any]]:
    """The plan of a launch, and the arguments of it that all of attention's kernels have.

    `others` are the tensors (B, H, rows, columns) that it takes besides q, k and v. Without an
    order the grid is the caller's.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k = call[:5]
    operands = (q, k, v, *others.values())
    # Plans are looked for by all that they are made of; making one takes several times as long.
    key = (
        kernel,
        rule,
        q.dtype,
        find_target(q),
        q.shape,
        k.shape,
        v.shape,
        *[x.stride() for x in operands],
        None if cu_seqlens_q is None else cu_seqlens_q.shape,
        call.max_seqlen_q,
        call.max_seqlen_k,
        call.scale,
        call.precision,
        call.terms,
        call.batch_invariant,
        call.seed is None,
        sinks is None,
        entries,
    )
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MOST_BOUND:
            _plans.clear()
        plan = _plans[key] = _make_plan(kernel, rule, call, operands, order, sinks, entries)
    given = plan.given.copy()
    # Views as plain tuples, which take a fraction of the time that named ones take to be made.
    given["q_view"] = (q, *plan.views[0])
    given["k_view"] = (k, *plan.views[1])
    given["v_view"] = (v, *plan.views[2])
    for (name, x), strides in zip(others.items(), plan.views[3:], strict=True):
        given[name] = (x, *strides)
    given["queries_view"] = (cu_seqlens_q, plan.queries)
    given["keys_view"] = (cu_seqlens_k, plan.keys)
    if compose(call.terms).has_arguments:
        given["terms_args"] = join_arguments(call.tensors, call.floats, call.integers)
    if sinks is not None:
        given["sinks_ptr"] = sinks
    if call.seed is not None:
        threshold, _ = dropout_scalars(call.dropout_p)
        given["dropout_view"] = (call.seed, make_odd(threshold), make_odd(call.max_seqlen_q))
    return plan, given


def _make_plan(
    kernel: launchable,
    rule: Rule,
    call: Call,
    operands: tuple[torch.Tensor, ...],
    order: Order | None,
    sinks: torch.Tensor | None,
    entries: tuple[int, ...],
) -> Plan:
    strides = [x.stride()[:3] for x in operands]
    _, heads, queries, key_dim = call.q.shape
    _, key_heads, keys, value_dim = call.v.shape
    features = Features(
        key_dim,
        value_dim,
        heads,
        heads // key_heads,
        call.q.dtype,
        call.scale if call.q.dtype is torch.float64 else None,
        call.scale > 0.0,
        call.precision,
        call.terms,
        common_divisor(*(stride for own in strides for stride in own)),
        # Only rows are within a tile.
        max(row for _, _, row in strides) >= WIDEST_STRIDE,
        sinks is not None,
        call.seed is not None,
        entries,
        call.batch_invariant,
    )
    launch, config = bound_launch(kernel, rule, find_target(call.q), features)
    grid, places = ((), {}) if order is None else order(call, config)
    views = [tuple(map(make_odd, own)) for own in strides]
    given = {"scale": call.scale, **places}
    return Plan(launch, config, grid, views, given, make_odd(queries), make_odd(keys))
