"""Gemma and Gemma 2.

Both scale the embedding by the root of its width, and multiply norms by 1 + weight. Gemma 2 has
norms before and after every layer, soft caps of scores and of logits, and windows in every other
layer.

Sources: Gemma Team, "Gemma: Open Models Based on Gemini Research and Technology" (2024) and
"Gemma 2: Improving Open Language Models at a Practical Size" (2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn as nn

from ..nn import Attention, GatedMLP, TransformerBlock
from ..nn.block import Order
from ._base import Model
from ._config import Config
from ._decoder import (
    GATED,
    CausalLM,
    RotaryDecoder,
    SequenceClassifier,
    check_layer_types,
    find_window,
)
from ._norms import FamilyRMSNorm
from ._rotary import modernize_rope, rotary_embedding


@dataclass(kw_only=True)
class GemmaConfig(Config):
    """The shape of a Gemma; names and defaults are those of transformers' GemmaConfig."""

    model_type: ClassVar[str] = "gemma"
    order: ClassVar[Order] = "pre"

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_bidirectional_attention: bool | None = None
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.supports("hidden_act", *GATED)
        self.supports("use_bidirectional_attention", None, False)

    @classmethod
    def modernize(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = modernize_rope(values)
        # The first release says "gelu", or nothing under another name, and means the tanh one.
        if values.get("hidden_act") == "gelu":
            values["hidden_act"] = "gelu_pytorch_tanh"
        if values.get("hidden_activation") == "gelu_pytorch_tanh":
            values["hidden_act"] = values.pop("hidden_activation")
        return values

    @property
    def activation(self) -> Any:
        """What `fastattn.nn.GatedMLP` calls the activation."""
        return GATED[self.hidden_act]

    def attention(self, layer: int) -> dict[str, Any]:
        """What a layer's scores have beside the causal mask."""
        return {}

    @property
    def logits_softcap(self) -> float | None:
        """The largest logit there can be, or None."""
        return None


@dataclass(kw_only=True)
class Gemma2Config(GemmaConfig):
    """The shape of a Gemma 2; names and defaults are those of transformers' Gemma2Config.

    layer_types has "full_attention" or "sliding_attention" for each layer; if it is None, the first
    layer and every other one slide.
    """

    model_type: ClassVar[str] = "gemma2"
    order: ClassVar[Order] = "sandwich"

    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    hidden_activation: str = "gelu_pytorch_tanh"
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.supports("hidden_activation", *GATED)
        if self.layer_types is None:
            kinds = ("sliding_attention", "full_attention")
            self.layer_types = [kinds[layer % 2] for layer in range(self.num_hidden_layers)]
        check_layer_types(self)

    @classmethod
    def modernize(cls, values: dict[str, Any]) -> dict[str, Any]:
        return modernize_rope(values)

    @property
    def activation(self) -> Any:
        return GATED[self.hidden_activation]

    def attention(self, layer: int) -> dict[str, Any]:
        return {
            "window": find_window(self, layer),
            "softcap": self.attn_logit_softcapping,
            "scale": self.query_pre_attn_scalar**-0.5,
        }

    @property
    def logits_softcap(self) -> float | None:
        return self.final_logit_softcapping


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by the root of their length.

    The factor is rounded to the weight's dtype first, as the models were trained.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., C) of tokens (...)."""
        scale = torch.full((), self.embedding_dim**0.5, device=self.weight.device)
        return super().forward(input) * scale.to(self.weight.dtype)


class GemmaModel(RotaryDecoder):
    """Embedding, blocks and the last norm of a Gemma."""

    config_class = GemmaConfig

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config)
        columns = config.hidden_size
        self.embed_tokens = ScaledEmbedding(config.vocab_size, columns, config.pad_token_id)
        self.layers = nn.ModuleList(
            self._block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = self._norm(config)
        self.rotary_emb = rotary_embedding(
            config.rope_parameters, config.head_dim, config.max_position_embeddings
        )
        self.finish()

    @staticmethod
    def _norm(config: GemmaConfig) -> FamilyRMSNorm:
        return FamilyRMSNorm(
            config.hidden_size, config.rms_norm_eps, weight_offset=1.0, casting="gemma"
        )

    @classmethod
    def _block(cls, config: GemmaConfig, layer: int) -> TransformerBlock:
        columns = config.hidden_size
        attention = Attention(
            columns,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            causal=True,
            bias=config.attention_bias,
            dropout=config.attention_dropout,
            **config.attention(layer),
        )
        mlp = GatedMLP(columns, config.intermediate_size, activation=config.activation)
        return TransformerBlock(attention, mlp, partial(cls._norm, config), order=config.order)


class GemmaForCausalLM(CausalLM):
    """A Gemma with the logits of the next token."""

    config_class = GemmaConfig
    body_class = GemmaModel
    base_prefix = "model"
    tied: ClassVar[Mapping[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    ignored = GemmaModel.ignored

    model: GemmaModel

    @property
    def softcap(self) -> float | None:
        return self.config.logits_softcap


class GemmaForSequenceClassification(SequenceClassifier):
    """A Gemma with one answer for a sequence, or a reward."""

    config_class = GemmaConfig
    body_class = GemmaModel
    base_prefix = "model"
    ignored = GemmaModel.ignored

    model: GemmaModel


class Gemma2Model(GemmaModel):
    """Embedding, blocks and the last norm of a Gemma 2."""

    config_class = Gemma2Config


class Gemma2ForCausalLM(GemmaForCausalLM):
    """A Gemma 2 with the logits of the next token."""

    config_class = Gemma2Config
    body_class = Gemma2Model


class Gemma2ForSequenceClassification(GemmaForSequenceClassification):
    """A Gemma 2 with one answer for a sequence, or a reward."""

    config_class = Gemma2Config
    body_class = Gemma2Model


MODELS: tuple[type[Model], ...] = (
    GemmaForCausalLM,
    GemmaForSequenceClassification,
    GemmaModel,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2Model,
)
