"""Attention by torch's own fused function: in evaluation on a CPU, where no gradient is wanted.

torch.nn's attention is one call there, after two dozen questions that take longer than the
arithmetic of a small input. Here the same function is called, which torch.nn has to itself, after
the questions alone on which the result depends. Where an answer is unusual there is no result, and
the caller goes the long way. fused_layer.py has the same for an encoder layer.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
from torch._C import _are_functorch_transforms_active
from torch.nn.parameter import Parameter

from ..ops.core.registration import is_plain

FEW_PAIRS = 2**15
"""Up to so many pairs of a query and a key torch's fused functions are the faster ones."""

FEW_MASKED_PAIRS = 2**11
"""The same under a mask."""


class FusedMask(NamedTuple):
    """A mask as the fused functions take it.

    Attributes:
        hidden: booleans, True where a key is hidden, or None.
        kind: 0 for (L, L), 1 for (B, L), 2 for (B, heads, L, L).
    """

    hidden: torch.Tensor | None
    kind: int | None


def fused_attention(
    module: nn.MultiheadAttention,
    x: torch.Tensor,
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    need_weights: bool,
    average_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Attention of x to itself, and its weights if they are wanted, or None."""
    if not (may_fuse(module, x) and has_usual_parameters(module, x)):
        return None
    mask = fused_mask(x, module.num_heads, attn_mask, key_padding_mask, need_weights)
    if mask is None:
        return None
    return torch._native_multi_head_attention(  # type: ignore[attr-defined]
        x,
        x,
        x,
        module.embed_dim,
        module.num_heads,
        module.in_proj_weight,
        module.in_proj_bias,
        module.out_proj.weight,
        module.out_proj.bias,
        mask.hidden,
        need_weights,
        average_weights,
        mask.kind,
    )


def may_fuse(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether module and x, which is (B, L, E), are such as torch's fused functions take."""
    return (
        is_evaluated(module, x)
        and x.is_cpu
        and x.dim() == 3
        and not x.is_nested
        and is_plain((x,))
        and not _are_functorch_transforms_active()
        and torch.backends.mha.get_fastpath_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def is_evaluated(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether module(x) is evaluation that needs no gradients."""
    if module.training:
        return False
    if not torch.is_grad_enabled():
        return True
    return not (
        x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())
    )


def has_usual_parameters(module: nn.MultiheadAttention, x: torch.Tensor) -> bool:
    """Whether an attention has all that the fused functions want, and nothing else."""
    out_proj = module.out_proj
    return (
        module.batch_first
        and module.num_heads % 2 == 0
        and module.embed_dim == x.shape[2]
        and module.bias_k is None
        and not module.add_zero_attn
        and are_plain(
            (module.in_proj_weight, module.in_proj_bias, out_proj.weight, out_proj.bias), x
        )
    )


def are_plain(parameters: tuple[torch.Tensor | None, ...], x: torch.Tensor) -> bool:
    dtype = x.dtype
    return all(type(p) is Parameter and p.dtype is dtype for p in parameters)


def fused_mask(
    x: torch.Tensor,
    heads: int,
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    need_weights: bool = False,
) -> FusedMask | None:
    """The mask of a call in which x (B, L, E) attends to itself.

    None where the fused functions are the slower ones, where it does more than hiding keys, and
    where a query sees no key: there they give NaN, which only weights are in torch.nn, too.
    """
    batch, length, _ = x.shape
    pairs = batch * length * length
    if attn_mask is None:
        if key_padding_mask is None:
            return FusedMask(None, None) if need_weights or 0 < pairs <= FEW_PAIRS else None
        mask, kind, shape = key_padding_mask, 1, (batch, length)
    elif key_padding_mask is not None:
        return None
    elif attn_mask.dim() == 3:
        mask, kind, shape = attn_mask, 2, (batch * heads, length, length)
    else:
        mask, kind, shape = attn_mask, 0, (length, length)
    if mask.shape != shape:
        return None
    if need_weights:
        exact = mask.dtype is torch.bool
    else:
        exact = 0 < pairs <= FEW_MASKED_PAIRS and only_hides(mask)
    if not exact:
        return None
    hidden = (mask if mask.dtype is torch.bool else mask != 0.0).contiguous()
    # A list takes half the time of PyTorch's two ops and their result's way back.
    if not need_weights and any(map(all, hidden.view(-1, length).tolist())):
        return None
    return FusedMask(hidden.view(batch, heads, length, length) if kind == 2 else hidden, kind)


def only_hides(mask: torch.Tensor) -> bool:
    """Whether a mask is known, as on a CPU, to do nothing else: booleans, or all 0 and -inf."""
    if not mask.is_cpu or torch.compiler.is_compiling():
        return False
    if mask.dtype is torch.bool:
        return True
    return mask.is_floating_point() and not mask.masked_fill(mask == float("-inf"), 0.0).any()
