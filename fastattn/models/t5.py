"""T5: an encoder and a decoder with biases by distance, which all layers of a stack share.

Original T5 has a plain feed-forward layer with relu, T5 1.1 and FLAN-T5 a gated one. The bias by
distance never exists as a tensor of scores, every addition is one kernel with the norm that follows
it, also across layers, and the first products of a feed-forward layer one with their activation.
In float16 hidden states are not clamped; use bfloat16.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer" (2020).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn as nn

from ..nn import Dropout, EncoderDecoderCache, Linear, add_norm
from ..nn.block import Stream
from ._arguments import refuse_others
from ._base import Model
from ._encoder_decoder import EncoderDecoder, Generating, layer_terms
from ._layers import (
    ClassificationHead,
    check_tokens,
    select_last_token,
    shift_labels,
)
from ._losses import sequence_loss, token_loss
from ._norms import FamilyRMSNorm
from ._outputs import Output
from ._t5_layers import T5Attention, T5Block, T5Config, T5GatedFeedForward, T5PlainFeedForward

if TYPE_CHECKING:
    from typing_extensions import Self


class T5PreTrained(Model):
    """What all parts of T5 have in common."""

    config_class = T5Config
    base_prefix = "transformer"
    renamed: ClassVar[Mapping[str, str]] = {r"(^|\.)(en|de)coder\.embed_tokens\.": r"\1shared."}
    # A table of the first published checkpoints, which nothing ever used.
    ignored = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",)

    def initialize(self, module: nn.Module) -> None:
        """Draw the parameters so that scores have the size of 1 without a scale."""
        config = self.config
        factor = config.initializer_factor
        by_input = factor * config.d_model**-0.5
        inner = config.num_heads * config.d_kv
        deviations: dict[str, float] = {}
        if isinstance(module, FamilyRMSNorm):
            nn.init.constant_(module.weight, factor)
        elif isinstance(module, T5EncoderDecoder):
            deviations = {"shared": factor, "lm_head": factor}
        elif isinstance(module, T5Attention):
            deviations = {
                "q": factor * (config.d_model * config.d_kv) ** -0.5,
                "k": by_input,
                "v": by_input,
                "o": factor * inner**-0.5,
                "relative_attention_bias": by_input,
            }
        elif isinstance(module, T5PlainFeedForward | T5GatedFeedForward):
            wide = factor * config.d_ff**-0.5
            deviations = {"wi": by_input, "wi_0": by_input, "wi_1": by_input, "wo": wide}
        elif isinstance(module, ClassificationHead):
            deviations = {"dense": by_input, "out_proj": by_input}
        for name, deviation in deviations.items():
            layer: Any = getattr(module, name, None)
            if layer is not None:
                nn.init.normal_(layer.weight, std=deviation)
                if getattr(layer, "bias", None) is not None:
                    nn.init.zeros_(layer.bias)


class T5Stack(T5PreTrained):
    """The blocks of an encoder or of a decoder, and the norm behind them."""

    def __init__(self, config: T5Config, *, is_decoder: bool) -> None:
        super().__init__(config)
        self.is_decoder = is_decoder
        layers = cast(int, config.num_decoder_layers) if is_decoder else config.num_layers
        self.block = nn.ModuleList(self._make_block(layer) for layer in range(layers))
        self.final_layer_norm = FamilyRMSNorm(
            config.d_model, config.layer_norm_epsilon, casting="t5"
        )
        self.dropout = Dropout(config.dropout_rate)
        self.finish()

    def _make_block(self, layer: int) -> T5Block:
        return T5Block(self.config, is_decoder=self.is_decoder, has_table=layer == 0)

    def attentions(self) -> Iterator[Any]:
        """The attention of each layer to its own tokens."""
        return (block.layer[0].SelfAttention for block in self.block)  # type: ignore[index]

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
            positions: not looked at, for distances alone count.
        """
        stream: Stream = (self.dropout(x), None)
        table = None
        own = layer_terms(len(self.block), terms, context_terms, cache)
        for block, known in zip(self.block, own, strict=True):
            stream, table = self.run(block, stream, table, context, *known)
        x, _ = add_norm(*stream, self.final_layer_norm, self.dropout.p if self.training else 0.0)
        return self.dropout(x)


