"""The arguments of decode attention, checked and made what its kernels take."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from .attention.arguments import WIDEST_HEAD, compose_terms
from .attention.bias_terms import RelativeBias
from .attention.terms import Term
from .core.arguments import check_constant, check_device, check_integers, check_shape
from .core.tensor_kinds import is_plain
from .decode_masks import Starts, TreeMask

if TYPE_CHECKING:
    from typing_extensions import Required

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
"""The dtypes of caches besides that of the queries."""


class DecodeAttentionOptions(TypedDict, total=False):
    """What `decode_attention` takes by name besides return_lse; see there."""

    lengths: "Required[torch.Tensor]"
    block_table: torch.Tensor | None
    value_dim: int | None
    causal: bool
    window: int | Sequence[int | None] | None
    mask: torch.Tensor | None
    starts: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    relative_bias: RelativeBias | None
    softcap: float | None
    score_mods: Sequence[Term] | None
    sinks: torch.Tensor | None
    k_scale: torch.Tensor | float | None
    v_scale: torch.Tensor | float | None
    scale: float | None
    splits: int | None


def find_capacity(k: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """How many keys a sequence has room for."""
    return k.shape[2] if block_table is None else k.shape[2] * block_table.shape[1]


def compose_decode_terms(
    q: torch.Tensor,
    capacity: int,
    *,
    causal: bool = True,
    mask: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    score_mods: Sequence[Term] | None = (),
    **terms: Any,
) -> list[Term]:
    """The terms that the arguments ask for."""
    op = "decode_attention"
    batch, _, queries, _ = q.shape
    # A single query stands at the last key.
    causal = causal and mask is None and queries > 1
    composed = compose_terms(
        op, q, batch, queries, capacity, causal=causal, score_mods=score_mods, **terms
    )
    sizes = (batch, q.shape[1], queries, capacity)
    for name, given, term in (("mask", mask, TreeMask), ("starts", starts, Starts)):
        if given is not None:
            own = term(given)
            own.check(op, name, q, sizes)
            composed.append(own.prepared(sizes))
    return composed


def read_scale(
    name: str, scale: torch.Tensor | float | None, q: torch.Tensor, k: torch.Tensor
) -> torch.Tensor | None:
    """A scale as (Hkv,) of the dtype to compute in."""
    op = "decode_attention"
    computed = torch.promote_types(q.dtype, torch.float32)
    if scale is None:
        return None
    if not isinstance(scale, torch.Tensor):
        return torch.full((k.shape[1],), float(scale), dtype=computed, device=q.device)
    check_constant(op, name, scale, q)
    wide = scale.dtype in (torch.float32, torch.float64)
    if not wide or scale.shape not in ((), (1,), (k.shape[1],)):
        raise ValueError(
            f"{op}: {name} must be float32 of shape () or ({k.shape[1]},), "
            f"got {scale.dtype} of shape {tuple(scale.shape)}"
        )
    return scale.to(computed).expand(k.shape[1]).contiguous()


def check_caches(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    block_table: torch.Tensor | None,
    value_dim: int | None,
) -> int:
    """The caches fit q; what comes back is the number of columns of a value."""
    layout = "(B, Hkv, N, D)" if block_table is None else "(P, Hkv, page, D)"
    if q.dim() != 4:
        raise ValueError(f"{op}: q must be (B, H, M, D), got the shape {tuple(q.shape)}")
    for name, cache in (("k", k), ("v", v)):
        if cache is None:
            continue
        check_device(op, name, cache, q)
        if cache.dim() != 4:
            raise ValueError(f"{op}: {name} must be {layout}, got the shape {tuple(cache.shape)}")
        if cache.dtype is not k.dtype:
            raise TypeError(f"{op}: k and v must have one dtype, got {k.dtype} and {cache.dtype}")
        if cache.shape[:3] != k.shape[:3]:
            raise ValueError(
                f"{op}: k and v must have the same heads and room, got {tuple(k.shape)} and "
                f"{tuple(cache.shape)}"
            )
    batch, heads, _, key_dim = q.shape
    if block_table is None and k.shape[0] != batch:
        raise ValueError(f"{op}: q and k must have the same batch, got {batch} and {k.shape[0]}")
    if k.shape[3] != key_dim:
        raise ValueError(
            f"{op}: q and k must have the same head dimension, got {key_dim} and {k.shape[3]}"
        )
    if k.shape[1] == 0 or heads % k.shape[1] != 0:
        raise ValueError(
            f"{op}: the number of heads of k must divide that of q, got {k.shape[1]} and {heads}"
        )
    if block_table is not None and 0 in (k.shape[0], k.shape[2]):
        raise ValueError(f"{op}: there must be pages with room, got the shape {tuple(k.shape)}")
    if v is not None:
        if value_dim is not None:
            raise ValueError(f"{op}: value_dim is for calls without v")
        value_dim = v.shape[3]
    elif value_dim is None:
        raise ValueError(f"{op}: without v value_dim must say how many columns of k the values are")
    if not 0 < value_dim <= (WIDEST_HEAD if v is not None else key_dim) or key_dim > WIDEST_HEAD:
        raise ValueError(
            f"{op}: head dimensions must be in [1, {WIDEST_HEAD}], and value_dim at most that "
            f"of k, got {key_dim} and {value_dim}"
        )
    return value_dim


def check_lengths(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    lengths: torch.Tensor,
    block_table: torch.Tensor | None,
) -> None:
    """Lengths and pages fit, which on a CPU is looked at number by number."""
    check_constant(op, "lengths", lengths, q)
    check_integers(op, "lengths", lengths)
    check_shape(op, "lengths", lengths, q.shape[:1])
    if block_table is not None:
        check_constant(op, "block_table", block_table, q)
        check_integers(op, "block_table", block_table)
        if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
            raise ValueError(
                f"{op}: block_table must be ({q.shape[0]}, pages), got {tuple(block_table.shape)}"
            )
    if lengths.device.type != "cpu" or not is_plain((lengths, block_table)):
        return
    capacity = find_capacity(k, block_table)
    if ((lengths < 0) | (lengths > capacity)).any():
        raise ValueError(f"{op}: lengths must be in [0, {capacity}], got {lengths.tolist()}")
    if block_table is not None:
        used = torch.arange(block_table.shape[1]) * k.shape[2] < lengths[:, None]
        wrong = block_table[used & ((block_table < 0) | (block_table >= k.shape[0]))]
        if wrong.numel() > 0:
            raise ValueError(
                f"{op}: block_table must name pages in [0, {k.shape[0]}), got {wrong.tolist()}"
            )
