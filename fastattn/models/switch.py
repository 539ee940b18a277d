"""The Switch Transformer: a T5 whose feed-forward layers are experts, one for each token.

A router's logits are float32 whatever the model is. An expert takes `expert_capacity` tokens of a
sequence, first come first served, padding among them; to the others its layer adds nothing. With a
cache a sequence is what comes in one call, as in transformers.

Source: Fedus et al., "Switch Transformers: Scaling to Trillion Parameter Models with Simple and
Efficient Sparsity" (2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import ops
from ..nn import Linear, PlainExperts
from ..ops.core.precision import disable_autocast
from ._base import Model
from ._config import ConfigError
from ._experts import ExpertNames
from ._layers import ACTIVATIONS
from ._t5_layers import T5Block, T5Config, T5PlainFeedForward
from .t5 import T5ForConditionalGeneration, T5Model, T5PreTrained, T5Stack


@dataclass(kw_only=True)
class SwitchTransformersConfig(T5Config):
    """The fields of Hugging Face's `SwitchTransformersConfig`, with its defaults.

    The losses of routers are not added to that of labels; `fastattn.load_balancing_loss` and
    `fastattn.router_z_loss` take what hooks on the routers keep.

    Attributes:
        dense_act_fn: the activation of all feed-forward layers.
        expert_capacity: the tokens of a sequence that an expert takes.
        num_sparse_encoder_layers, num_sparse_decoder_layers: how many blocks have experts.
        scale_decoder_outputs: as in T5; transformers' model goes by tie_word_embeddings alone.
        router_jitter_noise: in training, how far from 1 what a router sees may be scaled.
    """

    model_type: ClassVar[str] = "switch_transformers"
    # What follows from other fields, and weights of losses that are not added here.
    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            "add_router_probs",
            "decoder_sparse_step",
            "encoder_sparse_step",
            "is_gated_act",
            "n_positions",
            "router_aux_loss_coef",
            "router_z_loss_coef",
        }
    )

    d_model: int = 768
    num_layers: int = 12
    num_heads: int = 12
    dense_act_fn: str = "relu"
    expert_capacity: int = 64
    num_sparse_encoder_layers: int = 3
    num_sparse_decoder_layers: int = 3
    num_experts: int = 8
    router_bias: bool = False
    router_jitter_noise: float = 0.01
    router_dtype: str = "float32"
    router_ignore_padding_tokens: bool = False

    def __post_init__(self) -> None:
        self.feed_forward_proj = self.dense_act_fn
        super().__post_init__()
        self.supports("dense_act_fn", *ACTIVATIONS)
        self.supports("router_dtype", "float32")
        self.supports("router_ignore_padding_tokens", False)
        if self.num_experts < 1:
            raise ConfigError(f"{type(self).__name__}: num_experts must be 1 or more")

    def has_experts(self, layer: int, is_decoder: bool) -> bool:
        """Whether the feed-forward layer of a block is made of experts."""
        layers = cast(int, self.num_decoder_layers) if is_decoder else self.num_layers
        sparse = self.num_sparse_decoder_layers if is_decoder else self.num_sparse_encoder_layers
        step = layers // sparse if sparse > 0 else layers
        return step == 1 or (step > 1 and layer % step == 1)


class WideLinear(Linear):
    """A linear layer that multiplies in float32 at least, whatever it holds and autocast says."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        computed = torch.promote_types(input.dtype, torch.float32)
        with disable_autocast(input):
            bias = None if self.bias is None else self.bias.to(computed)
            return ops.linear(input.to(computed), self.weight.to(computed), bias)


class SwitchRouter(nn.Module):
    """The expert of each token: the most probable one, unless it has its tokens."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__()
        self.classifier = WideLinear(config.d_model, config.num_experts, bias=config.router_bias)
        self.capacity = config.expert_capacity
        self.jitter = config.router_jitter_noise

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(weights (B, S, 1), ids (B, S, 1), logits (B, S, E)) of x (B, S, d_model).

        The id of a token that its expert does not take is E.
        """
        computed = torch.promote_types(x.dtype, torch.float32)
        seen = x.to(computed)
        if self.training and self.jitter > 0.0:
            seen = seen * torch.empty_like(seen).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
        logits = self.classifier(seen)
        probabilities = logits.softmax(-1).to(x.dtype)
        ids = probabilities.argmax(-1, keepdim=True)
        weights = probabilities.gather(-1, ids)
        experts = probabilities.shape[-1]
        # How many tokens its expert has with each token.
        counts = F.one_hot(ids.squeeze(-1), experts).cumsum(-2).gather(-1, ids)
        return weights, ids.masked_fill(counts > self.capacity, experts), logits


class SwitchFeedForward(nn.Module):
    """A router, and experts as T5's plain feed-forward layer."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__()
        self.router = SwitchRouter(config)
        self.experts = PlainExperts(
            config.num_experts,
            config.d_model,
            config.d_ff,
            activation=config.activation,
            dropout=config.dropout_rate,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, d_model) to the same."""
        weights, ids, _ = self.router(x)
        return self.experts(x, ids, weights)


class SwitchPreTrained(T5PreTrained):
    """What all parts of a Switch Transformer have in common."""

    config_class = SwitchTransformersConfig
    expert_names = ExpertNames(None, "wi", "wo")
    renamed: ClassVar[Mapping[str, str]] = {
        **T5PreTrained.renamed,
        r"\.experts\.expert_(\d+)\.": r".experts.\1.",
    }
    written_as: ClassVar[Mapping[str, str]] = {r"\.experts\.(\d+)\.": r".experts.expert_\1."}

    def initialize(self, module: nn.Module) -> None:
        """Draw the parameters as T5's, and experts by the columns of tokens."""
        factor = self.config.initializer_factor
        if isinstance(module, SwitchRouter):
            nn.init.normal_(module.classifier.weight, std=factor)
            if module.classifier.bias is not None:
                nn.init.zeros_(module.classifier.bias)
        elif isinstance(module, PlainExperts):
            for weight in (module.up_proj, module.down_proj):
                nn.init.normal_(weight, std=factor * self.config.d_model**-0.5)
        else:
            super().initialize(module)


class SwitchTransformersStack(SwitchPreTrained, T5Stack):
    """The blocks of an encoder or of a decoder, some with experts, and the norm behind them."""

    def _make_block(self, layer: int) -> T5Block:
        config = self.config
        sparse = config.has_experts(layer, self.is_decoder)
        kind: Any = SwitchFeedForward if sparse else T5PlainFeedForward
        return T5Block(
            config,
            is_decoder=self.is_decoder,
            has_table=layer == 0,
            feed_forward=("mlp", kind(config)),
        )


class SwitchTransformersModel(SwitchPreTrained, T5Model):
    """The body."""

    stack_class = SwitchTransformersStack


class SwitchTransformersForConditionalGeneration(SwitchPreTrained, T5ForConditionalGeneration):
    """A Switch Transformer with the logits of the decoder's next tokens."""

    stack_class = SwitchTransformersStack
    # Where transformers does not tie the output, it does not tie these either.
    written_apart: ClassVar[Mapping[str, str]] = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }


MODELS: tuple[type[Model], ...] = (
    SwitchTransformersForConditionalGeneration,
    SwitchTransformersModel,
)
