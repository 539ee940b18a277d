"""torch.nn's transformer layers and stacks on fastattn's kernels."""

from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..kernels import private
from .multihead_attention import MultiheadAttention
from .norm import LayerNorm
from .sublayers import (
    Function,
    activation_function,
    add_sublayers,
    attention_sublayer,
    feed_forward,
    is_gated,
)
from .tracing import one_node


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` on fastattn's kernels: same arguments and state_dict.

    Args:
        d_model, nhead, dim_feedforward, dropout, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype: as in torch.
        activation: as in torch, a function or "relu" or "gelu"; or one of our gated ones, as
            `fastattn.swiglu` or as the string "swiglu", "geglu", "reglu" or "glu". linear1 then has
            2 * dim_feedforward outputs, the gates first.

    Residual addition, dropout and norm are one kernel, the activation is in linear1's. linear1,
    linear2, the norms and the dropouts are torch's modules, whose parameters the kernels take; what
    has hooks or has been replaced is called as it is. A subclass that overrides `_sa_block` or
    `_ff_block` gets torch's forward, which calls them, with our attention.

    Example:
        >>> fastattn.nn.TransformerEncoderLayer(16, 2, 32)(torch.randn(5, 1, 16)).sum().backward()
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Function = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation_function(activation),
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device=device,
            dtype=dtype,
        )
        self.self_attn = MultiheadAttention.sharing(self.self_attn)
        if is_gated(self.activation):
            self.linear1 = nn.Linear(d_model, 2 * dim_feedforward, bias, device, dtype)

    @one_node
    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """The layer applied to src; arguments and errors as in torch and `MultiheadAttention`."""
        # What a subclass overrides is called by torch's forward, with our attention.
        if src.is_nested or _overrides(self, nn.TransformerEncoderLayer, "_sa_block", "_ff_block"):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        attend = attention_sublayer(self.self_attn, None, src_mask, src_key_padding_mask, is_causal)
        sublayers = [
            (attend, self.dropout1, self.norm1),
            (partial(feed_forward, self), self.dropout2, self.norm2),
        ]
        return add_sublayers(src, sublayers, self.norm_first)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` on fastattn's kernels: see `TransformerEncoderLayer`.

    Example:
        >>> layer = fastattn.nn.TransformerDecoderLayer(16, 2, 32)
        >>> layer(*torch.randn(2, 5, 1, 16)).sum().backward()
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Function = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation_function(activation),
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device=device,
            dtype=dtype,
        )
        self.self_attn = MultiheadAttention.sharing(self.self_attn)
        self.multihead_attn = MultiheadAttention.sharing(self.multihead_attn)
        if is_gated(self.activation):
            self.linear1 = nn.Linear(d_model, 2 * dim_feedforward, bias, device, dtype)

    @one_node
    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """The layer applied to tgt; arguments and errors as in torch and `MultiheadAttention`."""
        blocks = ("_sa_block", "_mha_block", "_ff_block")
        nested = tgt.is_nested or memory.is_nested
        if nested or _overrides(self, nn.TransformerDecoderLayer, *blocks):
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        of_self = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        of_memory = (memory_mask, memory_key_padding_mask, memory_is_causal)
        sublayers = [
            (attention_sublayer(self.self_attn, None, *of_self), self.dropout1, self.norm1),
            (
                attention_sublayer(self.multihead_attn, memory, *of_memory),
                self.dropout2,
                self.norm2,
            ),
            (partial(feed_forward, self), self.dropout3, self.norm3),
        ]
        return add_sublayers(tgt, sublayers, self.norm_first)


