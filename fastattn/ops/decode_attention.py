"""Attention of new queries over caches of keys and values."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ..reference.decode_attention import decode_attention as reference
from .attention.arguments import check_sinks
from .attention.bias_terms import RelativeBias
from .attention.function import part_terms
from .attention.term_lists import (
    description,
    gather_arguments,
    resolve_tensors,
)
from .attention.terms import Term
from .core.apply import call
from .core.arguments import check_float_tensor
from .core.backends import use_triton
from .core.batch_invariance import is_batch_invariant
from .core.catalog import operation
from .core.precision import autocast, disable_autocast, is_autocast_on, product_precision
from .core.sharding import refuse_distributed
from .decode_arguments import (
    EIGHT_BITS,
    DecodeAttentionOptions,
    check_caches,
    check_lengths,
    compose_decode_terms,
    find_capacity,
    read_scale,
)
from .decode_attention_samples import SAMPLES
from .decode_function import DecodeAttentionFunction

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _reference_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor,
    block_table: torch.Tensor | None = None,
    value_dim: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    splits: int | None = None,
    return_lse: bool = False,
    **terms: Any,
) -> Any:
    """`decode_attention` by the reference."""
    return reference(
        q,
        k,
        v,
        lengths,
        block_table=block_table,
        value_dim=value_dim,
        k_scale=read_scale("k_scale", k_scale, q, k),
        v_scale=read_scale("v_scale", v_scale, q, k),
        sinks=sinks,
        scale=scale,
        return_lse=return_lse,
        **part_terms(compose_decode_terms(q, find_capacity(k, block_table), **terms)),
    )


@overload
def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: "Unpack[DecodeAttentionOptions]",
) -> torch.Tensor: ...
@overload
def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: "Unpack[DecodeAttentionOptions]",
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    *,
    return_lse: bool,
    **options: "Unpack[DecodeAttentionOptions]",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@operation(reference=_reference_decode, samples=SAMPLES, own_gradients=False)
def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor,
    block_table: torch.Tensor | None = None,
    value_dim: int | None = None,
    causal: bool = True,
    window: int | Sequence[int | None] | None = None,
    mask: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    softcap: float | None = None,
    score_mods: Sequence[Term] | None = (),
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | float | None = None,
    v_scale: torch.Tensor | float | None = None,
    scale: float | None = None,
    splits: int | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of a few new queries of each sequence over its cache of keys and values.

    Each sequence has keys of its own in a cache with room for more, and its M new queries, whose
    keys and values are in the cache already, are its last: query i stands at key lengths - M + i.
    One query is a step of generation; several are a prompt that comes in chunks, or tokens to be
    verified. How many keys there are is read on the device, so that nothing waits for it and no
    length compiles anew, and only keys that count are read: what lies beyond may be anything.

    Each key is read once for all heads that share it; where there are few sequences, their keys are
    shared out over the device. Under `fastattn.batch_invariant` a sequence has the same bits
    whatever else is in the batch.

    Args:
        q: (B, H, M, Dk), float16, bfloat16, float32 or float64.
        k: (B, Hkv, N, Dk), room for N keys of each sequence; with `block_table` pages of them,
            (P, Hkv, page, Dk). Of q's dtype, or int8 or float8_e4m3fn. Read in place by any strides
            with a unit last one. Hkv divides H.
        v: as k, with Dv columns; None where the values are the first `value_dim` columns of k, as
            in latent attention.
        lengths: (B,) int32 or int64: how many keys each sequence has, the new ones among them. A
            query that stands before the first key sees none.
        block_table: (B, pages) int32 or int64: in which pages a sequence's keys lie, one after
            another. Entries beyond its keys are not looked at. On a GPU an entry out of range makes
            the output of who sees it NaN; on a CPU it is an error.
        value_dim: Dv, where v is None.
        causal: a query sees no key after its own place.
        window: how many keys before its own place a query sees, or (before, after); None for all.
        mask: booleans (M, M) or (B or 1, M, M), True where a query sees a new key, as of a tree of
            guesses. `causal` then does not count.
        starts: (B,) int32 or int64: the first key of each sequence that counts, where prompts are
            padded on the left.
        alibi_slopes, relative_bias, softcap, score_mods, sinks: as in `attention`; places are those
            in the cache.
        k_scale, v_scale: what caches are multiplied by, as those of 8 bits are: a number, or
            float32 () or (Hkv,).
        scale: Dk^-0.5 if None.
        splits: in how many parts the keys of a sequence go; by the device if None.
        return_lse: return the logsumexp of each query's scores as well, its sink included.

    Returns:
        o (B, H, M, Dv) in the dtype of q; with return_lse (o, lse), lse being (B, H, M) in float32
        (float64 for float64), to base e. Both are differentiable, by the reference's gradients.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit; a length does not fit the cache (CPU).

    Example:
        >>> k, v = torch.randn(2, 2, 1, 16, 8)  # room for 16 keys of 2 sequences
        >>> q = torch.randn(2, 4, 1, 8)
        >>> lengths = torch.tensor([5, 12])
        >>> o = fastattn.decode_attention(q, k, v, lengths=lengths)
        >>> alone = fastattn.attention(q[:1], k[:1, :, :5], v[:1, :, :5])
        >>> torch.testing.assert_close(o[:1], alone)

    Source: Dao et al., "Flash-Decoding for Long-Context Inference" (2023); pages are those of Kwon
    et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention"
    (2023).
    """
    op = "decode_attention"
    refuse_distributed(op, q=q, k=k, v=v, lengths=lengths, block_table=block_table)
    check_float_tensor(op, "q", q)
    value_dim = check_caches(op, q, k, v, block_table, value_dim)
    check_lengths(op, q, k, lengths, block_table)
    if is_autocast_on("cuda" if q.is_cuda else q.device.type):
        # A cache is large: the queries take its dtype.
        q = q.to(k.dtype) if k.is_floating_point() and k.itemsize > 1 else autocast(q)[0]
    if k.dtype not in (q.dtype, *EIGHT_BITS):
        raise TypeError(f"{op}: k must be {q.dtype} as q is, int8 or float8_e4m3fn, got {k.dtype}")
    if splits is not None and (isinstance(splits, bool) or splits < 1):
        raise ValueError(f"{op}: splits must be positive, got {splits}")
    k_scale = read_scale("k_scale", k_scale, q, k)
    v_scale = read_scale("v_scale", v_scale, q, k)
    terms = compose_decode_terms(
        q,
        find_capacity(k, block_table),
        causal=causal,
        window=window,
        mask=mask,
        starts=starts,
        alibi_slopes=alibi_slopes,
        relative_bias=relative_bias,
        softcap=softcap,
        score_mods=score_mods,
    )
    if sinks is not None:
        check_sinks(op, sinks, q)
    traced = torch.compiler.is_compiling() and torch.is_grad_enabled()
    if traced or not use_triton(q):
        with disable_autocast(q):
            return reference(
                q,
                k,
                v,
                lengths,
                block_table=block_table,
                value_dim=value_dim,
                k_scale=k_scale,
                v_scale=v_scale,
                sinks=sinks,
                scale=scale,
                return_lse=return_lse,
                **part_terms(terms),
            )
    terms = resolve_tensors(terms)
    tensors, floats, integers = gather_arguments(terms)
    settings = (
        value_dim,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        product_precision(q.dtype),
        description(terms, q.dtype),
        floats,
        integers,
        is_batch_invariant(),
        splits,
    )
    if sinks is not None:
        sinks = sinks.contiguous()
    given = (q, k, v, lengths.contiguous(), block_table, k_scale, v_scale, sinks)
    o, lse = call(DecodeAttentionFunction, *given, tuple(terms), settings, *tensors)
    return (o, lse) if return_lse else o
