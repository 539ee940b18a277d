"""Attention's launchers as registered ops, and the Function around them."""

from collections.abc import Sequence
from typing import Any

import torch

from .. import reference
from .attention_terms import MaskTerm, ScoreTerm, Term
from .gradients import gradients
from .registration import launcher


@launcher("attention_forward")
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    tensors: list[torch.Tensor],
    max_seqlen_q: int,
    scale: float,
    precision: str,
    terms: str,
    floats: list[float],
    integers: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    computed = torch.promote_types(q.dtype, torch.float32)
    return _like_queries(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=computed)


@launcher("attention_backward")
def attention_backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    tensors: list[torch.Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    precision: str,
    terms: str,
    floats: list[float],
    integers: list[int],
    needs_dq: bool,
    needs_dkv: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    dq = _like_queries(q, q.shape[-1]) if needs_dq else None
    dk = _like_queries(k, k.shape[-1]) if needs_dkv else None
    return dq, dk, _like_queries(v, v.shape[-1]) if needs_dkv else None


def _like_queries(x: torch.Tensor, dim: int) -> torch.Tensor:
    """What the launchers allocate: (B, H, M, dim), or (B, M, H, dim) in memory where x is so."""
    batch, heads, length, _ = x.shape
    if heads > 1 and length > 1 and x.stride(1) < x.stride(2):
        return x.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return x.new_empty((batch, heads, length, dim))


class AttentionFunction(torch.autograd.Function):
    """(o, lse), both differentiable in q, k and v.

    `terms` are the terms themselves, for derivatives of gradients. `settings` are max_seqlen_q,
    max_seqlen_k, the scale, the precision, and the terms' description, floats and integers;
    `tensors` the terms' tensors, which get no gradient.
    """

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_k: torch.Tensor | None,
        terms: tuple[Term, ...] | None,
        settings: tuple,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        max_seqlen_q, _, *options = settings
        o, lse = attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, list(tensors), max_seqlen_q, *options
        )
        return o, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        q, k, v, cu_seqlens_q, cu_seqlens_k, ctx.terms, ctx.settings, *tensors = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple:
        q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, *tensors = ctx.saved_tensors
        nothing = (None,) * (4 + len(tensors))
        if do is None and dlse is None:
            return None, None, None, *nothing
        if do is None:
            do = torch.zeros_like(o)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        # The saved o and lse are outputs, whose history must not be walked: they are functions of
        # q, k and v.
        given = (do, dlse, q, k, v, o.detach(), lse.detach(), cu_seqlens_q, cu_seqlens_k, *tensors)
        options = (ctx.terms, ctx.settings, *needs)
        return *gradients(_backward, _backward_formula, given, options), *nothing


def _backward(*arguments: Any) -> tuple:
    """`attention_backward`, with the terms' tensors after the nine that are always there."""
    *given, _, settings, needs_dq, needs_dkv = arguments
    return attention_backward(*given[:9], given[9:], *settings, needs_dq, needs_dkv)


def _backward_formula(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    *rest: Any,
) -> tuple:
    """What attention_backward computes, in PyTorch; o and lse are functions of q, k and v here."""
    *_, terms, settings, needs_dq, needs_dkv = rest
    max_seqlen_q, max_seqlen_k, scale, *_ = settings
    options = {"scale": scale, "return_lse": True, **parted(terms)}

    def outputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        if cu_seqlens_q is None or cu_seqlens_k is None:
            return reference.attention(q, k, v, **options)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        o, lse = reference.attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
        )
        return o.transpose(0, 1)[None], lse[None]

    _, pullback, *_ = torch.func.vjp(outputs, q, k, v)
    dq, dk, dv = pullback((do, torch.zeros_like(lse) if dlse is None else dlse))
    return (dq if needs_dq else None, dk if needs_dkv else None, dv if needs_dkv else None)


def parted(terms: Sequence[Term]) -> dict[str, Any]:
    """The terms as the reference takes them."""
    return {
        "scores": [term for term in terms if isinstance(term, ScoreTerm)],
        "masks": [term for term in terms if isinstance(term, MaskTerm)],
    }
