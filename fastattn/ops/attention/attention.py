"""Attention: softmax(terms(scale q k^T)) v, of one sequence a batch element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ... import reference
from ..core.apply import call
from ..core.arguments import check_probability
from ..core.backends import use_triton
from ..core.batch_invariance import is_batch_invariant
from ..core.catalog import operation
from ..core.precision import disable_autocast, product_precision
from ..core.sharding import is_distributed
from .arguments import cast, check_qkv, check_sinks, choose_seed, compose_terms, own_terms
from .bias_terms import RelativeBias
from .block_terms import BlockMask
from .function import AttentionFunction, part_terms
from .leading import attend_over_leading
from .options import AttentionOptions, refuse_unknown
from .python_terms.terms import MaskFunction, ScoreFunction
from .samples import SAMPLES
from .sharding import attend_in_shards
from .term_lists import prepare_terms
from .terms import MaskTerm, Term

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    return_lse: bool = False,
    **terms: Any,
) -> Any:
    """`attention` by the reference."""
    if q.dim() > 4:
        options = {
            "scale": scale,
            "sinks": sinks,
            "dropout_p": dropout_p,
            "dropout_seed": dropout_seed,
            "return_lse": return_lse,
        }
        return attend_over_leading(_reference_attention, q, k, v, {**options, **terms})
    composed = compose_terms("attention", q, q.shape[0], q.shape[2], k.shape[2], **terms)
    return reference.attention(
        q,
        k,
        v,
        scale=scale,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=return_lse,
        **part_terms(composed),
    )


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@operation(
    reference=_reference_attention,
    samples=SAMPLES,
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
    """Attention: for each query, the mean of the values weighted by softmax of the scores.

    The score of a query and a key is scale q . k, to which apply in this order: `softcap`, `bias`,
    `relative_bias`, ALiBi, `score_mods` in the order given, and all masks; then `sinks` in the sum
    that the weights are divided by, and dropout of the weights. A query that no mask leaves a key
    gets output 0, an lse of -inf (its sink, if there is one) and gradients of 0. Query i stands at
    key i + N - M: the last query at the last key. Query head h uses the key head h // (H // Hkv).

    Memory is linear in M + N but for what an explicit mask or bias takes itself. Gradients have the
    same bits every time. Autocast applies as to a product.

    As in FlashAttention, the gradients of scores come from o as it was rounded to q's dtype. What
    that lacks in 16 bits a common mean of the values lifts into all of them, and a common mean of
    the keys into those of q, where it cancels no more: with both means 5 and deviations of 1 the
    relative error of dq is 2e-2 in float16, where the reference has 1e-3, and in bfloat16 8 times
    that. So it is, times the distances, with learned slopes of ALiBi.

    There may be several batch dimensions in place of B: they count as one, and a mask or a bias
    broadcasts over any of them without a copy if those that it has are next to each other.

    Args:
        q: (B, H, M, Dk), float16, bfloat16, float32 or float64. Read in place by any strides with
            a unit last one, as are k and v: (B, M, H, D) storage transposed, or slices of a packed
            projection, cost no copy.
        k: (B, Hkv, N, Dk), of the dtype of q. Hkv divides H.
        v: (B, Hkv, N, Dv).
        causal: a query sees no key after its own place.
        window: how many keys before its own place a query sees, or (before, after); None for all.
        mask: booleans that broadcast to (B, H, M, N), True where a query sees a key.
        bias: numbers of any float dtype that broadcast to (B, H, M, N) and are added to the scores;
            a score of which one is -inf does not count. Its gradient is summed over what it was
            broadcast to, without a tensor larger than itself.
        alibi_slopes: (H,) or (B, H); the score loses slope times the distance from a query's place
            to the key. See `fastattn.alibi_slopes`.
        relative_bias: T5's bias by distance, see `fastattn.RelativeBias`.
        softcap: a positive number; scores become softcap * tanh(score / softcap). Infinity is no
            cap.
        sinks: (H,): one more score for each query of a head, without a value.
        dropout_p: the probability that a weight is zeroed, in [0, 1); the others are divided by
            1 - dropout_p. lse knows nothing of it.
        dropout_seed: int64, one element, on q's device; None draws one from PyTorch's generator
            there. What is kept depends on it and on the place of a weight among all: `dropout_mask`
            of the shape (B, H, M, N) shows it. Shards of a DTensor have masks of their own.
        scale: Dk^-0.5 if None.
        kv_lengths: (B,) int32 or int64: the number of keys that count in each batch element. Places
            are those of all N keys.
        document_ids: (B, N) int32 or int64, or a pair (B, M) and (B, N) for queries and keys: a
            query sees the keys of its own document alone. Blocks of scores without a document in
            common, by their least and largest ids, cost nothing.
        block_mask: blocks of scores that count or do not, see `fastattn.BlockMask` and
            `fastattn.create_block_mask`.
        score_mods: what changes the scores: functions f(score, b, h, q_idx, kv_idx), see
            `fastattn.score_mod`, and terms, see `fastattn.ScoreTerm` and `fastattn.MaskTerm`.
        mask_mod: a function f(b, h, q_idx, kv_idx) that says whether a query sees a key, or a term;
            see `fastattn.mask_mod`.
        return_lse: return the logsumexp of each query's scores as well, its sink included.

    Returns:
        o (B, H, M, Dv) in the dtype of q; with return_lse (o, lse), lse being (B, H, M) in float32
        (float64 for float64), to base e. Both are any number of times differentiable in q, k, v,
        bias, slopes, the table of relative_bias, sinks, and what score_mods learn.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Source: Vaswani et al., "Attention Is All You Need" (2017); the algorithm is that of Dao,
    "FlashAttention-2" (2023); ALiBi of Press et al., "Train Short, Test Long" (2021); sinks of Xiao
    et al., "Efficient Streaming Language Models with Attention Sinks" (2024), as gpt-oss has them.

    Example:
        >>> q = torch.randn(1, 4, 8, 16, requires_grad=True)
        >>> k, v = torch.randn(2, 1, 2, 8, 16)
        >>> o, lse = fastattn.attention(q, k, v, causal=True, softcap=30.0, return_lse=True)
        >>> o.shape, lse.shape
        (torch.Size([1, 4, 8, 16]), torch.Size([1, 4, 8]))
    """
    op = "attention"
    if unknown:
        refuse_unknown(op, unknown)
    if isinstance(q, torch.Tensor) and q.dim() > 4:
        options = {
            "causal": causal,
            "window": window,
            "mask": mask,
            "bias": bias,
            "alibi_slopes": alibi_slopes,
            "relative_bias": relative_bias,
            "softcap": softcap,
            "sinks": sinks,
            "dropout_p": dropout_p,
            "dropout_seed": dropout_seed,
            "scale": scale,
            "kv_lengths": kv_lengths,
            "document_ids": document_ids,
            "block_mask": block_mask,
            "score_mods": score_mods,
            "mask_mod": mask_mod,
            "return_lse": return_lse,
        }
        return attend_over_leading(attention, q, k, v, options)
    check_qkv(op, q, k, v, "BHND")
    check_probability(op, "dropout_p", dropout_p)
    if is_distributed(q):
        options = {
            "causal": causal,
            "window": window,
            "softcap": softcap,
            "dropout_p": dropout_p,
            "scale": scale,
            "return_lse": return_lse,
        }
        tensors = {
            "mask": mask,
            "bias": bias,
            "alibi_slopes": alibi_slopes,
            "sinks": sinks,
            "dropout_seed": dropout_seed,
            "kv_lengths": kv_lengths,
            "document_ids": document_ids,
        }
        terms = {"relative_bias": relative_bias, "block_mask": block_mask}
        mods = own_terms(op, score_mods, mask_mod)
        return attend_in_shards(attention, q, k, v, mods, terms, tensors, options)
    q, k, v = cast(op, q, k, v)
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    composed = compose_terms(
        op,
        q,
        batch,
        queries,
        keys,
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
    if sinks is not None:
        check_sinks(op, sinks, q)
    seed = choose_seed(op, q, dropout_p, dropout_seed)
    if not use_triton(q):
        with disable_autocast(q):
            return reference.attention(
                q,
                k,
                v,
                sinks=sinks,
                dropout_p=dropout_p,
                dropout_seed=seed,
                scale=scale,
                return_lse=return_lse,
                **part_terms(composed),
            )
    o, lse = launch(q, k, v, None, None, sinks, seed, queries, keys, composed, scale, dropout_p)
    return (o, lse) if return_lse else o


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    terms: Sequence[Term],
    scale: float | None,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) by the kernels."""
    terms, described, tensors, floats, integers, learned = prepare_terms(terms, q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    settings = (
        max_seqlen_q,
        max_seqlen_k,
        scale,
        float(dropout_p),
        product_precision(q.dtype),
        described,
        floats,
        integers,
        is_batch_invariant(),
        learned,
    )
    # Only derivatives of gradients ask for the terms themselves, and there are none when compiling.
    kept = None if torch.compiler.is_compiling() else tuple(terms)
    if sinks is not None:
        sinks = sinks.contiguous()
    given = (q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, seed)
    return call(AttentionFunction, *given, kept, settings, *tensors)
