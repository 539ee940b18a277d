"""Attention of sequences that are packed one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ... import reference
from ..core.arguments import check_length, check_probability
from ..core.backends import use_triton
from ..core.catalog import Sample, operation
from ..core.precision import disable_autocast
from ..core.sharding import is_distributed
from .arguments import (
    cast,
    check_cumulative,
    check_qkv,
    check_sinks,
    choose_seed,
    compose_terms,
    own_terms,
)
from .attention import launch
from .bias_terms import RelativeBias
from .block_terms import BlockMask
from .function import part_terms
from .options import AttentionOptions, refuse_unknown
from .python_terms.terms import MaskFunction, ScoreFunction
from .samples import random_mask, slopes
from .sharding import attend_in_shards
from .terms import MaskTerm, Term

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _cumulative(*lengths: int) -> Callable[[str | torch.device], torch.Tensor]:
    """For samples: where sequences of these lengths begin and end."""
    return lambda device: torch.tensor([0, *lengths], device=device).cumsum(0).int()


def _reference_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    return_lse: bool = False,
    **terms: Any,
) -> Any:
    """`attention_varlen` by the reference."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    composed = _varlen_terms(q, *lengths, **terms)
    return reference.attention_varlen(
        q,
        k,
        v,
        *lengths,
        scale=scale,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        **part_terms(composed),
    )


def _varlen_terms(
    q: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **terms: Any,
) -> list[Term]:
    batch = cu_seqlens_q.numel() - 1
    return compose_terms("attention_varlen", q, batch, max_seqlen_q, max_seqlen_k, **terms)


