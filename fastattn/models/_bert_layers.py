"""What BERT is made of: the configuration, the embeddings, and both layers of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn

from ..nn import Dropout, LayerNorm, LearnedPositions, Linear, add_norm
from ..ops.linear import Activation
from ._arguments import embed
from ._config import Config
from ._layers import ACTIVATIONS, activate, attend, find_head_dim


@dataclass(kw_only=True)
class BertConfig(Config):
    """The fields of Hugging Face's `BertConfig` that a model depends on, with its defaults."""

    model_type: ClassVar[str] = "bert"
    # What published configurations have and nothing reads.
    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            "directionality",
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
        }
    )

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.supports("hidden_act", *ACTIVATIONS)
        self.supports("position_embedding_type", "absolute")
        find_head_dim(self, "hidden_size", "num_attention_heads")


class BertEmbeddings(nn.Module):
    """The sum of the embeddings of tokens, of segments and of positions, normalized."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        columns = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, columns, config.pad_token_id)
        self.position_embeddings = LearnedPositions(config.max_position_embeddings, columns)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, columns)
        self.LayerNorm = LayerNorm(columns, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, S) integers, or what word_embeddings would give of them, to (B, S, hidden_size)."""
        x = embed(self.word_embeddings, input_ids, inputs_embeds)
        # Without segments all tokens are in the first one.
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, dtype=torch.long, device=x.device)
        x = x + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(self.position_embeddings(x, position_ids)))


class BertSelfAttention(nn.Module):
    """Attention of the tokens to each other, without the projection of what it gives."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        columns = config.hidden_size
        self.head_dim = find_head_dim(config, "hidden_size", "num_attention_heads")
        self.dropout = config.attention_probs_dropout_prob
        self.query = Linear(columns, columns)
        self.key = Linear(columns, columns)
        self.value = Linear(columns, columns)

    def forward(self, x: torch.Tensor, **terms: Any) -> torch.Tensor:
        """(B, S, hidden_size) to the same."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        dropout_p = self.dropout if self.training else 0.0
        return attend(q, k, v, self.head_dim, dropout_p=dropout_p, **terms)


class BertOutput(nn.Module):
    """The last product of a sublayer, added to the stream, and the norm of the sum."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """(B, S, in_features) and (B, S, hidden_size) to the latter."""
        dropout_p = self.dropout if self.training else 0.0
        return add_norm(self.dense(x), residual, self.LayerNorm, dropout_p)[0]


class BertAttention(nn.Module):
    """The attention sublayer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)

    def forward(self, x: torch.Tensor, **terms: Any) -> torch.Tensor:
        """(B, S, hidden_size) to the same."""
        return self.output(self.self(x, **terms), x)


class BertActivated(nn.Module):
    """activation(dense(x))."""

    def __init__(self, out_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, out_features)
        self.activation: Activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, hidden_size) to (B, S, out_features)."""
        return activate(self.dense, x, self.activation)


class BertLayer(nn.Module):
    """Attention and a feed-forward layer, each added to the stream, with a norm of each sum."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertActivated(config.intermediate_size, config)
        self.output = BertOutput(config.intermediate_size, config)

    def forward(self, x: torch.Tensor, **terms: Any) -> torch.Tensor:
        """(B, S, hidden_size) to the same."""
        x = self.attention(x, **terms)
        return self.output(self.intermediate(x), x)
