"""torch's scaled_dot_product_attention, on fastattn's attention."""

from collections.abc import Sequence

import torch

from .. import ops
from ..ops.attention.terms import CausalFromFirst, Term
from ..ops.core.backends import use_triton
from ..ops.core.tensor_kinds import is_plain
from ..reference import torch_functions as F
from .choice import any_is_foreign, is_for_torch


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: see `fastattn.attention`.

    Args:
        query: (..., H, L, E), or (L, E).
        key: (..., Hkv, S, E).
        value: (..., Hkv, S, Ev).
        attn_mask: broadcasts to (..., H, L, S); booleans, True where a query sees a key, or floats
            that are added to the scores.
        dropout_p: in [0, 1].
        is_causal: query i sees the keys up to key i, whatever L and S; excludes attn_mask.
        scale: E^-0.5 if None.
        enable_gqa: allow Hkv to be a divisor of H.

    Leading dimensions broadcast. A mask of numbers gets its gradient. Dropout's random numbers in
    the kernels are not those of PyTorch's own function, but follow `torch.manual_seed` as it does.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 16)
        >>> fastattn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([1, 2, 5, 16])
    """
    name = "scaled_dot_product_attention"
    if attn_mask is not None and is_causal:
        raise ValueError(f"{name}: attn_mask and is_causal exclude each other")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name}: dropout_p must be in [0, 1], got {dropout_p}")
    # Where nothing is kept no scale makes up for it; and without kernels PyTorch's own random
    # numbers are cheaper than ours.
    for_torch = dropout_p == 1.0 or (dropout_p > 0.0 and not use_triton(query))
    for_torch = for_torch or any_is_foreign(query, key, value, attn_mask)
    if for_torch or (attn_mask is None and _is_torchs_too(query, key, value, is_causal)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise ValueError(
            f"{name}: query, key and value must have 2 dimensions or more, got the shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    # With enable_gqa the numbers of heads may differ.
    own = 3 if enable_gqa else 2
    leading = _broadcast_shapes(name, query.shape[:-own], key.shape[:-own], value.shape[:-own])
    query, key, value = (
        x if x.shape[:-own] == leading else x.expand(*leading, *x.shape[-own:])
        for x in (query, key, value)
    )
    keys = key.shape[-2]
    q, k, v = (x[(None,) * (4 - x.dim())] for x in (query, key, value))
    mods: list[Term] = [CausalFromFirst()] if is_causal else []
    mask = bias = None
    if attn_mask is not None:
        wanted = (*query.shape[:-1], keys)
        if _broadcast_shapes(name, wanted, attn_mask.shape) != wanted:
            raise ValueError(
                f"{name}: attn_mask must broadcast to {wanted}, got {tuple(attn_mask.shape)}"
            )
        if attn_mask.dtype is torch.bool:
            mask = attn_mask
        elif attn_mask.is_floating_point():
            bias = attn_mask
        else:
            raise TypeError(f"{name}: attn_mask must be boolean or float, got {attn_mask.dtype}")
    o = ops.attention(
        q, k, v, mask=mask, bias=bias, dropout_p=dropout_p, scale=scale, score_mods=mods
    )
    return o.reshape(*query.shape[:-1], value.shape[-1])


def _is_torchs_too(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool
) -> bool:
    """Whether torch's function, faster without kernels, gives what ours does without a mask.

    It has no second derivative, errors of its own, and NaN for NaN in keys that no query sees.
    """
    if not (is_plain((query, key, value)) and is_for_torch(query, key, value)):
        return False
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        return False
    q, k = query.shape, key.shape
    if len(q) < 3 or k != value.shape or q[:-2] != k[:-2] or q[-1] != k[-1]:
        return False
    if k[-2] == 0 or not query.is_floating_point():
        return False
    return not is_causal or q[-2] >= k[-2]


def _broadcast_shapes(name: str, *shapes: Sequence[int]) -> tuple[int, ...]:
    """What leading dimensions or masks broadcast to."""
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        shown = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name}: shapes must broadcast, got {shown}") from error
