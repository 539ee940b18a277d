"""Decoder-only models: their body, and its heads for the next token or one answer for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn as nn

from ..nn import CacheStack, Linear, add_norm
from ..nn.block import Stream
from ..nn.mlp import GATED_FUNCTIONS
from ._arguments import embed, refuse_others
from ._base import Model
from ._config import ConfigError
from ._layers import ACTIVATIONS, check_has_tokens
from ._losses import next_token_labels, sequence_loss, token_loss
from ._masks import mask_terms
from ._outputs import Output

GATED: dict[str, Any] = {
    theirs: ours for theirs, ours in ACTIVATIONS.items() if ours in GATED_FUNCTIONS
}
"""What `fastattn.nn.GatedMLP` calls the activations that configurations name."""


def own_terms(model: Any, cache: CacheStack | None, terms: dict[str, Any]) -> list[dict[str, Any]]:
    """The terms of each layer: all that there are, and its own cache.

    Raises:
        ValueError: there is a mask beside a cache, or another number of layers.
    """
    layers = list(model.attentions())
    if cache is None:
        return [terms] * len(layers)
    if terms:
        raise ValueError(
            f"{type(model).__name__}: attention_mask and a cache exclude each other; prompts of "
            "different lengths are padded on the right, and the cache is cropped to their lengths"
        )
    if len(cache) != len(layers):
        raise ValueError(
            f"{type(model).__name__}: there are {len(layers)} layers, and caches of {len(cache)}"
        )
    return [{"cache": own} for own in cache]


class RotaryDecoder(Model):
    """The body of a decoder with rotary positions.

    A family derives from it and makes `embed_tokens`, `layers`, `norm` and `rotary_emb`.
    """

    base_prefix = "model"
    ignored = (r"rotary_emb\.inv_freq$",)

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module

    def attentions(self) -> Iterator[Any]:
        """The attention of each layer."""
        return (layer.self_attn for layer in self.layers)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: CacheStack | None = None,
    ) -> Output:
        """(B, S) tokens to the last hidden states, (B, S, C).

        Args:
            input_ids: (B, S) tokens.
            attention_mask: as in `fastattn.models._masks.mask_terms`.
            position_ids: (1, S) or (B, S) integers, the position of each token; 0 to S - 1 if None.
                Where they begin again, tokens still see those before.
            inputs_embeds: (B, S, C), what `embed_tokens` would give, in the place of input_ids.
            cache: what earlier calls left, behind which these tokens come; see `make_cache`.
        """
        embedded = embed(self.embed_tokens, input_ids, inputs_embeds)
        terms = mask_terms(attention_mask, *embedded.shape[:2])
        if cache is not None and position_ids is None:
            position_ids = cache.positions(embedded.shape[1])
        stream: Stream = embedded, None
        for layer, own in zip(self.layers, own_terms(self, cache, terms), strict=True):
            stream = self.run(layer, stream, rotary=self.rotary_emb, positions=position_ids, **own)
        hidden, _ = add_norm(*stream, self.norm)
        return Output(last_hidden_state=hidden)


class CausalLM(Model):
    """A body and `lm_head`, the logits of the next token.

    A family derives from it, names `body_class`, `base_prefix` (the body's name) and `tied`, and
    says by `softcap` where its logits are capped.
    """

    body_class: ClassVar[type[Model]]

    # transformers' Trainer asks for both: num_items_in_batch may be given, and counts the labels
    # that follow a token.
    accepts_loss_kwargs: ClassVar[bool] = True
    loss_type: ClassVar[str] = "ForCausalLM"

    lm_head: nn.Linear

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        body = self.body_class(config)
        setattr(self, self.base_prefix, body)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.finish()

    @property
    def base(self) -> Any:
        """The body, whose last hidden states `head` makes logits of."""
        return getattr(self, self.base_prefix)

    def make_cache(self, batch: int, capacity: int) -> CacheStack:
        """Caches of all layers with room for `capacity` tokens of `batch` sequences.

        Raises:
            TypeError: a layer's attention has none.
        """
        attentions = list(self.base.attentions())
        for attention in attentions:
            if not hasattr(attention, "make_cache"):
                raise TypeError(
                    f"{type(self).__name__}: there is no cache for {type(attention).__name__}"
                )
        return CacheStack([attention.make_cache(batch, capacity) for attention in attentions])

    def read(
        self, tokens: torch.Tensor, cache: CacheStack, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `head` makes logits of, for tokens (B, M) behind those in the cache: (B, M, C).

        Args:
            positions: (B, M), the tokens' own; from the cache on if None.
        """
        return self.base(tokens, None, positions, cache=cache).last_hidden_state

    @property
    def softcap(self) -> float | None:
        """The largest logit there can be, or None."""
        return None

    def head(self, features: torch.Tensor) -> torch.Tensor:
        """The logits (..., V) of hidden states (..., C)."""
        logits = self.lm_head(features)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: CacheStack | None = None,
        **others: Any,
    ) -> Output:
        """Logits (B, S, V), or the loss of labels.

        Args:
            input_ids: (B, S) tokens.
            attention_mask: what is padding; see `fastattn.models._masks.mask_terms`.
            labels: (B, S) tokens, in the places of input_ids, -100 where there is none. The loss is
                the mean cross entropy of each label at the token before it. Padding is to have no
                label, nor the token behind it, which padding would have to predict.
            position_ids: (1, S) or (B, S) integers, the position of each token.
            inputs_embeds: (B, S, C), what the embedding would give, in the place of input_ids.
            num_items_in_batch: what the sum of the losses is divided by instead of the number of
                labels: those of all batches that a step is made of.
            logits_to_keep: the logits are those of so many last tokens, or of the places in a
                tensor; 0 for all. The loss is of all tokens.
            cache: what earlier calls left, behind which these tokens come; see `make_cache`.
            others: arguments of transformers' models: None and False are no more than they say, and
                return_dict may be True.

        Returns:
            `last_hidden_state` and `logits`; with labels `loss`, and the logits only when they are
            asked for.

        Raises:
            TypeError: another argument of transformers' is asked for, by name; or the tokens and
                their embeddings are both given or both missing.
        """
        refuse_others(type(self).__name__, others)
        given = (input_ids, attention_mask, position_ids, inputs_embeds)
        cached = {} if cache is None else {"cache": cache}
        hidden = self.base(*given, **cached).last_hidden_state
        features = hidden
        if isinstance(logits_to_keep, torch.Tensor):
            features = hidden[:, logits_to_keep]
        elif logits_to_keep:
            features = hidden[:, -logits_to_keep:]
        if labels is None:
            return Output(last_hidden_state=hidden, computed=self.head(features))
        shifted = next_token_labels(labels)
        options: dict[str, Any] = {"softcap": self.softcap, "items": num_items_in_batch}
        loss = token_loss(hidden, self.lm_head, shifted, **options)
        return Output(loss=loss, last_hidden_state=hidden, head=self, features=features)


