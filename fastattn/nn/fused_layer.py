"""An encoder layer by torch's own fused function, see fused_attention.py."""

import torch
import torch.nn as nn

from .dropout import Dropout
from .fused_attention import are_plain, fused_mask, has_usual_parameters, may_fuse
from .mlp import is_only, is_only_linear
from .multihead_attention import MultiheadAttention
from .norm import LayerNorm

# What the function does the work of, or in evaluation nothing; the linear layers are asked apart.
PARTS = (MultiheadAttention, nn.LayerNorm, LayerNorm, nn.Dropout, Dropout, nn.ReLU, nn.GELU)


def fused_layer(
    layer: nn.TransformerEncoderLayer,
    x: torch.Tensor,
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """The layer applied to x, or None."""
    if not (may_fuse(layer, x) and _has_usual_parts(layer)):
        return None
    attention: MultiheadAttention = layer.self_attn  # type: ignore[assignment]
    linear1, linear2, norm1, norm2 = layer.linear1, layer.linear2, layer.norm1, layer.norm2
    parameters = (
        norm1.weight,
        norm1.bias,
        norm2.weight,
        norm2.bias,
        linear1.weight,
        linear1.bias,
        linear2.weight,
        linear2.bias,
    )
    if not (has_usual_parameters(attention, x) and are_plain(parameters, x)):
        return None
    mask = fused_mask(x, attention.num_heads, attn_mask, key_padding_mask)
    if mask is None:
        return None
    return torch._transformer_encoder_layer_fwd(  # type: ignore[attr-defined]
        x,
        attention.embed_dim,
        attention.num_heads,
        attention.in_proj_weight,
        attention.in_proj_bias,
        attention.out_proj.weight,
        attention.out_proj.bias,
        layer.activation_relu_or_gelu == 2,
        layer.norm_first,
        norm1.eps,
        *parameters,
        mask.hidden,
        mask.kind,
    )


def fuses_exactly(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether the function has the layer's activation; it takes every nn.GELU for the exact one."""
    exact = getattr(layer.activation, "approximate", "none") == "none"
    return exact and layer.activation_relu_or_gelu != 0


def _has_usual_parts(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether nothing but the classes that the function stands for would be called."""
    return (
        fuses_exactly(layer)
        and all(is_only(part, PARTS) or is_only_linear(part) for part in layer.children())
        and layer.norm1.eps == layer.norm2.eps
    )
