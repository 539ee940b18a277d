"""The weights that attention gave its values, for inspection."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ... import reference
from ..core.apply import call
from ..core.arguments import check_float_tensor, check_shape
from ..core.backends import use_triton
from ..core.catalog import Normal, Sample, operation
from ..core.flops import pairs
from ..core.lazy_imports import lazy_module
from ..core.precision import disable_autocast, product_precision
from ..core.registration import kernel_op
from .arguments import cast, check_qkv, compose_terms
from .bias_terms import RelativeBias
from .block_terms import BlockMask
from .function import part_terms
from .options import refuse_unknown
from .python_terms.terms import MaskFunction, ScoreFunction
from .term_lists import (
    description,
    find_learned,
    gather_arguments,
    rebind_tensors,
    resolve_tensors,
)
from .terms import MaskTerm, Term

if TYPE_CHECKING:
    from ...kernels.attention import weights as kernels
else:
    kernels = lazy_module("fastattn.kernels.attention.weights")


@kernel_op(
    kernels.attention_weights_forward,
    flops=lambda q, k, *_: 2 * pairs(q, k, None, None) * q.shape[-1],
)
def attention_weights_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    tensors: list[torch.Tensor],
    scale: float,
    precision: str,
    terms: str,
    floats: list[float],
    integers: list[int],
) -> torch.Tensor:
    """The weights, see attention_weights_forward in kernels/attention/weights.py."""
    return q.new_empty((*q.shape[:3], k.shape[2]))


class AttentionWeightsFunction(torch.autograd.Function):
    """The weights, differentiable in q, k, lse and the terms' parameters.

    As many numbers as there are weights come in, so that the gradients may be the reference's.
    """

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        lse: torch.Tensor,
        terms: tuple[Term, ...],
        settings: tuple,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        return attention_weights_forward(q, k, lse, list(tensors), *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        q, k, lse, ctx.terms, ctx.settings, *tensors = inputs
        ctx.save_for_backward(q, k, lse, *tensors)

    @staticmethod
    def backward(ctx: Any, dweights: torch.Tensor) -> tuple:
        q, k, lse, *tensors = ctx.saved_tensors
        # PyTorch's products round by their operands' layout, and ours must not.
        q, k = q.contiguous(), k.contiguous()
        terms, (scale, *_) = ctx.terms, ctx.settings
        learned = find_learned(terms)

        def weights(
            q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, *parameters: torch.Tensor
        ) -> torch.Tensor:
            own = list(tensors)
            for place, parameter in zip(learned, parameters, strict=True):
                own[place] = parameter
            composed = part_terms(rebind_tensors(terms, own))
            return reference.attention_weights(q, k, lse, scale=scale, **composed)

        _, pullback, *_ = torch.func.vjp(weights, q, k, lse, *(tensors[place] for place in learned))
        dq, dk, dlse, *found = pullback(dweights)
        parameters: list[torch.Tensor | None] = [None] * len(tensors)
        for place, gradient in zip(learned, found, strict=True):
            parameters[place] = gradient
        return dq, dk, dlse, None, None, *parameters


def _reference_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float | None = None,
    **terms: Any,
) -> torch.Tensor:
    """`attention_weights` by the reference."""
    composed = compose_terms("attention_weights", q, q.shape[0], q.shape[2], k.shape[2], **terms)
    return reference.attention_weights(q, k, lse, scale=scale, **part_terms(composed))


@operation(
    reference=_reference_weights,
    samples=(
        Sample(
            "smallest",
            q=(1, 2, 3, 4),
            k=(1, 1, 5, 4),
            lse=Normal((1, 2, 3), torch.float32, mean=2.0),
            causal=True,
        ),
        Sample(
            "several blocks",
            q=(2, 4, 40, 48),
            k=(2, 2, 70, 48),
            lse=Normal((2, 4, 40), torch.float32, mean=4.0),
            causal=True,
            window=[30, 2],
            softcap=3.0,
        ),
        Sample("no keys", q=(1, 2, 9, 16), k=(1, 2, 0, 16), lse=Normal((1, 2, 9), torch.float32)),
    ),
    own_gradients=False,
)
def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool = False,
    window: int | Sequence[int | None] | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    kv_lengths: torch.Tensor | None = None,
    document_ids: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    block_mask: BlockMask | None = None,
    score_mods: Sequence[Term | ScoreFunction] | None = (),
    mask_mod: MaskTerm | MaskFunction | None = None,
    **unknown: Any,
) -> torch.Tensor:
    """The weights exp(score - lse) of `attention`, all of them, for inspection.

    With the lse that `attention` returned for the same arguments a query's weights sum to 1, or
    with sinks to less. Dropout is not in them. A query whose lse is -inf has none.

    Args:
        q: (B, H, M, Dk), as in `attention`.
        k: (B, Hkv, N, Dk).
        lse: (B, H, M), float32, or float64 with that.
        causal, window, mask, bias, alibi_slopes, relative_bias, softcap, scale, kv_lengths,
            document_ids, block_mask, score_mods, mask_mod: as in `attention`.

    Returns:
        (B, H, M, N) in the dtype of q, differentiable in q, k, lse and what terms learn.

    Raises:
        TypeError: an argument is no tensor or of an unsupported dtype.
        ValueError: a shape, device or value does not fit.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 8, 16)
        >>> o, lse = fastattn.attention(q, k, v, return_lse=True)
        >>> torch.testing.assert_close(fastattn.attention_weights(q, k, lse) @ v, o)
    """
    op = "attention_weights"
    if unknown:
        refuse_unknown(op, unknown)
    check_qkv(op, q, k, k, "BHND")
    check_float_tensor(op, "lse", lse, like=q)
    check_shape(op, "lse", lse, q.shape[:3])
    q, k, _ = cast(op, q, k, k)
    terms = compose_terms(
        op,
        q,
        q.shape[0],
        q.shape[2],
        k.shape[2],
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
    # The gradients are the reference's; a graph may as well have all of it.
    traced = torch.compiler.is_compiling() and torch.is_grad_enabled()
    if traced or not use_triton(q):
        with disable_autocast(q):
            return reference.attention_weights(q, k, lse, scale=scale, **part_terms(terms))
    terms = resolve_tensors(terms)
    tensors, floats, integers = gather_arguments(terms)
    settings = (
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        product_precision(q.dtype),
        description(terms, q.dtype),
        floats,
        integers,
    )
    return call(AttentionWeightsFunction, q, k, lse, tuple(terms), settings, *tensors)
