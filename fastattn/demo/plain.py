"""A Llama of PyTorch's own modules, which the demo trains beside `fastattn.models.llama`.

It shares nothing with ours but the names of the parameters, so that each loads the other's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import Output
from ..models.llama import LlamaConfig


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class PlainAttention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        columns = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(columns, columns, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    """Two products, one gating the other, and a third back to the width."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        columns, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(columns, hidden, bias=False)
        self.up_proj = nn.Linear(columns, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, columns, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainBlock(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = PlainAttention(config)
        self.mlp = PlainMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class PlainBody(nn.Module):
    """Embedding, blocks and the last norm."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        half = config.hidden_size // config.num_attention_heads // 2
        frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
        angles = torch.arange(config.max_position_embeddings)[:, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        cos, sin = self.cos[: input_ids.shape[1]], self.sin[: input_ids.shape[1]]
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class PlainLlama(nn.Module):
    """A Llama without grouped heads and biases, whose embedding is its head too."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = PlainBody(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        """Logits (B, S, V), and with labels the mean cross entropy of each at the token before."""
        logits = self.lm_head(self.model(input_ids))
        loss = None
        if labels is not None:
            predictions = logits[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(predictions, labels[:, 1:].flatten())
        return Output(loss=loss, computed=logits)