class SequenceClassifier(Model):
    """A body and `score`, applied to the last token that is not padding; also a reward model.

    A family derives from it and names `body_class` and `base_prefix`.
    """

    body_class: ClassVar[type[Model]]

    score: nn.Linear

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        setattr(self, self.base_prefix, self.body_class(config))
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)
        self.finish()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> Output:
        """Logits (B, num_labels), and the loss of labels.

        Args:
            input_ids: (B, S) tokens. As in transformers, the logits are those of the last token
                that is not `config.pad_token_id`.
            attention_mask: what is padding; see `fastattn.models._masks.mask_terms`.
            labels: (B,) classes, or numbers as `fastattn.models._losses.sequence_loss` takes them.

        Returns:
            `logits`, `last_hidden_state`, and with labels `loss`.

        Raises:
            ValueError: there are several sequences and no pad_token_id, or no tokens.
        """
        check_has_tokens(input_ids)
        hidden = getattr(self, self.base_prefix)(input_ids, attention_mask).last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        logits = self.score(hidden[rows, self._last_tokens(input_ids)])
        loss = None if labels is None else sequence_loss(self.config, logits, labels)
        return Output(loss=loss, last_hidden_state=hidden, computed=logits)

    def _last_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B,) the place of the last token that is not padding."""
        pad = self.config.pad_token_id
        if pad is None:
            if len(input_ids) != 1:
                raise ValueError(
                    f"{type(self).__name__}: config.pad_token_id must be set to find the end of "
                    "several sequences"
                )
            return input_ids.new_full((1,), input_ids.shape[1] - 1)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return ((input_ids != pad) * places).argmax(-1)


def check_layer_types(config: Any) -> None:
    """`config.layer_types` names full or sliding attention for each layer, and a window for it.

    Raises:
        ConfigError: it does not.
    """
    types, layers = config.layer_types, config.num_hidden_layers
    if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"{type(config).__name__}: layer_types must be full_attention or sliding_attention "
            f"for each of {layers} layers, got {types!r}"
        )
    if "sliding_attention" in types and config.sliding_window is None:
        raise ConfigError(
            f"{type(config).__name__}: layer_types has sliding_attention, sliding_window is None"
        )


def find_window(config: Any, layer: int) -> int | None:
    """How many keys before its own a query of this layer sees; None for all."""
    sliding = config.layer_types[layer] == "sliding_attention"
    return config.sliding_window - 1 if sliding else None
