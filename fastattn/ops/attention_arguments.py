"""What attention is called with: checks, and the terms that the arguments ask for."""

from collections.abc import Sequence

import torch

from .arguments import check_float_tensor, check_shape
from .attention_terms import (
    Alibi,
    BooleanMask,
    Causal,
    KeyLengths,
    MaskTerm,
    ScoreTerm,
    Softcap,
    Term,
    WindowLeft,
    WindowRight,
)
from .precision import autocast
from .products import check_same_dtype

WIDEST_HEAD = 1024
"""The largest head dimension that the kernels have tiles for. Beyond 512 they fit into the shared
memory of large devices only."""


def composed_terms(
    op: str,
    q: torch.Tensor,
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window: int | Sequence[int | None] | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    kv_lengths: torch.Tensor | None = None,
    score_mods: Sequence[Term] = (),
) -> list[Term]:
    """The terms that the arguments ask for, in the order in which they apply."""
    heads = q.shape[1]
    terms: list[Term] = []
    if softcap is not None:
        if not softcap > 0.0:
            raise ValueError(f"{op}: softcap must be positive, got {softcap}")
        terms.append(Softcap(softcap))
    if alibi_slopes is not None:
        check_constant(op, "alibi_slopes", alibi_slopes, q)
        if alibi_slopes.shape not in ((heads,), (batch, heads)):
            raise ValueError(
                f"{op}: alibi_slopes must have shape ({heads},) or ({batch}, {heads}), "
                f"got {tuple(alibi_slopes.shape)}"
            )
        terms.append(Alibi(alibi_slopes))
    if not isinstance(score_mods, Sequence):
        raise TypeError(f"{op}: score_mods must be a sequence of terms, got {score_mods!r}")
    for term in score_mods:
        if not isinstance(term, ScoreTerm | MaskTerm):
            raise TypeError(f"{op}: score_mods must hold ScoreTerm and MaskTerm, got {term!r}")
        for tensor in term.tensors:
            check_constant(op, f"score_mods: a tensor of {type(term).__name__}", tensor, q)
    terms.extend(score_mods)
    if causal:
        terms.append(Causal())
    left, right = _window(op, window)
    if left is not None:
        terms.append(WindowLeft(left))
    if right is not None:
        terms.append(WindowRight(right))
    if mask is not None:
        check_constant(op, "mask", mask, q)
        if mask.dtype is not torch.bool:
            raise TypeError(f"{op}: mask must be boolean, True where attended, got {mask.dtype}")
        terms.append(
            BooleanMask(_four_dimensions(op, "mask", mask, q, batch, queries, keys), queries, keys)
        )
    if kv_lengths is not None:
        check_constant(op, "kv_lengths", kv_lengths, q)
        if kv_lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: kv_lengths must be int32 or int64, got {kv_lengths.dtype}")
        check_shape(op, "kv_lengths", kv_lengths, (batch,))
        terms.append(KeyLengths(kv_lengths))
    return terms


def check_constant(op: str, name: str, tensor: object, q: torch.Tensor) -> None:
    """A tensor on the device of q that asks for no gradient."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != q.device:
        raise ValueError(f"{op}: {name} must be on {q.device}, got {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} must not require a gradient, for it would get none")


def _window(op: str, window: int | Sequence[int | None] | None) -> tuple[int | None, int | None]:
    """How many keys to the left and to the right of its own place a query sees."""
    sides = window if isinstance(window, Sequence) else (window, None)
    if len(sides) != 2 or not all(side is None or isinstance(side, int) for side in sides):
        raise TypeError(f"{op}: window must be an integer, a pair of them, or None, got {window!r}")
    left, right = sides
    if min(left or 0, right or 0) < 0:
        raise ValueError(f"{op}: window must not be negative, got {window}")
    return left, right


def _four_dimensions(
    op: str, name: str, x: torch.Tensor, q: torch.Tensor, batch: int, queries: int, keys: int
) -> torch.Tensor:
    """`x` with leading dimensions of 1, checked to broadcast to (B, H, M, N)."""
    wanted = (batch, q.shape[1], queries, keys)
    full = x.reshape((1,) * (4 - x.dim()) + x.shape) if x.dim() < 4 else x
    fits = full.dim() == 4 and all(
        size in (1, want) for size, want in zip(full.shape, wanted, strict=True)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must broadcast to {wanted}, got {tuple(x.shape)}")
    return full


def check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    """q, k and v fit together; `layout` has their dimensions, among which heads and lengths."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_float_tensor(op, name, x, like=q)
        if x.dim() != len(layout):
            raise ValueError(
                f"{op}: {name} must have {len(layout)} dimensions ({', '.join(layout)}), "
                f"got the shape {tuple(x.shape)}"
            )
    for place, meaning in enumerate(layout):
        if meaning in "BN" and k.shape[place] != v.shape[place]:
            raise ValueError(
                f"{op}: k and v must have the same length and batch, "
                f"got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if meaning == "B" and q.shape[place] != k.shape[place]:
            raise ValueError(
                f"{op}: q and k must have the same batch, got {tuple(q.shape)} and {tuple(k.shape)}"
            )
        if meaning == "H" and (
            k.shape[place] != v.shape[place]
            or k.shape[place] == 0
            or q.shape[place] % k.shape[place] != 0
        ):
            raise ValueError(
                f"{op}: k and v must have the same number of heads, one that divides that of q, "
                f"got {q.shape[place]}, {k.shape[place]} and {v.shape[place]}"
            )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{op}: q and k must have the same head dimension, got {q.shape[-1]} and {k.shape[-1]}"
        )
    for name, x in (("q", q), ("v", v)):
        if not 0 < x.shape[-1] <= WIDEST_HEAD:
            raise ValueError(
                f"{op}: the head dimension of {name} must be in [1, {WIDEST_HEAD}], "
                f"got {x.shape[-1]}"
            )


def cast(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in autocast's dtype, or else in the one that they have to have in common."""
    q, k, v = autocast(q, k, v)
    for name, x in (("k", k), ("v", v)):
        check_same_dtype(op, name, x, "q", q)
    return q, k, v


def check_cumulative(
    op: str, name: str, cumulative: torch.Tensor, x: torch.Tensor, longest: int
) -> None:
    check_constant(op, name, cumulative, x)
    if cumulative.dtype is not torch.int32 or cumulative.dim() != 1 or cumulative.numel() == 0:
        raise ValueError(
            f"{op}: {name} must be int32 of shape (B + 1,), "
            f"got {cumulative.dtype} of shape {tuple(cumulative.shape)}"
        )
    if cumulative.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lengths = cumulative.diff()
    if cumulative[0] != 0 or (lengths < 0).any() or cumulative[-1] > x.shape[0]:
        raise ValueError(
            f"{op}: {name} must rise from 0 to at most {x.shape[0]}, got {cumulative.tolist()}"
        )
    if (lengths > longest).any():
        raise ValueError(
            f"{op}: {name} has a sequence of {lengths.max().item()}, more than the {longest} of "
            f"max_seqlen_{name[-1]}"
        )
