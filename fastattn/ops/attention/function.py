"""Attention's launchers as registered ops, and the Function around them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_compiling

from ... import reference
from ..core.flops import pairs
from ..core.gradients import gradients
from ..core.lazy_imports import lazy_module
from ..core.registration import kernel_op
from .term_lists import rebind_tensors
from .terms import MaskTerm, ScoreTerm, Term

if TYPE_CHECKING:
    from ...kernels.attention import backward, forward
else:
    backward = lazy_module("fastattn.kernels.attention.backward")
    forward = lazy_module("fastattn.kernels.attention.forward")


def _forward_flops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: Any, cu_k: Any, *_: Any
) -> int:
    """Scores and their product with v."""
    return 2 * pairs(q, k, cu_q, cu_k) * (q.shape[-1] + v.shape[-1])


def _backward_flops(*args: Any) -> int:
    """The scores again, the gradient of the weights, and the products of dq, dk and dv.

    That is what PyTorch counts. Two kernels, without atomics, compute the first two twice.
    """
    _, _, q, k, v, _, _, cu_q, cu_k, *_, learned, needs_dq, needs_dkv, _ = args
    dk, dv = q.shape[-1], v.shape[-1]
    if not (learned or needs_dq or needs_dkv):
        return 0
    columns = dk + dv + (dk if needs_dq else 0) + (dk + dv if needs_dkv else 0)
    return 2 * pairs(q, k, cu_q, cu_k) * columns


@kernel_op(forward.attention_forward, flops=_forward_flops)
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    tensors: list[torch.Tensor],
    max_seqlen_q: int,
    scale: float,
    dropout_p: float,
    precision: str,
    terms: str,
    floats: list[float],
    integers: list[int],
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse), see attention_forward in kernels/attention/forward.py."""
    computed = torch.promote_types(q.dtype, torch.float32)
    return _like_queries(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=computed)


@kernel_op(backward.attention_backward, flops=_backward_flops)
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
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    tensors: list[torch.Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    dropout_p: float,
    precision: str,
    terms: str,
    floats: list[float],
    integers: list[int],
    batch_invariant: bool,
    learned: list[int],
    needs_dq: bool,
    needs_dkv: bool,
    needs_dsinks: bool,
) -> tuple[
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
    list[torch.Tensor],
]:
    """(dq, dk, dv, dsinks, those of learned terms), see kernels/attention/backward.py."""
    dq = _like_queries(q, q.shape[-1]) if needs_dq else None
    dk = _like_queries(k, k.shape[-1]) if needs_dkv else None
    dv = _like_queries(v, v.shape[-1]) if needs_dkv else None
    dsinks = torch.empty_like(sinks) if needs_dsinks and sinks is not None else None
    return dq, dk, dv, dsinks, [tensors[place].new_empty(tensors[place].shape) for place in learned]


def _like_queries(x: torch.Tensor, dim: int) -> torch.Tensor:
    """What the launchers allocate: (B, H, M, dim), or (B, M, H, dim) in memory where x is so."""
    batch, heads, length, _ = x.shape
    if heads > 1 and length > 1 and x.stride(1) < x.stride(2):
        return x.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return x.new_empty((batch, heads, length, dim))


FIRST_TERM = 9
"""The place of the terms' tensors among the inputs of AttentionFunction."""


class AttentionFunction(torch.autograd.Function):
    """(o, lse), both differentiable in q, k, v, the sinks and the terms' parameters.

    `terms` are the terms themselves, for derivatives of gradients. `settings` are max_seqlen_q,
    max_seqlen_k, the scale, dropout's probability, the precision, the terms' description, floats
    and integers, whether bits may not depend on the batch, and the places of those among the
    terms' `tensors` that get a gradient.
    """

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_k: torch.Tensor | None,
        sinks: torch.Tensor | None,
        seed: torch.Tensor | None,
        terms: tuple[Term, ...] | None,
        settings: tuple,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        max_seqlen_q, _, *options, _ = settings
        o, lse = attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, seed, list(tensors), max_seqlen_q, *options
        )
        return o, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *saved, ctx.terms, ctx.settings = inputs[:FIRST_TERM]
        ctx.save_for_backward(*saved, *output, *inputs[FIRST_TERM:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple:
        q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, seed, o, lse, *tensors = ctx.saved_tensors
        result: list[torch.Tensor | None] = [None] * (FIRST_TERM + len(tensors))
        if do is None and dlse is None:
            return tuple(result)
        if do is None:
            do = torch.zeros_like(o)
        needed = ctx.needs_input_grad
        learned = [place for place in ctx.settings[-1] if needed[FIRST_TERM + place]]
        needs = (needed[0], needed[1] or needed[2], needed[5])
        if not is_compiling():
            # The saved o and lse are outputs, whose history must not be walked: they are functions
            # of the inputs. Dynamo has no history, and after a detach torch.export(strict=True)
            # takes no length of the forward into the backward.
            o, lse = o.detach(), lse.detach()
        given = (do, dlse, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k)
        options = (ctx.terms, ctx.settings[:-1], learned, *needs)
        found = gradients(_backward, _backward_formula, (*given, sinks, seed, *tensors), options)
        result[0], result[1], result[2], result[5], *parameters = found
        for place, gradient in zip(learned, parameters, strict=True):
            result[FIRST_TERM + place] = gradient
        return tuple(result)


def _backward(*arguments: Any) -> tuple:
    """`attention_backward`, with the terms' tensors after the eleven that are always there."""
    *given, _, settings, learned, needs_dq, needs_dkv, needs_dsinks = arguments
    *first, parameters = attention_backward(
        *given[:11], given[11:], *settings, learned, needs_dq, needs_dkv, needs_dsinks
    )
    return *first, *parameters


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
    sinks: torch.Tensor | None,
    seed: torch.Tensor | None,
    *rest: Any,
) -> tuple:
    """What attention_backward computes, in PyTorch; o and lse are functions of the inputs here."""
    *tensors, terms, settings, learned, needs_dq, needs_dkv, needs_dsinks = rest
    max_seqlen_q, max_seqlen_k, scale, dropout_p, *_ = settings
    options = {
        "scale": scale,
        "dropout_p": dropout_p,
        "dropout_seed": seed,
        "return_lse": True,
    }
    given_sinks = [] if sinks is None else [sinks]

    def outputs(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: list[torch.Tensor],
        parameters: list[torch.Tensor],
    ) -> Any:
        own = list(tensors)
        for place, parameter in zip(learned, parameters, strict=True):
            own[place] = parameter
        composed = {**options, **part_terms(rebind_tensors(terms, own))}
        if sinks:
            composed["sinks"] = sinks[0]
        if cu_seqlens_q is None or cu_seqlens_k is None:
            return reference.attention(q, k, v, **composed)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        o, lse = reference.attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **composed
        )
        return o.transpose(0, 1)[None], lse[None]

    inputs = (q, k, v, given_sinks, [tensors[place] for place in learned])
    _, pullback, *_ = torch.func.vjp(outputs, *inputs)
    dq, dk, dv, dsinks, parameters = pullback((do, torch.zeros_like(lse) if dlse is None else dlse))
    return (
        dq if needs_dq else None,
        dk if needs_dkv else None,
        dv if needs_dkv else None,
        dsinks[0] if needs_dsinks else None,
        *parameters,
    )


def part_terms(terms: Sequence[Term]) -> dict[str, Any]:
    """The terms as the reference takes them."""
    return {
        "scores": [term for term in terms if isinstance(term, ScoreTerm)],
        "masks": [term for term in terms if isinstance(term, MaskTerm)],
    }