class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` for our layers: same arguments and state_dict.

    Where torch would go through nested tensors (evaluation without gradients, padding at the end),
    its output at the padding is 0, so it is 0 here too. With is_causal=None a mask is compared with
    the causal one as torch does, which waits for the device; under torch.compile it is not.

    Example:
        >>> layer = fastattn.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> fastattn.nn.TransformerEncoder(layer, 2)(torch.randn(1, 5, 16)).sum().backward()
    """

    @one_node
    def forward(
        self,
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        """All layers applied to src, then the norm; arguments as in torch."""
        ours = all(isinstance(layer, TransformerEncoderLayer) for layer in self.layers)
        # Padding that torch would leave out by going through nested tensors, or None.
        nested = mask is None and not is_causal and self._would_nest(src)
        left_out = src_key_padding_mask if nested else None
        if src.is_nested or not ours:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        is_causal = _is_causal(mask, is_causal, src, self.layers[0])
        output = src
        for layer in self.layers:
            output = layer(
                output,
                src_mask=mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=is_causal,
            )
        if left_out is not None:
            padding = left_out if left_out.dtype is torch.bool else left_out == float("-inf")
            if self.mask_check:
                padding = padding & (padding[:, 1:] >= padding[:, :-1]).all()
            output = output.masked_fill(padding[..., None], 0.0)
        return output if self.norm is None else self.norm(output)

    def _would_nest(self, src: torch.Tensor) -> bool:
        """Whether torch would turn src, with padding at its end, into a nested tensor."""
        first = cast(TransformerEncoderLayer, self.layers[0])
        return (
            self.use_nested_tensor
            and torch.backends.mha.get_fastpath_enabled()
            and src.dim() == 3
            and _is_evaluated(first, src)
            and not (self.mask_check and torch.compiler.is_compiling())
            and not torch.is_autocast_enabled()
        )


class TransformerDecoder(nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder` for our layers: same arguments and state_dict.

    With tgt_is_causal=None a mask is compared with the causal one as torch does, which waits for
    the device; under torch.compile it is not.

    Example:
        >>> layer = fastattn.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
        >>> fastattn.nn.TransformerDecoder(layer, 2)(*torch.randn(2, 1, 5, 16)).sum().backward()
    """

    @one_node
    def forward(
        self,
        tgt: torch.Tensor,
        memory: torch.Tensor,
        tgt_mask: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        tgt_key_padding_mask: torch.Tensor | None = None,
        memory_key_padding_mask: torch.Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> torch.Tensor:
        """All layers applied to tgt, then the norm; arguments as in torch."""
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            _is_causal(tgt_mask, tgt_is_causal, tgt, self.layers[0]),
            memory_is_causal,
        )


class Transformer(nn.Transformer):
    """`torch.nn.Transformer` of our layers: same arguments and state_dict.

    activation may also be a gated one, see `TransformerEncoderLayer`.

    Example:
        >>> model = fastattn.nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
        >>> model(torch.randn(1, 5, 16), torch.randn(1, 3, 16)).sum().backward()
    """

    forward = one_node(nn.Transformer.forward)

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Function = F.relu,
        custom_encoder: Any = None,
        custom_decoder: Any = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        layer = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps)
        options = {
            "batch_first": batch_first,
            "norm_first": norm_first,
            "bias": bias,
            "device": device,
            "dtype": dtype,
        }

        def norm() -> nn.LayerNorm:
            return LayerNorm(d_model, layer_norm_eps, bias=bias, device=device, dtype=dtype)

        # torch draws the parameters in this order.
        if custom_encoder is None:
            first = TransformerEncoderLayer(*layer, **options)
            # torch warns of layers that cannot go through nested tensors, which nobody asked for.
            nested = not norm_first and batch_first and bias and nhead % 2 == 0
            custom_encoder = TransformerEncoder(
                first,
                num_encoder_layers,
                norm(),
                enable_nested_tensor=nested and first.activation_relu_or_gelu != 0,
            )
        if custom_decoder is None:
            first = TransformerDecoderLayer(*layer, **options)
            custom_decoder = TransformerDecoder(first, num_decoder_layers, norm())
        super().__init__(
            d_model,
            nhead,
            custom_encoder=custom_encoder,
            custom_decoder=custom_decoder,
            batch_first=batch_first,
        )


def _is_evaluated(layer: nn.Module, x: torch.Tensor) -> bool:
    """Whether layer(x) is evaluation that needs no gradients."""
    if layer.training:
        return False
    tensors = (x, *layer.parameters())
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _overrides(layer: nn.Module, base: type, *names: str) -> bool:
    """Whether a subclass has its own of the methods that torch's forward calls."""
    return any(getattr(type(layer), name) is not getattr(base, name) for name in names)


def _is_causal(mask: torch.Tensor | None, hint: bool | None, x: torch.Tensor, layer: Any) -> bool:
    """The hint; without one, whether the mask is the causal one, where that can be asked."""
    if hint is not None or mask is None or torch.compiler.is_compiling():
        return bool(hint)
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        return False
    return private.is_causal_mask(mask, x, layer.self_attn.batch_first)
