"""Decode attention's launcher as a registered op, and the Function around it."""

from typing import TYPE_CHECKING, Any

import torch

from ..reference.decode_attention import decode_attention as reference
from .attention.function import part_terms
from .attention.term_lists import find_learned, rebind_tensors
from .attention.terms import Term
from .core.lazy_imports import lazy_module
from .core.registration import kernel_op
from .decode_arguments import find_capacity

if TYPE_CHECKING:
    from ..kernels.decode import attention as kernels
else:
    kernels = lazy_module("fastattn.kernels.decode.attention")


def _flops(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> int:
    """Scores and their product with values, of all keys that there is room for."""
    _, _, block_table, _, _, _, _, value_dim, *_ = rest
    batch, heads, queries, key_dim = q.shape
    return 2 * batch * heads * queries * find_capacity(k, block_table) * (key_dim + value_dim)


@kernel_op(kernels.decode_attention_forward, flops=_flops)
def decode_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    lengths: torch.Tensor,
    block_table: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    sinks: torch.Tensor | None,
    tensors: list[torch.Tensor],
    value_dim: int,
    scale: float,
    precision: str,
    terms: str,
    floats: list[float],
    integers: list[int],
    batch_invariant: bool = False,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse), see decode_attention_forward in kernels/decode/attention.py."""
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:3], value_dim)), q.new_empty(q.shape[:3], dtype=lse_dtype)


class DecodeAttentionFunction(torch.autograd.Function):
    """decode_attention_forward. Its gradients are the reference's: nobody trains through it often.

    `settings` are the arguments of decode_attention_forward from value_dim on.
    """

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor | None,
        lengths: torch.Tensor,
        block_table: torch.Tensor | None,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
        sinks: torch.Tensor | None,
        terms: tuple[Term, ...],
        settings: tuple,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        caches = (_as_bits(k), None if v is None else _as_bits(v))
        rest = (lengths, block_table, k_scale, v_scale, sinks)
        return decode_attention_forward(q, *caches, *rest, list(tensors), *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *given, ctx.terms, ctx.settings = inputs[:10]
        ctx.save_for_backward(*given, *inputs[10:])

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor, dlse: torch.Tensor) -> tuple:
        q, k, v, lengths, block_table, k_scale, v_scale, sinks, *tensors = ctx.saved_tensors
        value_dim, scale, *_ = ctx.settings
        learned = find_learned(ctx.terms)
        # PyTorch's products round by their operands' layout, and ours must not.
        own = {"q": q.contiguous(), "k": k.contiguous(), "v": v, "sinks": sinks}
        needed = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[7])
        wanted = [name for name, need in zip(own, needed, strict=True) if need]

        def attend(variables: dict[str, torch.Tensor], parameters: list[torch.Tensor]) -> Any:
            given = {**own, **variables}
            used = list(tensors)
            for place, parameter in zip(learned, parameters, strict=True):
                used[place] = parameter
            return reference(
                given["q"],
                given["k"],
                given["v"],
                lengths,
                block_table=block_table,
                value_dim=value_dim,
                k_scale=k_scale,
                v_scale=v_scale,
                sinks=given["sinks"],
                scale=scale,
                return_lse=True,
                **part_terms(rebind_tensors(ctx.terms, used)),
            )

        _, pullback, *_ = torch.func.vjp(
            attend, {name: own[name] for name in wanted}, [tensors[place] for place in learned]
        )
        found, of_parameters = pullback((do, dlse))
        gradients: list[torch.Tensor | None] = [None] * (10 + len(tensors))
        for name, place in (("q", 0), ("k", 1), ("v", 2), ("sinks", 7)):
            gradients[place] = found.get(name)
        for place, gradient in zip(learned, of_parameters, strict=True):
            gradients[10 + place] = gradient
        return tuple(gradients)


def _as_bits(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache
