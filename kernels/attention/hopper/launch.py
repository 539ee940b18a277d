"""Which calls the warp-specialised forward carries, and how it is launched."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import triton

from ...config import Target, find_target
from ...launch import MOST_BOUND, POINTER_ALIGNMENT, common_divisor
from ...tuning import forgetters
from ..composition import compose, join_arguments
from ..config import head_chunks
from ..launch import Call
from ..order import group_queries
from ..structures import Columns, Heads
from .config import (
    CONSUMERS_REGISTERS,
    PRODUCERS_REGISTERS,
    ROWS,
    RULE,
    Cut,
    HopperConfig,
    HopperRule,
)

CARRIED_MASKS = frozenset({"causal", "causal from first", "left", "right", "key lengths"})
"""Those that follow from the numbers of query and key, by their names in masks.py."""

MOST_ELEMENTS = 2**31
"""Coordinates of a copy have 32 bits."""


OLDEST_TRITON = (3, 7)
"""Before, the parts of a kernel cannot be handed constants by names, and products may run whose
operands in registers are written again (triton-lang/triton pull request 9514)."""


@functools.cache
def load_kernel(module: str = "forward", name: str = "attention_hopper_forward_kernel") -> Any:
    """A kernel; None where this version of Triton does not compile it.

    Here alone Gluon is imported, by a call that needs it.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return None
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def find_forward(call: Call, sinks: torch.Tensor | None, rule: HopperRule) -> HopperConfig | None:
    """The configuration of this forward for a call, or None where the other one has to do it.

    This is the one place that says so. Here are no sinks, no dropout, no score terms, no masks but
    CARRIED_MASKS, no bits that shall not hang on the batch, and no scale but a positive one; heads
    are those of RULE in 16 bits; and copies need addresses that 16 bytes divide. Besides, a
    measured table must have said that it is the faster one.
    """
    if sinks is not None or not carries(call):
        return None
    q, k, v = call.q, call.k, call.v
    config = _find_config(rule, find_target(q), k.shape[3], v.shape[3])
    return config if config is not None and all(map(has_descriptor, (q, k, v))) else None


def carries(call: Call) -> bool:
    """Whether the warp-specialised kernels, forward and backward, could do a call with tensors that
    have descriptors."""
    q, k, v = call.q, call.k, call.v
    if find_target(q).arch != 90 or call.seed is not None or q.dtype.itemsize != 2:
        return False
    if call.batch_invariant or not call.scale > 0.0 or (k.shape[3], v.shape[3]) not in RULE:
        return False
    return _has_carried_terms(call.terms)


@functools.lru_cache(MOST_BOUND)
def _has_carried_terms(terms: str) -> bool:
    return not {term.rsplit(":", 3)[0] for term in terms.split(";") if term} - CARRIED_MASKS


@functools.lru_cache(MOST_BOUND)
def _find_config(
    rule: HopperRule, target: Target, key_dim: int, value_dim: int
) -> HopperConfig | None:
    config = rule(key_dim, value_dim, target)
    return config if config.used and load_kernel() is not None else None


forgetters.append(_find_config.cache_clear)