@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor: ...
@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@operation(
    reference=_reference_varlen,
    samples=(
        Sample(
            "smallest",
            q=(5, 2, 4),
            k=(6, 1, 4),
            v=(6, 1, 4),
            cu_seqlens_q=_cumulative(2, 0, 3),
            cu_seqlens_k=_cumulative(3, 1, 2),
            max_seqlen_q=3,
            max_seqlen_k=3,
            return_lse=True,
        ),
        Sample(
            "causal",
            q=(90, 2, 32),
            k=(90, 2, 32),
            v=(90, 2, 32),
            cu_seqlens_q=_cumulative(50, 7, 33),
            cu_seqlens_k=_cumulative(50, 7, 33),
            max_seqlen_q=50,
            max_seqlen_k=50,
            causal=True,
        ),
        Sample(
            "cross, with everything",
            q=(60, 4, 40),
            k=(101, 2, 40),
            v=(101, 2, 80),
            cu_seqlens_q=_cumulative(1, 40, 0, 19),
            cu_seqlens_k=_cumulative(33, 50, 18, 0),
            max_seqlen_q=48,
            max_seqlen_k=50,
            causal=True,
            window=[30, 3],
            softcap=3.0,
            alibi_slopes=slopes(4),
            mask=random_mask(4, 1, 48, 50),
            return_lse=True,
        ),
        Sample(
            "rows of no sequence",
            q=(20, 2, 16),
            k=(20, 2, 16),
            v=(20, 2, 16),
            cu_seqlens_q=_cumulative(9, 4),
            cu_seqlens_k=_cumulative(9, 4),
            max_seqlen_q=9,
            max_seqlen_k=9,
            return_lse=True,
        ),
    ),
)
def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window: int | Sequence[int | None] | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    scale: float | None = None,
    kv_lengths: torch.Tensor | None = None,
    document_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    block_mask: BlockMask | None = None,
    score_mods: Sequence[Term | ScoreFunction] | None = (),
    mask_mod: MaskTerm | MaskFunction | None = None,
    return_lse: bool = False,
    **unknown: Any,
) -> Any:
    """Attention of sequences that lie packed one after another, each of its own length.

    Each is attended to by itself alone, as `attention` would, including the places of queries: the
    last query of a sequence stands at its last key. Sequences may be empty. Rows of q beyond the
    last sequence get output 0 and an lse of -inf.

    Args:
        q: (T, H, Dk), the sequences' queries, of any strides with a unit last one.
        k: (S, Hkv, Dk), their keys.
        v: (S, Hkv, Dv), their values.
        cu_seqlens_q: (B + 1,) int32: where each sequence begins in q, and the end of the last one.
        cu_seqlens_k: (B + 1,) int32: the same for k and v.
        max_seqlen_q: the number of queries of the longest sequence, or more.
        max_seqlen_k: the number of keys of the longest sequence, or more.
        causal, window, alibi_slopes, relative_bias, softcap, sinks, dropout_p, scale, score_mods,
            mask_mod: as in `attention`.
        mask, bias: broadcast to (B, H, max_seqlen_q, max_seqlen_k).
        dropout_seed: as in `attention`, of the shape (B, H, max_seqlen_q, max_seqlen_k).
        kv_lengths: (B,), as in `attention`, beside cu_seqlens_k.
        document_ids: as in `attention`, (B, max_seqlen_q) and (B, max_seqlen_k).
        block_mask: as in `attention`, of blocks of max_seqlen_q by max_seqlen_k scores.
        return_lse: return the logsumexp of each query's scores as well.

    Returns:
        o (T, H, Dv) in the dtype of q; with return_lse (o, lse), lse being (H, T) in float32
        (float64 for float64).

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit. Cumulative lengths are looked into on a
            CPU alone; on a GPU that would mean waiting for it.

    Example:
        >>> lengths = torch.tensor([0, 5, 12], dtype=torch.int32)  # 5 and 7 tokens
        >>> q = k = v = torch.randn(12, 2, 16)
        >>> fastattn.attention_varlen(q, k, v, lengths, lengths, 7, 7, causal=True).shape
        torch.Size([12, 2, 16])
    """
    op = "attention_varlen"
    if unknown:
        refuse_unknown(op, unknown)
    check_qkv(op, q, k, v, "NHD")
    check_probability(op, "dropout_p", dropout_p)
    check_length(op, "max_seqlen_q", max_seqlen_q)
    check_length(op, "max_seqlen_k", max_seqlen_k)
    if is_distributed(q):
        options = {
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
            "causal": causal,
            "window": window,
            "softcap": softcap,
            "dropout_p": dropout_p,
            "scale": scale,
            "return_lse": return_lse,
        }
        tensors = {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            "mask": mask,
            "bias": bias,
            "alibi_slopes": alibi_slopes,
            "sinks": sinks,
            "dropout_seed": dropout_seed,
            "kv_lengths": kv_lengths,
            "document_ids": document_ids,
        }
        own = {"relative_bias": relative_bias, "block_mask": block_mask}
        given = (q, k, v, own_terms(op, score_mods, mask_mod), own, tensors, options)
        return attend_in_shards(attention_varlen, *given, packed=True)
    check_cumulative(op, "cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q)
    check_cumulative(op, "cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_q and cu_seqlens_k must have the same shape, "
            f"got {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    q, k, v = cast(op, q, k, v)
    cumulative = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    lengths = (*cumulative, max_seqlen_q, max_seqlen_k)
    terms = _varlen_terms(
        q,
        *lengths,
        causal=causal,
        window=window,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        relative_bias=relative_bias,
        softcap=softcap,
        kv_lengths=kv_lengths,
        document_ids=document_ids,
        block_mask=block_mask,
        score_mods=score_mods,
        mask_mod=mask_mod,
    )
    # Heads are the first dimension but one of q here.
    if sinks is not None:
        check_sinks(op, sinks, q)
    seed = choose_seed(op, q, dropout_p, dropout_seed)
    longest = (
        max_seqlen_q if seed is not None else _longest(max_seqlen_q, q, terms),
        _longest(max_seqlen_k, k, terms),
    )
    if not use_triton(q):
        with disable_autocast(q):
            return reference.attention_varlen(
                q,
                k,
                v,
                *cumulative,
                *longest,
                sinks=sinks,
                dropout_p=dropout_p,
                dropout_seed=seed,
                scale=scale,
                return_lse=return_lse,
                **part_terms(terms),
            )
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    o, lse = launch(q, k, v, *cumulative, sinks, seed, *longest, terms, scale, dropout_p)
    o = o[0].transpose(0, 1)
    return (o, lse[0]) if return_lse else o


def _longest(length: int, rows: torch.Tensor, terms: Sequence[Term]) -> int:
    """The length of the longest sequence or more, but no more than there are rows in all.

    Unless a term has a tensor of this length. A graph does not depend on the number of rows.
    """
    if torch.compiler.is_compiling() or any(
        length in tensor.shape[2:] for term in terms for tensor in term.tensors
    ):
        return length
    return min(length, rows.shape[0])
