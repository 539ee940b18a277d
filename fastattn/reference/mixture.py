"""A mixture of experts in plain PyTorch, and the order of rows that both backends use."""

from typing import NamedTuple

import torch

from .gated_activation import geglu, glu, reglu, swiglu
from .grouped_linear import grouped_linear


class ExpertOrder(NamedTuple):
    """The pairs of a token and an expert, sorted by expert: row r of M = T K.

    Those of no expert come last. All are of int32.
    """

    offsets: torch.Tensor
    """(E + 1,): where each expert's rows begin, and the last ends."""
    slots: torch.Tensor
    """(M,): which of the M pairs row r is, counted token by token."""
    tokens: torch.Tensor
    """(M,): the token of row r."""
    places: torch.Tensor
    """(T, K): the row of each pair."""


def order_by_expert(ids: torch.Tensor, experts: int) -> ExpertOrder:
    """The order of ids (T, K), in which anything outside of [0, experts) is no expert.

    The pairs of one expert stay in the order of their tokens. Nothing waits for the host.
    """
    flat = ids.reshape(-1)
    # A sort takes as long as its keys are wide.
    narrow = torch.int16 if experts < 2**15 else torch.int32
    known = (flat >= 0) & (flat < experts)
    keys, order = torch.where(known, flat, experts).to(narrow).sort(stable=True)
    numbers = torch.arange(experts + 1, dtype=narrow, device=ids.device)
    offsets = torch.searchsorted(keys, numbers, out_int32=True)
    rows = torch.arange(flat.shape[0], dtype=torch.int32, device=ids.device)
    places = torch.zeros_like(rows).scatter(0, order, rows)
    slots = order.to(torch.int32)
    tokens = torch.div(slots, max(ids.shape[1], 1), rounding_mode="floor")
    return ExpertOrder(offsets, slots, tokens, places.view(ids.shape))


def mixture(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w_gate_up: torch.Tensor,
    w_down: torch.Tensor,
    b_gate_up: torch.Tensor | None = None,
    b_down: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    recompute: bool = False,
) -> torch.Tensor:
    """The weighted sum of each token's experts; what is saved is PyTorch's affair."""
    order = order_by_expert(ids.reshape(-1, ids.shape[-1]), w_gate_up.shape[0])
    rows = x.flatten(0, -2)[order.tokens.long()]
    h = grouped_linear(rows, w_gate_up, order.offsets, b_gate_up, transposed=transposed)
    if activation == "silu":
        a = swiglu(h, interleaved=interleaved, limit=limit, alpha=alpha, up_offset=up_offset)
    elif activation == "relu":
        a = reglu(h, interleaved=interleaved)
    elif activation == "sigmoid":
        a = glu(h, interleaved=interleaved)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        a = geglu(h, interleaved=interleaved, approximate=approximate)
    y = grouped_linear(a, w_down, order.offsets, b_down, transposed=transposed)
    # What lies in rows of no expert may be infinite, which times 0 would be NaN.
    known = (order.places < order.offsets[-1])[..., None]
    picked = torch.where(known, y[order.places.long()], 0.0)
    computed = torch.promote_types(x.dtype, torch.float32)
    scale = weights.reshape(order.places.shape).to(computed)[..., None]
    scaled = torch.where(known, picked.to(computed) * scale, 0.0)
    return scaled.sum(1).to(x.dtype).view(*x.shape[:-1], y.shape[1])
