"""GPT-2.

Its linear layers keep the layout of its checkpoints: weights are (in, out), and one layer gives
queries, keys and values side by side. The kernels read both where they lie.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn

from ..nn import CacheStack, Dropout, KVCache, LayerNorm, LearnedPositions, add_norm
from ..nn.attention import split_heads
from ..nn.block import Stream
from ..nn.linear import Conv1D
from ._arguments import embed
from ._base import Model
from ._config import Config
from ._decoder import CausalLM, SequenceClassifier, own_terms
from ._layers import ACTIVATIONS, attend, find_head_dim
from ._masks import mask_terms
from ._outputs import Output

# Scores are always computed in float32 here, and heads with a summary are not among ours.
SUMMARY = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")
HARMLESS = frozenset(["n_ctx", "reorder_and_upcast_attn", *(f"summary_{name}" for name in SUMMARY)])


@dataclass(kw_only=True)
class GPT2Config(Config):
    """The shape of a GPT-2; names and defaults are those of transformers' GPT2Config."""

    model_type: ClassVar[str] = "gpt2"
    harmless: ClassVar[frozenset[str]] = HARMLESS

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.supports("activation_function", *ACTIVATIONS)

    @property
    def hidden_size(self) -> int:
        """n_embd."""
        return self.n_embd

    @property
    def head_dim(self) -> int:
        """The columns of a head."""
        return find_head_dim(self, "n_embd", "n_head")

    def scale(self, layer: int) -> float:
        """The factor of the scores in a layer."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


class GPT2Attention(nn.Module):
    """Causal self-attention between two linear layers."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.scale(layer)
        self.dropout = config.attn_pdrop
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def make_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache with room for `capacity` tokens of `batch` sequences."""
        weight = self.c_attn.weight
        heads = weight.shape[1] // (3 * self.head_dim)
        options = {"device": weight.device, "dtype": weight.dtype}
        return KVCache(batch, heads, capacity, self.head_dim, **options)

    def forward(self, x: torch.Tensor, cache: KVCache | None = None, **terms: Any) -> torch.Tensor:
        """(B, S, C) to the same; `terms` are keyword arguments of `fastattn.attention`."""
        q, k, v = self.c_attn(x).chunk(3, -1)
        if cache is not None:
            q, k, v = (split_heads(x, self.head_dim).transpose(1, 2) for x in (q, k, v))
            o = cache.attend(q, k, v, scale=self.scale, **terms)
            return self.c_proj(o.transpose(1, 2).flatten(2))
        dropout_p = self.dropout if self.training else 0.0
        options = {"causal": True, "scale": self.scale, "dropout_p": dropout_p}
        return self.c_proj(attend(q, k, v, self.head_dim, **options, **terms))


class GPT2MLP(nn.Module):
    """Two linear layers, with the activation in the first one's kernel."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        hidden = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.c_fc = Conv1D(config.n_embd, hidden, ACTIVATIONS[config.activation_function])
        self.c_proj = Conv1D(hidden, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) to the same."""
        return self.c_proj(self.c_fc(x))


class GPT2Block(nn.Module):
    """Attention and feed-forward layer, each after a norm, as a step from stream to stream.

    Dropout and addition of what a layer gives are one kernel with the norm that follows: the last
    one of a block is left to the next block, or to the last norm of the model.
    """

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.dropout = config.resid_pdrop
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, stream: Stream, **terms: Any) -> Stream:
        """(branch, residual) to the same; `terms` are keyword arguments of `fastattn.attention`."""
        dropout_p = self.dropout if self.training else 0.0
        x, residual = add_norm(*stream, self.ln_1, dropout_p)
        x, residual = add_norm(self.attn(x, **terms), residual, self.ln_2, dropout_p)
        return self.mlp(x), residual


class GPT2Model(Model):
    """Embeddings, blocks and the last norm of a GPT-2."""

    config_class = GPT2Config
    base_prefix = "transformer"
    ignored = (r"\.attn\.(masked_)?bias$",)

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = LearnedPositions(config.n_positions, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.finish()

    def attentions(self) -> Iterator[Any]:
        """The attention of each layer."""
        return (block.attn for block in self.h)

    def initialize(self, module: nn.Module) -> None:
        """As transformers: what feeds the residual stream starts smaller the more there is."""
        super().initialize(module)
        if isinstance(module, Conv1D):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, GPT2Attention | GPT2MLP):
            std = self.config.initializer_range / (2 * self.config.n_layer) ** 0.5
            nn.init.normal_(module.c_proj.weight, std=std)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: CacheStack | None = None,
    ) -> Output:
        """(B, S) tokens to the last hidden states, (B, S, C); see `RotaryDecoder.forward`."""
        embedded = embed(self.wte, input_ids, inputs_embeds)
        terms = mask_terms(attention_mask, *embedded.shape[:2])
        if cache is not None and position_ids is None:
            position_ids = cache.positions(embedded.shape[1])
        stream: Stream = self.drop(self.wpe(embedded, position_ids)), None
        for block, own in zip(self.h, own_terms(self, cache, terms), strict=True):
            stream = self.run(block, stream, **own)
        dropout_p = self.config.resid_pdrop if self.training else 0.0
        hidden, _ = add_norm(*stream, self.ln_f, dropout_p)
        return Output(last_hidden_state=hidden)


class GPT2LMHeadModel(CausalLM):
    """A GPT-2 with the logits of the next token."""

    config_class = GPT2Config
    body_class = GPT2Model
    base_prefix = "transformer"
    tied: ClassVar[Mapping[str, str]] = {"lm_head.weight": "transformer.wte.weight"}
    ignored = GPT2Model.ignored

    transformer: GPT2Model


class GPT2ForSequenceClassification(SequenceClassifier):
    """A GPT-2 with one answer for a sequence, or a reward."""

    config_class = GPT2Config
    body_class = GPT2Model
    base_prefix = "transformer"
    ignored = GPT2Model.ignored

    transformer: GPT2Model


MODELS: tuple[type[Model], ...] = (GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2Model)
