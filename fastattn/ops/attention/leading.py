"""Attention over several leading dimensions, which masks and biases broadcast over by strides."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .bias_terms import AdditiveBias, SharedBias
from .terms import BooleanMask, SharedMask, Term

Shape = tuple[int, ...]


def attend_over_leading(
    attend: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: Mapping[str, Any],
) -> Any:
    """`attend` of q (..., H, M, D), k and v as of one batch dimension.

    Nothing is copied where the leading dimensions can be seen as one, and of a mask or bias where
    those that it has are next to each other.
    """
    op = "attention"
    leading = tuple(q.shape[:-3])
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
        if tuple(x.shape[:-3]) != leading:
            raise ValueError(
                f"{op}: q, k and v must have the same leading dimensions, got {tuple(q.shape)} and "
                f"{tuple(x.shape)} of {name}"
            )
    given = dict(options)
    sizes = (q.shape[-3], q.shape[-2], k.shape[-2])
    terms: list[Term] = []
    for name, plain, shared in (
        ("bias", AdditiveBias, SharedBias),
        ("mask", BooleanMask, SharedMask),
    ):
        x = given.pop(name, None)
        if isinstance(x, torch.Tensor):
            x, repeat = fold(op, name, x, leading, sizes)
            terms.append(plain(x) if repeat is None else shared(x, repeat))
        elif x is not None:
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    # Before one's own terms, as a bias is without leading dimensions.
    given["score_mods"] = [*terms, *(given.get("score_mods") or ())]
    for name, own in (("alibi_slopes", 1), ("kv_lengths", 0), ("document_ids", 1)):
        if given.get(name) is not None:
            given[name] = _fold_numbers(given[name], own)
    q, k, v = (x.flatten(0, -4) for x in (q, k, v))
    result = attend(q, k, v, **given)
    if isinstance(result, tuple):
        return tuple(x.reshape(*leading, *x.shape[1:]) for x in result)
    return result.reshape(*leading, *result.shape[1:])


def fold(
    op: str, name: str, x: torch.Tensor, leading: Shape, sizes: Sequence[int]
) -> tuple[torch.Tensor, int | None]:
    """A mask or bias that broadcasts to (*leading, *sizes) as one of four dimensions.

    Its first dimension is 1, or that of all batch elements, or else the second result says how many
    batch elements in a row share each of its matrices.
    """
    full = (*leading, *sizes)
    missing = len(full) - x.dim()
    shape = (*(1,) * missing, *x.shape)
    if missing < 0 or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
        raise ValueError(f"{op}: {name} must broadcast to {full}, got {tuple(x.shape)}")
    x = x[(None,) * missing]
    own = [dim for dim in range(len(leading)) if shape[dim] != 1]
    if not own:
        return x.flatten(0, -4), None
    first, end = own[0], own[-1] + 1
    between = [size if first <= dim < end else 1 for dim, size in enumerate(leading)]
    x = x.expand(*between, *shape[-3:]).flatten(0, -4)
    if x.shape[0] == math.prod(leading):
        return x, None
    return x, math.prod(leading[end:])


def _fold_numbers(x: Any, own: int) -> Any:
    """Numbers of each batch element, `own` dimensions of them, with one dimension before these."""
    if isinstance(x, tuple):
        return tuple(_fold_numbers(y, own) for y in x)
    several = isinstance(x, torch.Tensor) and x.dim() > own + 1
    return x.flatten(0, -1 - own) if several else x
