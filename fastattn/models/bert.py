"""BERT: attention to both sides, learned positions, and a norm after every addition.

Every addition is one kernel with its norm, and the first product of a feed-forward layer with its
activation.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn as nn

from ..nn import Dropout, LayerNorm, Linear
from ._arguments import refuse_others
from ._base import Model
from ._bert_layers import BertActivated, BertConfig, BertEmbeddings, BertLayer
from ._layers import activate, check_has_tokens
from ._losses import sequence_loss, token_loss
from ._masks import mask_terms
from ._outputs import Output


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
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Output:
        """Hidden states of every token, and the pooled first one.

        Args:
            input_ids: (B, S).
            attention_mask: what is padding; see `fastattn.models._masks.mask_terms`.
            token_type_ids: (B, S), the segment of each token; the first one for all if None.
            position_ids: what broadcasts to (B, S); 0, 1, ... if None.
            inputs_embeds: (B, S, hidden_size), what the embeddings of words would give, in the
                place of input_ids.
        """
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        terms = mask_terms(attention_mask, *x.shape[:2])
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
    # As decoders have them; all labels count.
    accepts_loss_kwargs: ClassVar[bool] = True
    # The published checkpoints were trained to tell following sentences as well.
    ignored = (*BertPreTrained.ignored, r"^bert\.pooler\.", r"^cls\.seq_relationship\.")

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, pooler=False)
        self.cls = nn.ModuleDict({"predictions": BertPredictions(config)})
        self.finish()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **others: Any,
    ) -> Output:
        """Logits of every token, and the loss of those with a label.

        Args:
            labels: (B, S), the tokens behind the masked ones, -100 elsewhere.
            num_items_in_batch: what the sum of the losses is divided by instead of the number of
                labels: those of all batches that a step is made of.
            others: arguments of transformers' models: None and False are no more than they say, and
                return_dict may be True.

        The others are those of `BertModel`.

        Raises:
            TypeError: another argument of transformers' is asked for, by name.
        """
        refuse_others(type(self).__name__, others)
        x = self.bert(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        ).last_hidden_state
        predictions: Any = self.cls["predictions"]
        features = predictions.transform(x)
        if labels is None:
            return Output(last_hidden_state=x, computed=self.head(features))
        loss = token_loss(features, predictions.decoder, labels, items=num_items_in_batch)
        return Output(loss=loss, last_hidden_state=x, head=self, features=features)

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Transformed hidden states (B, S, hidden_size) to logits (B, S, vocab_size)."""
        predictions: Any = self.cls["predictions"]
        return predictions.decoder(features)


class BertForSequenceClassification(BertPreTrained):
    """BERT with a linear classifier of the pooled first token."""

    # Of transformers' Trainer, which would else take `others` for it.
    accepts_loss_kwargs: ClassVar[bool] = False

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        dropout = config.classifier_dropout
        self.dropout = Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = Linear(config.hidden_size, config.num_labels)
        self.finish()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **others: Any,
    ) -> Output:
        """Logits (B, num_labels), and the loss, see `sequence_loss`.

        Args:
            labels: (B,) classes or numbers, or (B, num_labels).
            others: arguments of transformers' models: None and False are no more than they say, and
                return_dict may be True.

        The others are those of `BertModel`.

        Raises:
            TypeError: another argument of transformers' is asked for, by name.
        """
        refuse_others(type(self).__name__, others)
        output = self.bert(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        output.computed = self.classifier(self.dropout(output.pooled))
        if labels is not None:
            output.loss = sequence_loss(self.config, output.computed, labels)
        return output


MODELS: tuple[type[Model], ...] = (BertForMaskedLM, BertForSequenceClassification, BertModel)
