"""The gradients of attention from an output and an lse that are given, on both backends."""

import itertools
from typing import Any, NamedTuple

import torch

from ... import reference
from ...ops import dropout
from ...ops.attention.arguments import check_qkv, compose_terms
from ...ops.attention.function import attention_backward, part_terms
from ...ops.attention.term_lists import description, gather_arguments, resolve_tensors
from ...ops.core.arguments import check_seed, check_shape
from ...ops.core.backends import use_triton
from ...ops.core.batch_invariance import is_batch_invariant
from ...ops.core.precision import product_precision

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Rows(NamedTuple):
    """What a backward pass begins with: (B, H, S, D) each but the lse, which is (B, H, M)."""

    do: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    lse: torch.Tensor


class Lengths(NamedTuple):
    """Where packed sequences lie, which are one batch entry of `Rows`."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Options(NamedTuple):
    """Options of `fastattn.attention`; `terms` are those that change scores."""

    terms: dict[str, Any]
    scale: float | None
    dropout_p: float
    dropout_seed: torch.Tensor | None


def differentiate(
    op: str, rows: Rows, lengths: Lengths | None, options: Options, needs: tuple[bool, bool]
) -> Gradients:
    """(dq, dk, dv) of attention whose weights are exp(score - lse) and whose output is o.

    Args:
        op: the name that errors begin with.
        rows: tensors, the output's gradient among them.
        lengths: of packed sequences, or None.
        options: what the forward was called with.
        needs: whether dq is wanted, and whether dk and dv are.
    """
    do, q, k, v, o, lse = rows
    check_qkv(op, q, k, v, "BHND")
    for name, x in (("out", o), ("dout", do)):
        check_shape(op, name, x, (*q.shape[:-1], v.shape[-1]))
    check_shape(op, "softmax_lse", lse, q.shape[:-1])
    if options.dropout_p == 0.0:
        options = options._replace(dropout_seed=None)
    elif options.dropout_seed is None:
        raise ValueError(f"{op}: rng_state must be what the forward returned, got None")
    else:
        check_seed(op, options.dropout_seed, like=q)
    if options.scale is None:
        options = options._replace(scale=q.shape[-1] ** -0.5)
    with torch.no_grad():
        if use_triton(q):
            return _launch(op, rows, lengths, options, needs)
        return _compute(op, rows, options) if lengths is None else _loop(op, rows, lengths, options)


def _launch(
    op: str, rows: Rows, lengths: Lengths | None, options: Options, needs: tuple[bool, bool]
) -> Gradients:
    """By the kernels, which take the weights from the lse in any case."""
    do, q, k, v, o, lse = rows
    if lengths is None:
        batch, longest, ends = q.shape[0], (q.shape[2], k.shape[2]), (None, None)
    else:
        batch, longest, ends = lengths.cu_seqlens_q.numel() - 1, lengths[2:], lengths[:2]
    terms = resolve_tensors(compose_terms(op, q, batch, *longest, **options.terms))
    tensors, floats, integers = gather_arguments(terms)
    settings = (
        *longest,
        options.scale,
        float(options.dropout_p),
        product_precision(q.dtype),
        description(terms, q.dtype),
        floats,
        integers,
        is_batch_invariant(),
    )
    given = (do, None, q, k, v, o, lse, *ends, None, options.dropout_seed, list(tensors))
    dq, dk, dv, *_ = attention_backward(*given, *settings, [], *needs, False)
    return dq, dk, dv


def _loop(op: str, rows: Rows, lengths: Lengths, options: Options) -> Gradients:
    """By the reference, of one packed sequence after another."""
    found = [torch.zeros_like(x) for x in (rows.q, rows.k, rows.v)]
    ends = (lengths.cu_seqlens_q.tolist(), lengths.cu_seqlens_k.tolist())
    batch, slopes = len(ends[0]) - 1, options.terms["alibi_slopes"]
    factors = _find_factors(rows, options, (batch, rows.q.shape[1], *lengths[2:]))
    for place, sides in enumerate(zip(*map(itertools.pairwise, ends), strict=True)):
        queries, keys = (slice(*side) for side in sides)
        parts = (queries, queries, keys, keys, queries, queries)
        own = Rows(*(x[:, :, part] for x, part in zip(rows, parts, strict=True)))
        terms = dict(options.terms)
        if slopes is not None and slopes.dim() == 2:
            terms["alibi_slopes"] = slopes[place : place + 1]
        if factors is not None:
            kept = factors[place : place + 1, :, : own.q.shape[2], : own.k.shape[2]]
        else:
            kept = None
        gradients = _compute(op, own, options._replace(terms=terms), kept)
        for whole, gradient, part in zip(found, gradients, (queries, keys, keys), strict=True):
            whole[:, :, part] = gradient
    return found[0], found[1], found[2]


def _compute(
    op: str, rows: Rows, options: Options, factors: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By the reference: the derivative of what the scores change while lse and o stay.

    With weights w = exp(score - lse) and delta = sum(do o), a score's gradient is
    w (do v^T - delta), which is that of sum(do (w v)) - sum(w delta).
    """
    computed = torch.promote_types(rows.q.dtype, torch.float32)
    do, q, k, v, o = (x.to(computed) for x in rows[:5])
    if factors is None:
        factors = _find_factors(rows, options, (*q.shape[:3], k.shape[2]))
    terms = part_terms(compose_terms(op, q, q.shape[0], q.shape[2], k.shape[2], **options.terms))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        weights = reference.attention_weights(
            leaves[0], leaves[1], rows.lse, scale=options.scale, **terms
        )
        kept = weights if factors is None else weights * factors
        values = kept @ leaves[2].repeat_interleave(q.shape[1] // v.shape[1], 1)
        change = (do * values).sum() - (weights.sum(-1) * (do * o).sum(-1)).sum()
        dq, dk, dv = torch.autograd.grad(change, leaves)
    return dq, dk, dv


def _find_factors(rows: Rows, options: Options, shape: tuple[int, ...]) -> torch.Tensor | None:
    """What dropout multiplies the weights of this shape by, or None without dropout."""
    if options.dropout_seed is None:
        return None
    ones = torch.ones(shape, dtype=rows.lse.dtype, device=rows.q.device)
    return dropout(ones, options.dropout_p, seed=options.dropout_seed)
