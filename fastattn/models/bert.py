"""BERT: attention to both sides, learned positions, and a norm after every addition.

Every addition is one kernel with its norm, and the first product of a feed-forward layer with its
activation.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn

from ..nn import Dropout, LayerNorm, LearnedPositions, Linear, add_norm
from ..ops.linear import Activation
from ._base import Model
from ._config import Config
from ._layers import ACTIVATIONS, activate, attend, check_has_tokens, find_head_dim
from ._losses import sequence_loss, token_loss
from ._masks import mask_terms
from ._outputs import Output


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
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B, S) integers to (B, S, hidden_size)."""
        segments = self.token_type_embeddings
        # Without segments all tokens are in the first one.
        if token_type_ids is None:
            token_type_ids = input_ids.new_zeros(1)
        x = self.word_embeddings(input_ids) + segments(token_type_ids)
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


class BertEncoder(nn.Module):
    """The layers; `BertModel` runs them."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))


class BertPooler(nn.Module):
    """tanh(dense(first token))."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, hidden_size) to (B, hidden_size)."""
        check_has_tokens(x)
        return activate(self.dense, x[:, 0], "tanh")


class BertPreTrained(Model):
    """What the body and the heads have in common."""

    config_class = BertConfig
    base_prefix = "bert"
    renamed: ClassVar[Mapping[str, str]] = {r"\.gamma$": ".weight", r"\.beta$": ".bias"}
    ignored = (r"(^|\.)embeddings\.position_ids$",)


class BertModel(BertPreTrained):
    """The body, with or without the pooler that classification is built on."""

    def __init__(self, config: BertConfig, *, pooler: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if pooler else None
        self.finish()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Output:
        """Hidden states of every token, and the pooled first one.

        Args:
            input_ids: (B, S).
            attention_mask: what is padding; see `fastattn.models._masks.mask_terms`.
            token_type_ids: (B, S), the segment of each token; the first one for all if None.
            position_ids: what broadcasts to (B, S); 0, 1, ... if None.
        """
        terms = mask_terms(attention_mask, *input_ids.shape)
        x = self.embeddings(input_ids, token_type_ids, position_ids)
        for layer in self.encoder.layer:
            x = self.run(layer, x, **terms)
        pooled = None if self.pooler is None else self.pooler(x)
        return Output(last_hidden_state=x, pooled=pooled)


class BertPredictionTransform(BertActivated):
    """LayerNorm(activation(dense(x))), which the decoder to the vocabulary is applied to."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.hidden_size, config)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, hidden_size) to the same."""
        return self.LayerNorm(super().forward(x))


class BertPredictions(nn.Module):
    """The transform and the decoder, whose bias is also known as `bias`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionTransform(config)
        self.decoder = Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the bias to 0."""
        nn.init.zeros_(self.bias)


class BertForMaskedLM(BertPreTrained):
    """BERT with a decoder to the vocabulary, whose weight is that of the word embeddings."""

    tied: ClassVar[Mapping[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    head_layer = "cls.predictions.decoder"
    # The published checkpoints were trained to tell following sentences as well.
    ignored = (*BertPreTrained.ignored, r"^bert\.pooler\.", r"^cls\.seq_relationship\.")

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, pooler=False)
        self.cls = nn.ModuleDict({"predictions": BertPredictions(config)})
        self.finish()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Output:
        """Logits of every token, and the loss of those with a label.

        Args:
            labels: (B, S), the tokens behind the masked ones, -100 elsewhere.

        The others are those of `BertModel`.
        """
        x = self.bert(
            input_ids, attention_mask, token_type_ids=token_type_ids, position_ids=position_ids
        ).last_hidden_state
        predictions: Any = self.cls["predictions"]
        features = predictions.transform(x)
        if labels is None:
            return Output(last_hidden_state=x, computed=self.head(features))
        loss = token_loss(features, predictions.decoder, labels)
        return Output(loss=loss, last_hidden_state=x, head=self, features=features)

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Transformed hidden states (B, S, hidden_size) to logits (B, S, vocab_size)."""
        predictions: Any = self.cls["predictions"]
        return predictions.decoder(features)


class BertForSequenceClassification(BertPreTrained):
    """BERT with a linear classifier of the pooled first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        dropout = config.classifier_dropout
        self.dropout = Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = Linear(config.hidden_size, config.num_labels)
        self.finish()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Output:
        """Logits (B, num_labels), and the loss, see `sequence_loss`.

        Args:
            labels: (B,) classes or numbers, or (B, num_labels).

        The others are those of `BertModel`.
        """
        output = self.bert(
            input_ids, attention_mask, token_type_ids=token_type_ids, position_ids=position_ids
        )
        output.computed = self.classifier(self.dropout(output.pooled))
        if labels is not None:
            output.loss = sequence_loss(self.config, output.computed, labels)
        return output


MODELS: tuple[type[Model], ...] = (BertForMaskedLM, BertForSequenceClassification, BertModel)