class T5EncoderDecoder(EncoderDecoder, T5PreTrained):
    """An encoder and a decoder of tokens with the same embeddings."""

    stack_class: ClassVar[type[T5Stack]] = T5Stack

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = self.stack_class(config, is_decoder=False)
        self.decoder = self.stack_class(config, is_decoder=True)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tokens (B, S) to (B, S, d_model)."""
        return self.shared(input_ids)

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

        The arguments are those of `EncoderDecoder.run_body`.
        """
        given = input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, cache
        embedded = {
            "inputs_embeds": inputs_embeds,
            "decoder_inputs_embeds": decoder_inputs_embeds,
        }
        return self.run_body(*given, **embedded)


class T5Model(T5EncoderDecoder):
    """The body."""

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.finish()


class T5ForConditionalGeneration(Generating, T5EncoderDecoder):
    """T5 with the logits of the decoder's next tokens."""

    tied: ClassVar[Mapping[str, str]] = {"lm_head.weight": "shared.weight"}

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        self.finish()

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
            decoder_input_ids: what it reads; the labels one place later if None.
            num_items_in_batch: what the sum of the losses is divided by instead of the number of
                labels: those of all batches that a step is made of.
            others: arguments of transformers' models: None and False are no more than they say, and
                return_dict may be True.

        The others are those of `EncoderDecoder.run_body`.

        Raises:
            TypeError: another argument of transformers' is asked for, by name.
            ValueError: there are neither labels nor anything for the decoder.
        """
        refuse_others(type(self).__name__, others)
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            if labels is None:
                raise ValueError("T5ForConditionalGeneration: give labels or decoder_input_ids")
            decoder_input_ids = shift_labels(labels, self.config)
        output = super().forward(
            input_ids,
            attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
        )
        assert output.last_hidden_state is not None
        features = self.features(output.last_hidden_state)
        if labels is None:
            return dataclasses.replace(output, computed=self.head(features))
        loss = token_loss(features, self.lm_head, labels, items=num_items_in_batch)
        return dataclasses.replace(output, loss=loss, head=self, features=features)

    @property
    def base(self) -> T5EncoderDecoder:
        """The model itself."""
        return self

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states, scaled if they are to be."""
        return hidden * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else hidden

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """What `features` gives to logits."""
        return self.lm_head(features)

    def _fill(self, state: dict[str, torch.Tensor], *where: Any) -> Self:
        # transformers 5 writes of every T5 that its embeddings are tied, also of those which, as
        # the published ones of T5 1.1, have an output of their own.
        names = ("lm_head.weight", "shared.weight")
        output, embedding = (state.get(name) for name in names)
        if output is not None and embedding is not None and not torch.equal(output, embedding):
            self.config = dataclasses.replace(self.config, tie_word_embeddings=False)
        return super()._fill(state, *where)


class T5ForSequenceClassification(T5PreTrained):
    """T5 with a classifier of what the decoder gives for the last end of a sequence."""

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        check_tokens(config, "eos_token_id")
        self.transformer = T5Model(config)
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
        shifted = shift_labels(input_ids, self.config)
        output = self.transformer(input_ids, attention_mask, decoder_input_ids=shifted)
        last = select_last_token(output.last_hidden_state, input_ids, self.config.eos_token_id)
        logits = self.classification_head(last)
        loss = None if labels is None else sequence_loss(self.config, logits, labels)
        return dataclasses.replace(output, loss=loss, computed=logits)


MODELS: tuple[type[Model], ...] = (
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    T5Model,
)
