"""Experts of Hugging Face's models by `fastattn.mixture`: `experts_implementation="fastattn"`."""

from typing import Any

import torch

from ...nn.mlp import are_readable
from ...ops import grouped_linear, mixture
from ...reference.mixture import order_by_expert
from .private import gate_of_experts, has_gate_of

ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "Sigmoid": "sigmoid",
}
"""What `fastattn.mixture` calls activations, by their class: no numbers are looked at, so that a
compiled model stays one graph."""


def experts_forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts of a layer, as transformers' `ExpertsInterface` asks for it.

    Experts whose gate is an activation that `fastattn.mixture` knows, and those of gpt-oss, are one
    call of it. Others are two grouped products with the model's own gate or activation in between,
    and its own norm behind them. Where parameters are quantized, the model's own forward computes.

    Args:
        self: the model's experts.
        hidden_states: (T, H).
        top_k_index: (T, K). Under expert parallelism the number of experts itself stands for one
            that is not here, which adds nothing.
        top_k_weights: (T, K).

    Returns:
        (T, H), of hidden_states' dtype.
    """
    experts: Any = self
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    up_bias = down_bias = None
    if experts.has_bias:
        up_bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        down_bias = experts.down_proj_bias
    down = experts.down_proj
    if not are_readable(up, down, up_bias, down_bias):
        return type(experts).forward.__wrapped__(experts, hidden_states, top_k_index, top_k_weights)
    formula = _find_formula(experts)
    ids = top_k_index.to(torch.int64)
    if formula is not None and not experts.has_post_expert_norm:
        return mixture(
            hidden_states,
            ids,
            top_k_weights,
            up,
            down,
            up_bias,
            down_bias,
            transposed=experts.is_transposed,
            **formula,
        )
    order = order_by_expert(ids, down.shape[0])
    offsets, transposed = order.offsets, experts.is_transposed
    rows = hidden_states[order.tokens.long()]
    h = grouped_linear(rows, up, offsets, up_bias, transposed=transposed)
    a = gate_of_experts(experts, h) if experts.has_gate else experts.act_fn(h)
    y = grouped_linear(a, down, offsets, down_bias, transposed=transposed)
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    known = (order.places < offsets[-1])[..., None]
    picked = torch.where(known, y[order.places.long()], 0.0)
    scaled = torch.where(known, picked * top_k_weights[..., None], 0.0)
    return scaled.sum(1).to(hidden_states.dtype)


def _find_formula(experts: Any) -> dict[str, Any] | None:
    """What `mixture` calls the gate of experts, or None where it is another one."""
    if not experts.has_gate:
        return None
    if has_gate_of(experts, None):
        activation = ACTIVATIONS.get(type(experts.act_fn).__name__)
        if activation is None or not experts.is_concatenated:
            return None
        return {"activation": activation, "interleaved": False}
    if has_gate_of(experts, "GptOssExperts"):
        return {
            "interleaved": not experts.is_concatenated,
            "limit": float(experts.limit),
            "alpha": float(experts.alpha),
            "up_offset": 1.0,
        }
    return None
