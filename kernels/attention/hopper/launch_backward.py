"""Which backward passes the warp-specialised kernels carry, and how these are launched."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...config import Target, cdiv, find_target
from ...launch import MOST_BOUND, POINTER_ALIGNMENT, common_divisor
from ...tuning import forgetters
from ..composition import compose, join_arguments
from ..config import head_chunks
from ..launch import Call, Gradient, allocate_like
from ..order import group_keys, group_queries
from ..structures import Columns, Heads
from .backward_config import CONSUMERS, KEYS, QUERIES, HopperBackwardConfig, HopperBackwardRule
from .config import CONSUMERS_REGISTERS, PRODUCERS_REGISTERS, ROWS, Cut
from .launch import MOST_ELEMENTS, Describer, carries, has_descriptor, load_kernel

SEEN_BY_SOMEBODY = frozenset({"causal", "right"})
"""Masks under which every key is seen by the last query."""


MODULES = {KEYS: "backward_keys", QUERIES: "backward_queries"}
"""The file of each kernel."""


def find_backward(
    kernel: str, call: Call, gradient: Gradient, rule: HopperBackwardRule
) -> HopperBackwardConfig | None:
    """The configuration of a kernel for a call, or None where the one of all devices has to do it.

    It carries what the forward carries, and what has sinks besides, which are all in lse and delta.
    """
    if not carries(call):
        return None
    config = _find_config(kernel, rule, find_target(call.q), call.k.shape[3], call.v.shape[3])
    if config is None or not all(map(has_descriptor, (call.q, call.k, call.v, gradient.do))):
        return None
    lse, delta = gradient.lse, gradient.delta
    aligned = (lse.data_ptr() | delta.data_ptr()) % POINTER_ALIGNMENT == 0
    return config if aligned and lse.numel() < MOST_ELEMENTS else None


@functools.lru_cache(MOST_BOUND)
def _find_config(
    kernel: str, rule: HopperBackwardRule, target: Target, key_dim: int, value_dim: int
) -> HopperBackwardConfig | None:
    config = rule(kernel, key_dim, value_dim, target)
    return config if config.used and _load(kernel) is not None else None


forgetters.append(_find_config.cache_clear)


def _load(kernel: str) -> Any:
    return load_kernel(MODULES[kernel], f"{kernel}_kernel")


class Layer(NamedTuple):
    """What is the same in every call of a layer."""

    config: HopperBackwardConfig
    target: Target
    dims: tuple[int, int]
    """The columns of keys and of values."""
    heads: tuple[int, int]
    """How many query heads there are, and how many share a key head."""
    dtype: torch.dtype
    terms: str
    divisor: int
    packed: bool


def launch_keys_backward(
    call: Call, gradient: Gradient, config: HopperBackwardConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the gradients of k and v on a call that the kernel carries: (dk, dv)."""
    k, v = call.k, call.v
    dk = allocate_like(k, k.shape[3], call.cu_seqlens_k)
    dv = allocate_like(v, v.shape[3], call.cu_seqlens_k)
    divisor = common_divisor(*dk.stride()[:3], *dv.stride()[:3])
    launch, describe, describe_numbers = bound_launch(KEYS, describe_layer(call, config, divisor))
    pairs = k.shape[1] * call.batches
    tiles = cdiv(call.longest_keys, config.tile)
    launch(
        (pairs * tiles, 1, 1),
        dk_view=_view(dk),
        dv_view=_view(dv),
        **describe(call.q, k, v, gradient.do),
        lse_desc=describe_numbers(gradient.lse),
        delta_desc=describe_numbers(gradient.delta),
        **_arguments(call),
        **group_keys(call, config, pairs, tiles),
    )
    return dk, dv