def has_descriptor(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can speak of a tensor."""
    *strides, unit = x.stride()
    aligned = x.data_ptr() % POINTER_ALIGNMENT == 0 and unit == 1
    step = POINTER_ALIGNMENT // x.itemsize
    sizes = x.shape[:3]
    return aligned and all(
        0 < size < MOST_ELEMENTS and (size == 1 or (stride > 0 and stride % step == 0))
        for size, stride in zip(sizes, strides, strict=True)
    )


def launch_forward(call: Call, config: HopperConfig, o: torch.Tensor, lse: torch.Tensor) -> None:
    """Launch the forward on a call that it carries; `o` and `lse` are as in ../forward.py."""
    q, k, v = call.q, call.k, call.v
    strides = o.stride()[:3]
    launch, describe = bound_launch(
        config,
        find_target(q),
        (k.shape[3], v.shape[3]),
        (q.shape[1], q.shape[1] // k.shape[1]),
        q.dtype,
        call.terms,
        common_divisor(*strides),
        call.cu_seqlens_k is not None,
    )
    pairs = q.shape[1] * call.batches
    tiles = -(-call.longest_queries // config.block_m)
    launch(
        (pairs * tiles, 1, 1),
        lse_ptr=lse,
        o_view=(o, *(2 * stride + 3 for stride in strides)),
        queries_view=(call.cu_seqlens_q, 2 * q.shape[2] + 3),
        keys_view=(call.cu_seqlens_k, 2 * k.shape[2] + 3),
        scale=call.scale,
        **describe(q, k, v),
        **_join_terms(call),
        **group_queries(call, config, pairs, tiles),
    )


def _join_terms(call: Call) -> dict[str, Any]:
    if not compose(call.terms).has_arguments:
        return {}
    return {"terms_args": join_arguments(call.tensors, call.floats, call.integers)}


@functools.lru_cache(MOST_BOUND)
def bound_launch(
    config: HopperConfig,
    target: Target,
    dims: tuple[int, int],
    heads: tuple[int, int],
    dtype: torch.dtype,
    terms: str,
    divisor: int,
    packed: bool,
) -> tuple[Callable[..., None], Callable[..., dict[str, Any]]]:
    """The launch bound to all that does not vary with lengths, and what describes q, k and v."""
    kernel = load_kernel()
    composition = compose(terms)
    columns = [Columns(dim, *head_chunks(dim)) for dim in dims]
    cut = Cut(
        config.block_m,
        config.block_n,
        divisor,
        config.consumers,
        config.stages,
        CONSUMERS_REGISTERS[config.consumers],
        PRODUCERS_REGISTERS,
        config.alternates,
        packed or "key lengths" in terms,
    )
    constants: dict[str, Any] = {
        "TERMS": composition.terms,
        "HEADS": Heads(*heads, *columns, None, True),
        "CUT": cut,
    }
    if not composition.has_arguments:
        constants["terms_args"] = ()
    boxes: dict[str, tuple[int, int, int]] = {}
    for number, (name, rows) in enumerate((("q", ROWS), ("k", cut.block_n), ("v", cut.block_n))):
        own = columns[number // 2]
        boxes[f"{name}_desc"] = (number, rows, own.width)
        if own.tail:
            boxes[f"{name}_tail_desc"] = (number, rows, own.tail)
        else:
            constants[f"{name}_tail_desc"] = None
    launch = kernel.bind(4, fresh=tuple(boxes), **constants)
    return launch, Describer(boxes, dtype).describe


class Describer:
    """Makes tensor descriptors, whose boxes and layouts are the same in every call of a layer.

    Attributes:
        boxes: By the name of a descriptor, the number of its tensor, and rows and columns of a box.
    """

    def __init__(self, boxes: dict[str, tuple[int, int, int]], dtype: torch.dtype) -> None:
        gluon = importlib.import_module("triton.experimental.gluon.language")
        hopper = importlib.import_module("triton.experimental.gluon.nvidia.hopper")
        element = gluon.float16 if dtype is torch.float16 else gluon.bfloat16
        self._descriptor = hopper.TensorDescriptor
        self._plain = gluon.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
        self._forms = [
            (name, number, box, gluon.NVMMASharedLayout.get_default_for(box, element))
            for name, (number, rows, columns) in boxes.items()
            for box in ([1, 1, rows, columns],)
        ]

    def describe(self, *tensors: torch.Tensor) -> dict[str, Any]:
        """The descriptors of some tensors (B, H, rows, columns)."""
        shapes = [list(x.shape) for x in tensors]
        strides = [_usable_strides(x) for x in tensors]
        return {
            name: self._descriptor(tensors[i], shapes[i], strides[i], box, layout)
            for name, i, box, layout in self._forms
        }

    def describe_numbers(self, rows: int, x: torch.Tensor) -> Any:
        """The descriptor of a contiguous float32 tensor, by so many numbers in a row."""
        return self._descriptor(x, [x.numel()], [1], [rows], self._plain)


def _usable_strides(x: torch.Tensor) -> list[int]:
    """The strides. Of a dimension of size 1 it may be one that no copy takes; there any other will
    do, as that of rows without gaps."""
    return [
        stride if size > 1 else x.shape[3]
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ] + [1]
