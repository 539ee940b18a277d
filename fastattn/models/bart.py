"""BART: an encoder and a decoder with learned positions and a norm after every addition.

Every addition is one kernel with its norm, and the first product of a feed-forward layer with its
activation.

Source: Lewis et al., "BART: Denoising Sequence-to-Sequence Pre-training" (2019).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn as nn

from .. import ops
from ..nn import Dropout, EncoderDecoderCache, LayerNorm, LearnedPositions, Linear, add_norm
from ..nn.mlp import is_only_linear
from ..ops.linear import Activation
from ._arguments import refuse_others
from ._bart_layers import BartAttention, BartConfig
from ._base import Model
from ._encoder_decoder import EncoderDecoder, Generating, layer_terms
from ._layers import (
    ACTIVATIONS,
    ClassificationHead,
    activate,
    check_tokens,
    select_last_token,
    shift_labels,
)
from ._losses import sequence_loss, token_loss
from ._outputs import Output

FIRST_POSITION = 2
"""The row of the first token's position; those before it were for padding."""


class BartLayer(nn.Module):
    """Attention, in a decoder also to what the encoder gives, and a feed-forward layer.

    What each gives is added to the stream, and the sum is normalized.
    """

    def __init__(self, config: BartConfig, *, is_decoder: bool) -> None:
        super().__init__()
        columns = config.d_model
        encoder, decoder = config.encoder_attention_heads, config.decoder_attention_heads
        hidden = config.decoder_ffn_dim if is_decoder else config.encoder_ffn_dim
        self.self_attn = BartAttention(config, decoder if is_decoder else encoder)
        self.self_attn_layer_norm = LayerNorm(columns)
        if is_decoder:
            self.encoder_attn = BartAttention(config, decoder)
            self.encoder_attn_layer_norm = LayerNorm(columns)
        self.fc1 = Linear(columns, hidden)
        self.fc2 = Linear(hidden, columns)
        self.final_layer_norm = LayerNorm(columns)
        self.activation: Activation = ACTIVATIONS[config.activation_function]
        self.activation_dropout = Dropout(config.activation_dropout)
        self.dropout = config.dropout

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None,
        terms: dict[str, Any],
        context_terms: dict[str, Any],
    ) -> torch.Tensor:
        """(B, S, d_model) to the same."""
        dropout_p = self.dropout if self.training else 0.0
        y = self.self_attn(x, **terms)
        x, _ = add_norm(y, x, self.self_attn_layer_norm, dropout_p)
        if context is not None or "cache" in context_terms:
            y = self.encoder_attn(x, context, **context_terms)
            x, _ = add_norm(y, x, self.encoder_attn_layer_norm, dropout_p)
        y = self.fc2(self.activation_dropout(activate(self.fc1, x, self.activation)))
        return add_norm(y, x, self.final_layer_norm, dropout_p)[0]


class BartPreTrained(Model):
    """What all parts of BART have in common."""

    config_class = BartConfig
    base_prefix = "model"
    renamed: ClassVar[Mapping[str, str]] = {r"(^|\.)(en|de)coder\.embed_tokens\.": r"\1shared."}
    ignored = (r"(^|\.)(en|de)coder\.version$",)


class BartStack(BartPreTrained):
    """The layers of an encoder or of a decoder, behind the positions of the tokens."""

    def __init__(self, config: BartConfig, *, is_decoder: bool) -> None:
        super().__init__(config)
        self.is_decoder = is_decoder
        columns = config.d_model
        layers = config.decoder_layers if is_decoder else config.encoder_layers
        self.embed_positions = LearnedPositions(
            config.max_position_embeddings + FIRST_POSITION, columns
        )
        self.layernorm_embedding = LayerNorm(columns)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(BartLayer(config, is_decoder=is_decoder) for _ in range(layers))
        self.finish()

    def attentions(self) -> Iterator[Any]:
        """The attention of each layer to its own tokens."""
        return (layer.self_attn for layer in self.layers)

    def forward(
        self,
        x: torch.Tensor,
        terms: dict[str, Any],
        context: torch.Tensor | None = None,
        context_terms: dict[str, Any] | None = None,
        cache: EncoderDecoderCache | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embedded tokens (B, S, d_model) to the same.

        Args:
            terms: what attention is to know of the tokens, as their mask.
            context: (B, N, d_model), what the encoder gives, for a decoder.
            context_terms: what attention is to know of the context.
            cache: what earlier calls left, for a decoder; also the context, unless it is given.
            positions: (B, S), those of the tokens; from the cache on if None.
        """
        terms = {**terms, "causal": self.is_decoder}
        if cache is not None and positions is None:
            positions = cache.positions(x.shape[1])
        places = FIRST_POSITION if positions is None else FIRST_POSITION + positions
        x = self.dropout(self.layernorm_embedding(self.embed_positions(x, places)))
        own = layer_terms(len(self.layers), terms, context_terms, cache)
        for layer, known in zip(self.layers, own, strict=True):
            x = self.run(layer, x, context, *known)
        return x


class BartModel(EncoderDecoder, BartPreTrained):
    """The body: an encoder and a decoder of tokens with the same embeddings."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
        self.encoder = BartStack(config, is_decoder=False)
        self.decoder = BartStack(config, is_decoder=True)
        self.finish()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
    ) -> Output:
        """Hidden states of the decoder's tokens, and of the encoder's.

        Args:
            decoder_input_ids: (B, S), what the decoder reads; if None, what the encoder does, one
                place later.

        The others are those of `EncoderDecoder.run_body`.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if input_ids is None:
                raise TypeError("BartModel: give input_ids or decoder_input_ids")
            decoder_input_ids = shift_labels(input_ids, self.config)
        given = input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, cache
        embedded = {
            "inputs_embeds": inputs_embeds,
            "decoder_inputs_embeds": decoder_inputs_embeds,
        }
        return self.run_body(*given, **embedded)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tokens (B, S) to (B, S, d_model)."""
        x = self.shared(input_ids)
        return x * self.config.d_model**0.5 if self.config.scale_embedding else x


