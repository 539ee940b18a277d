"""T5's blocks and what they are made of: the configuration, attention, feed-forward layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn

from .. import ops
from ..nn import Dropout, Linear, add_norm
from ..nn.block import Stream
from ..nn.mlp import GATED_FUNCTIONS, is_only_linear
from ..ops.gated_linear import Activation as GatedActivation
from ._config import Config, ConfigError
from ._layers import ACTIVATIONS, ProjectedAttention, activate, check_tokens
from ._norms import FamilyRMSNorm


@dataclass(kw_only=True)
class T5Config(Config):
    """The fields of Hugging Face's `T5Config` that a model depends on, with its defaults.

    Attributes:
        feed_forward_proj: the activation of the feed-forward layers, as "relu", or with a gate, as
            "gated-gelu", whose gelu is that of tanh.
        tie_word_embeddings: whether the embeddings are the weight of the output as well.
        scale_decoder_outputs: whether what the decoder gives is multiplied by d_model^-0.5 before
            the output's product; as tie_word_embeddings if None.
    """

    model_type: ClassVar[str] = "t5"
    # What follows from feed_forward_proj, and lengths that nothing depends on.
    harmless: ClassVar[frozenset[str]] = frozenset({"dense_act_fn", "is_gated_act", "n_positions"})

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    classifier_dropout: float = 0.0
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.tie_word_embeddings
        if min(self.num_layers, self.num_decoder_layers) < 1:
            raise ConfigError("T5Config: num_layers and num_decoder_layers must be 1 or more")
        check_tokens(self, "pad_token_id", "decoder_start_token_id")
        gated = [f"gated-{name}" for name, ours in ACTIVATIONS.items() if ours in GATED_FUNCTIONS]
        self.supports("feed_forward_proj", *ACTIVATIONS, *gated)

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layers have gates."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> Any:
        """The activation of the feed-forward layers, as `fastattn.linear` calls it."""
        if self.feed_forward_proj == "gated-gelu":
            return "gelu_tanh"
        return ACTIVATIONS[self.feed_forward_proj.removeprefix("gated-")]


class T5Attention(ProjectedAttention):
    """Attention without biases in its projections and without a scale of its scores."""

    names = ("q", "k", "v", "o")

    def __init__(self, config: T5Config, *, has_table: bool = False) -> None:
        super().__init__(config.d_kv, config.dropout_rate, scale=1.0)
        inner = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner, bias=False)
        self.k = Linear(config.d_model, inner, bias=False)
        self.v = Linear(config.d_model, inner, bias=False)
        self.o = Linear(inner, config.d_model, bias=False)
        if has_table:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(buckets, config.num_heads)

    def table(self) -> torch.Tensor:
        """The table of biases by distance, (buckets, heads), for this layer and for others.

        A copy, for the parameter itself may be gone from memory when this layer is done.
        """
        table = self.relative_attention_bias
        return table(torch.arange(table.num_embeddings, device=table.weight.device))


class T5PlainFeedForward(nn.Module):
    """wo(dropout(activation(wi(x))))."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = Dropout(config.dropout_rate)
        self.activation = config.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, d_model) to the same."""
        return self.wo(self.dropout(activate(self.wi, x, self.activation)))


class T5GatedFeedForward(nn.Module):
    """wo(dropout(activation(wi_0(x)) * wi_1(x)))."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.wi_0 = Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = Dropout(config.dropout_rate)
        self.activation: GatedActivation = config.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, d_model) to the same."""
        gate, up = self.wi_0, self.wi_1
        if is_only_linear(gate) and is_only_linear(up):
            hidden = ops.gated_linear(
                x, gate.weight, up.weight, gate.bias, up.bias, activation=self.activation
            )
        else:
            hidden = GATED_FUNCTIONS[self.activation](gate(x), up(x))
        return self.wo(self.dropout(hidden))


class T5Sublayer(nn.Module):
    """A norm of the stream, and a layer of it that is to be added to the stream.

    Streams are pairs (branch, residual), see `fastattn.nn.TransformerBlock`; the branch still has
    to be dropped and added.

    Args:
        name: the attribute that the layer is in a checkpoint.
    """

    def __init__(self, config: T5Config, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layer)
        self.layer_norm = FamilyRMSNorm(config.d_model, config.layer_norm_epsilon, casting="t5")
        self.dropout = config.dropout_rate

    def forward(self, stream: Stream, *arguments: Any, **options: Any) -> Stream:
        """A pair of (B, S, d_model) to such a pair; the other arguments go to the layer."""
        x, residual = add_norm(*stream, self.layer_norm, self.dropout if self.training else 0.0)
        return getattr(self, self.name)(x, *arguments, **options), residual


class T5Block(nn.Module):
    """Self-attention, in a decoder attention to the encoder, and a feed-forward layer."""

    def __init__(
        self,
        config: T5Config,
        *,
        is_decoder: bool,
        has_table: bool,
        feed_forward: tuple[str, nn.Module] | None = None,
    ) -> None:
        """`feed_forward` is a layer of another kind than T5's, and its name in checkpoints."""
        super().__init__()
        self.is_decoder = is_decoder
        self.has_table = has_table
        self.max_distance = config.relative_attention_max_distance
        attention = T5Attention(config, has_table=has_table)
        if feed_forward is None:
            kind = T5GatedFeedForward if config.is_gated else T5PlainFeedForward
            # Its name is from when the activation was always relu.
            feed_forward = ("DenseReluDense", kind(config))
        self.layer = nn.ModuleList([T5Sublayer(config, "SelfAttention", attention)])
        if is_decoder:
            self.layer.append(T5Sublayer(config, "EncDecAttention", T5Attention(config)))
        self.layer.append(T5Sublayer(config, *feed_forward))

    def forward(
        self,
        stream: Stream,
        table: torch.Tensor | None,
        context: torch.Tensor | None,
        terms: dict[str, Any],
        context_terms: dict[str, Any],
    ) -> tuple[Stream, torch.Tensor]:
        """A pair of (B, S, d_model) to such a pair, and the table of biases by distance.

        The first block of a stack has the table, which is (buckets, heads), and gives it to the
        others: where blocks are sharded, its own forward is the only place it can be read in.
        """
        if self.has_table:
            attention: Any = self.layer[0].SelfAttention
            table = attention.table()
        assert table is not None
        relative_bias = ops.RelativeBias(
            table, bidirectional=not self.is_decoder, max_distance=self.max_distance
        )
        stream = self.layer[0](stream, **terms, relative_bias=relative_bias, causal=self.is_decoder)
        if context is not None or "cache" in context_terms:
            stream = self.layer[1](stream, context, **context_terms)
        return self.layer[-1](stream), table