def launch_queries_backward(
    call: Call, gradient: Gradient, config: HopperBackwardConfig
) -> torch.Tensor:
    """Launch the gradient of q on a call that the kernel carries."""
    q = call.q
    dq = allocate_like(q, q.shape[3], call.cu_seqlens_q)
    layer = describe_layer(call, config, common_divisor(*dq.stride()[:3]))
    launch, describe, _ = bound_launch(QUERIES, layer)
    pairs = q.shape[1] * call.batches
    tiles = cdiv(call.longest_queries, config.tile)
    launch(
        (pairs * tiles, 1, 1),
        dq_view=_view(dq),
        lse_ptr=gradient.lse,
        delta_ptr=gradient.delta,
        **describe(q, call.k, call.v, gradient.do),
        **_arguments(call),
        **group_queries(call, config, pairs, tiles),
    )
    return dq


def describe_layer(call: Call, config: HopperBackwardConfig, divisor: int) -> Layer:
    """What a launch is bound to; `divisor` divides the strides of what it writes."""
    q, k, v = call.q, call.k, call.v
    return Layer(
        config,
        find_target(q),
        (k.shape[3], v.shape[3]),
        (q.shape[1], q.shape[1] // k.shape[1]),
        q.dtype,
        call.terms,
        divisor,
        call.cu_seqlens_k is not None,
    )


def _view(x: torch.Tensor) -> tuple:
    return x, *(2 * stride + 3 for stride in x.stride()[:3])


def _arguments(call: Call) -> dict[str, Any]:
    """The arguments that both kernels have."""
    given: dict[str, Any] = {
        "queries_view": (call.cu_seqlens_q, 2 * call.q.shape[2] + 3),
        "keys_view": (call.cu_seqlens_k, 2 * call.k.shape[2] + 3),
        "scale": call.scale,
    }
    if compose(call.terms).has_arguments:
        given["terms_args"] = join_arguments(call.tensors, call.floats, call.integers)
    return given


Bound = tuple[
    Callable[..., None],
    Callable[..., dict[str, Any]],
    Callable[[torch.Tensor], Any],
]


@functools.lru_cache(MOST_BOUND)
def bound_launch(kernel: str, layer: Layer) -> Bound:
    """A launch bound to all that does not vary with lengths, and what makes its descriptors: those
    of q, k, v and do, and that of lse or delta."""
    composition = compose(layer.terms)
    columns = [Columns(dim, *head_chunks(dim)) for dim in layer.dims]
    of_keys, rows, tile = kernel == KEYS, layer.config.rows, layer.config.tile
    names = {term.partition(":")[0] for term in layer.terms.split(";") if term}
    cut = Cut(
        block_m=rows if of_keys else tile,
        block_n=tile if of_keys else rows,
        divisor=layer.divisor,
        consumers=CONSUMERS,
        stages=layer.config.stages,
        registers=CONSUMERS_REGISTERS[CONSUMERS],
        producers_registers=PRODUCERS_REGISTERS,
        clears=layer.packed or (not of_keys and bool(names - SEEN_BY_SOMEBODY)),
        alternates=False,
    )
    constants: dict[str, Any] = {
        "TERMS": composition.terms,
        "HEADS": Heads(*layer.heads, *columns, None, True),
        "CUT": cut,
    }
    if not composition.has_arguments:
        constants["terms_args"] = ()
    boxes: dict[str, tuple[int, int, int]] = {}
    for number, name in enumerate(("q", "k", "v", "do")):
        streamed = (name in ("q", "do")) == of_keys
        own = columns[name in ("v", "do")]
        boxes[f"{name}_desc"] = (number, rows if streamed else ROWS, own.width)
        if own.tail:
            boxes[f"{name}_tail_desc"] = (number, rows if streamed else ROWS, own.tail)
        else:
            constants[f"{name}_tail_desc"] = None
    fresh = (*boxes, "lse_desc", "delta_desc") if of_keys else tuple(boxes)
    launch = _load(kernel).bind(4, fresh=fresh, **constants)
    describer = Describer(boxes, layer.dtype)
    return launch, describer.describe, functools.partial(describer.describe_numbers, rows)


forgetters.append(bound_launch.cache_clear)