class BartForConditionalGeneration(Generating, BartPreTrained):
    """BART with the logits of the decoder's next tokens."""

    tied: ClassVar[Mapping[str, str]] = {"lm_head.weight": "model.shared.weight"}
    # Where transformers does not tie the output, it does not tie these either.
    written_apart: ClassVar[Mapping[str, str]] = {
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
    }

    final_logits_bias: torch.Tensor

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        self.model = BartModel(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        self.finish()

    def initialize(self, module: nn.Module) -> None:
        """As in every model, and no bias of the logits."""
        super().initialize(module)
        if module is self:
            self.final_logits_bias.zero_()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **others: Any,
    ) -> Output:
        """Logits (B, S, vocab_size), and the loss of labels.

        Args:
            labels: (B, S), what the decoder is to give, -100 where it does not matter.
            decoder_input_ids: what it reads; the labels one place later if None, and without those
                what the encoder reads.
            num_items_in_batch: what the sum of the losses is divided by instead of the number of
                labels: those of all batches that a step is made of.
            others: arguments of transformers' models: None and False are no more than they say, and
                return_dict may be True.

        The others are those of `EncoderDecoder.run_body`.

        Raises:
            TypeError: another argument of transformers' is asked for, by name.
        """
        refuse_others(type(self).__name__, others)
        nothing_to_decode = decoder_input_ids is None and decoder_inputs_embeds is None
        if nothing_to_decode and labels is not None:
            decoder_input_ids = shift_labels(labels, self.config)
        output = self.model(
            input_ids,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
        )
        features = output.last_hidden_state
        if labels is None:
            return dataclasses.replace(output, computed=self.head(features))
        options: dict[str, Any] = {"bias": self.final_logits_bias[0], "items": num_items_in_batch}
        loss = token_loss(features, self.lm_head, labels, **options)
        return dataclasses.replace(output, loss=loss, head=self)

    @property
    def base(self) -> BartModel:
        """The model below the head."""
        return self.model

    def make_cache(self, batch: int, capacity: int) -> EncoderDecoderCache:
        """Caches of the decoder, with room for `capacity` of its tokens in `batch` sequences."""
        return self.model.make_cache(batch, capacity)

    def head_tensors(self) -> list[torch.Tensor]:
        """As in every model, and the bias of the logits."""
        return [*super().head_tensors(), self.final_logits_bias]

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """Hidden states to logits."""
        bias = self.final_logits_bias[0]
        if is_only_linear(self.lm_head) and self.lm_head.bias is None:
            return ops.linear(features, self.lm_head.weight, bias)
        return self.lm_head(features) + bias


class BartForSequenceClassification(BartPreTrained):
    """BART with a classifier of what the decoder gives for the last end of a sequence."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        check_tokens(config, "eos_token_id")
        self.model = BartModel(config)
        self.classification_head = ClassificationHead(
            config.d_model, config.num_labels, config.classifier_dropout
        )
        self.finish()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Output:
        """Logits (B, num_labels), and the loss of labels.

        Args:
            input_ids: (B, S), each with `config.eos_token_id`. The decoder reads the same, one
                place later.
            attention_mask: what is padding for the encoder.
            labels: (B,) classes, or as `fastattn.models._losses.sequence_loss` takes them.
        """
        output = self.model(input_ids, attention_mask)
        last = select_last_token(output.last_hidden_state, input_ids, self.config.eos_token_id)
        logits = self.classification_head(last)
        loss = None if labels is None else sequence_loss(self.config, logits, labels)
        return dataclasses.replace(output, loss=loss, computed=logits)


MODELS: tuple[type[Model], ...] = (
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BartModel,
)
