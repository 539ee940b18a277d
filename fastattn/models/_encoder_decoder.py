"""Encoder-decoders: their body's forward, with a cache or without, and what generates from it."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn as nn

from ..nn import EncoderDecoderCache
from ._arguments import embed
from ._base import Model
from ._masks import mask_terms
from ._outputs import Output


class EncoderDecoder(Model):
    """The body of an encoder-decoder, of tokens on both sides.

    A family derives from it, makes `encoder` and `decoder`, whose calls are those of `T5Stack`, and
    says by `embed` what they begin with.
    """

    encoder: nn.Module
    decoder: Any

    @abc.abstractmethod
    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Tokens (B, S) to (B, S, C)."""

    def make_cache(self, batch: int, capacity: int) -> EncoderDecoderCache:
        """Caches of the decoder, with room for `capacity` of its tokens in `batch` sequences."""
        return EncoderDecoderCache(
            [attention.make_cache(batch, capacity) for attention in self.decoder.attentions()]
        )

    def run_body(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        decoder_input_ids: torch.Tensor | None,
        decoder_attention_mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        positions: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
    ) -> Output:
        """Hidden states of the decoder's tokens, and of the encoder's where it runs.

        Args:
            input_ids: (B, N), what the encoder reads; None where the cache has it already.
            attention_mask: what is padding there; see `fastattn.models._masks.mask_terms`.
            decoder_input_ids: (B, S), what the decoder reads.
            decoder_attention_mask: what is padding there.
            cache: what earlier calls left, behind which the decoder's tokens come.
            positions: (B, S), those of the decoder's tokens; from the cache on if None.
            inputs_embeds: (B, N, C), what `embed` would give, in the place of input_ids.
            decoder_inputs_embeds: (B, S, C), the same for the decoder.

        Raises:
            TypeError: there is nothing to read and no cache; or tokens and what `embed` would give
                of them are both given.
            ValueError: a mask does not go with a cache.
        """
        name = type(self).__name__
        context, terms = None, {}
        if input_ids is not None or inputs_embeds is not None:
            source = embed(self.embed, input_ids, inputs_embeds)
            terms = mask_terms(attention_mask, *source.shape[:2])
            context = self.encoder(source, terms)
        elif cache is None:
            raise TypeError(f"{name}: input_ids may be left out only where a cache has them")
        given = embed(self.embed, decoder_input_ids, decoder_inputs_embeds, "decoder_")
        decoder_terms = mask_terms(decoder_attention_mask, *given.shape[:2])
        if cache is not None and (decoder_terms or not terms.keys() <= {"kv_lengths"}):
            raise ValueError(
                f"{name}: beside a cache there is no decoder_attention_mask, and attention_mask is "
                "the number of each source's tokens, (B,), which are padded on the right"
            )
        if cache is not None and len(cache) != len(list(self.decoder.attentions())):
            raise ValueError(f"{name}: the cache has {len(cache)} layers, and the decoder others")
        x = self.decoder(given, decoder_terms, context, terms, cache, positions)
        return Output(last_hidden_state=x, encoder_last_hidden_state=context)


class Generating:
    """What `fastattn.generate` asks of an encoder-decoder with logits of the next token.

    A family says by `base` which module reads, and by `features` what `head` makes logits of.
    """

    is_encoder_decoder: ClassVar[bool] = True
    # transformers' Trainer asks for it: num_items_in_batch may be given, and counts the labels.
    accepts_loss_kwargs: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def base(self) -> EncoderDecoder:
        """The model that has the encoder and the decoder."""

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states to what `head` makes logits of."""
        return hidden

    def read(
        self,
        tokens: torch.Tensor,
        cache: EncoderDecoderCache,
        positions: torch.Tensor | None = None,
        *,
        source: torch.Tensor | None = None,
        source_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `head` makes logits of, for tokens (B, M) behind those in the cache: (B, M, C).

        Args:
            positions: (B, M), the tokens' own; from the cache on if None.
            source: (B, N), what the encoder reads, in the first call with a cache.
            source_lengths: (B,) how many of its tokens count; all if None.
        """
        output = self.base.run_body(source, source_lengths, tokens, None, cache, positions)
        assert output.last_hidden_state is not None
        return self.features(output.last_hidden_state)


def layer_terms(
    layers: int,
    terms: dict[str, Any],
    context_terms: dict[str, Any] | None,
    cache: EncoderDecoderCache | None,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What each layer is to know of its tokens and of the context, its own caches among it."""
    context_terms = context_terms or {}
    for layer in range(layers):
        if cache is None:
            yield terms, context_terms
        else:
            own, context = cache[layer], cache.contexts[layer]
            yield {**terms, "cache": own}, {**context_terms, "cache": context}
