"""Llama, and what differs from it by configuration alone: Mistral, Qwen2 and Qwen3.

Sources: Touvron et al., "LLaMA" (2023); Jiang et al., "Mistral 7B" (2023); Qwen Team, "Qwen2
Technical Report" (2024) and "Qwen3 Technical Report" (2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch.nn as nn

from ..nn import Attention, GatedMLP, TransformerBlock
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
from ._norms import Casting, FamilyRMSNorm
from ._rotary import modernize_rope, rotary_embedding


@dataclass(kw_only=True)
class LlamaConfig(Config):
    """The shape of a Llama; names and defaults are those of transformers' LlamaConfig.

    Grouped-query attention is num_key_value_heads below num_attention_heads. rope_parameters are
    as in `fastattn.nn.RotaryEmbedding`, with "rope_theta" beside them.
    """

    model_type: ClassVar[str] = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    pretraining_tp: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.supports("hidden_act", *GATED)
        self.supports("pretraining_tp", 1)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    @classmethod
    def modernize(cls, values: dict[str, Any]) -> dict[str, Any]:
        return modernize_rope(values)

    def window(self, layer: int) -> int | None:
        """How many keys before its own a query of this layer sees; None for all."""
        return None

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalized."""
        return False

    @property
    def casting(self) -> Casting:
        """When norms round, as in `fastattn.rms_norm`."""
        return "llama"

    @property
    def sinks(self) -> bool:
        """Whether heads have a logit that takes its share of the softmax."""
        return False

    @property
    def biases(self) -> tuple[bool, bool]:
        """Whether the projections to q, k and v, and the one from the heads, have biases."""
        return self.attention_bias, self.attention_bias


@dataclass(kw_only=True)
class MistralConfig(LlamaConfig):
    """A Llama in which a query sees sliding_window keys, its own among them; None for all."""

    model_type: ClassVar[str] = "mistral"

    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 4096 * 32
    sliding_window: int | None = 4096

    def window(self, layer: int) -> int | None:
        return None if self.sliding_window is None else self.sliding_window - 1


@dataclass(kw_only=True)
class Qwen2Config(LlamaConfig):
    """A Llama with biases of q, k and v, and with sliding windows in some layers if that is wanted.

    layer_types has "full_attention" or "sliding_attention" for each layer. If it is None, those
    from max_window_layers on have windows where use_sliding_window says so.
    """

    model_type: ClassVar[str] = "qwen2"

    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_sliding_window:
            self.sliding_window = None
        if self.layer_types is None:
            windows = self.sliding_window is not None
            self.layer_types = [
                "sliding_attention"
                if windows and layer >= self.max_window_layers
                else "full_attention"
                for layer in range(self.num_hidden_layers)
            ]
        check_layer_types(self)

    def window(self, layer: int) -> int | None:
        return find_window(self, layer)

    @property
    def biases(self) -> tuple[bool, bool]:
        return True, False


@dataclass(kw_only=True)
class Qwen3Config(Qwen2Config):
    """A Qwen2 with norms of queries and keys in place of biases."""

    model_type: ClassVar[str] = "qwen3"

    head_dim: int | None = 128

    @property
    def qk_norm(self) -> bool:
        return True

    @property
    def biases(self) -> tuple[bool, bool]:
        return self.attention_bias, self.attention_bias


class LlamaModel(RotaryDecoder):
    """Embedding, blocks and the last norm of a Llama."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        assert config.head_dim is not None
        columns = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, columns, config.pad_token_id)
        self.layers = nn.ModuleList(
            self._block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = FamilyRMSNorm(columns, config.rms_norm_eps, casting=config.casting)
        self.rotary_emb = rotary_embedding(
            config.rope_parameters, config.head_dim, config.max_position_embeddings
        )
        self.finish()

    @classmethod
    def _block(cls, config: LlamaConfig, layer: int) -> TransformerBlock:
        columns = config.hidden_size
        bias, out_bias = config.biases
        norm = partial(FamilyRMSNorm, eps=config.rms_norm_eps, casting=config.casting)
        attention = Attention(
            columns,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            qk_norm=norm if config.qk_norm else None,
            causal=True,
            window=config.window(layer),
            sinks=config.sinks,
            bias=bias,
            out_bias=out_bias,
            dropout=config.attention_dropout,
        )
        return TransformerBlock(attention, cls._mlp(config, layer), partial(norm, columns))

    @classmethod
    def _mlp(cls, config: Any, layer: int) -> nn.Module:
        """The feed-forward layer of a block."""
        return GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            activation=GATED[config.hidden_act],
            bias=config.mlp_bias,
        )


class LlamaForCausalLM(CausalLM):
    """A Llama with the logits of the next token."""

    config_class = LlamaConfig
    body_class = LlamaModel
    base_prefix = "model"
    tied: ClassVar[Mapping[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    ignored = LlamaModel.ignored

    model: LlamaModel


class LlamaForSequenceClassification(SequenceClassifier):
    """A Llama with one answer for a sequence, or a reward."""

    config_class = LlamaConfig
    body_class = LlamaModel
    base_prefix = "model"
    ignored = LlamaModel.ignored

    model: LlamaModel


class MistralModel(LlamaModel):
    """A Llama with sliding windows."""

    config_class = MistralConfig


class MistralForCausalLM(LlamaForCausalLM):
    """A Mistral with the logits of the next token."""

    config_class = MistralConfig
    body_class = MistralModel


class MistralForSequenceClassification(LlamaForSequenceClassification):
    """A Mistral with one answer for a sequence, or a reward."""

    config_class = MistralConfig
    body_class = MistralModel


class Qwen2Model(LlamaModel):
    """A Llama with biases of queries, keys and values."""

    config_class = Qwen2Config


class Qwen2ForCausalLM(LlamaForCausalLM):
    """A Qwen2 with the logits of the next token."""

    config_class = Qwen2Config
    body_class = Qwen2Model


class Qwen2ForSequenceClassification(LlamaForSequenceClassification):
    """A Qwen2 with one answer for a sequence, or a reward."""

    config_class = Qwen2Config
    body_class = Qwen2Model


class Qwen3Model(LlamaModel):
    """A Llama with norms of queries and keys."""

    config_class = Qwen3Config


class Qwen3ForCausalLM(LlamaForCausalLM):
    """A Qwen3 with the logits of the next token."""

    config_class = Qwen3Config
    body_class = Qwen3Model


class Qwen3ForSequenceClassification(LlamaForSequenceClassification):
    """A Qwen3 with one answer for a sequence, or a reward."""

    config_class = Qwen3Config
    body_class = Qwen3Model


MODELS: tuple[type[Model], ...] = (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralModel,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3Model,
)
