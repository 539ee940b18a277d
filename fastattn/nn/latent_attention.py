"""Multi-head latent attention, whose keys and values come from one small latent a token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from .. import ops
from .attention import (
    KeyValueCache,
    Pair,
    Turn,
    check_dropout,
    check_heads,
    check_input,
    check_terms,
    make_on_device,
    rotate_heads,
    split_heads,
)
from .cache import KVCache
from .hooks import has_own_hooks
from .linear import Linear
from .mlp import is_only_linear
from .norm import RMSNorm
from .tracing import one_node


class LatentAttention(nn.Module):
    """Self-attention of DeepSeek-V2 and V3 (MLA): low-rank queries, keys and values.

    A token's keys and values of all heads are products of one latent of kv_lora_rank columns,
    beside which stands a key part for rotary positions that all heads share. The parameters have
    the names and shapes of Hugging Face's `DeepseekV3Attention`: `q_a_proj`, `q_a_layernorm` and
    `q_b_proj` (or `q_proj` alone), `kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj`, `o_proj`.

    Args:
        embed_dim: the columns of x and of the output.
        num_heads: the heads, H.
        kv_lora_rank: the columns of the latent of keys and values.
        qk_nope_head_dim: the columns of a head's queries and keys without positions.
        qk_rope_head_dim: the columns, beside them, that rotary positions turn.
        v_head_dim: the columns of a head's values.
        q_lora_rank: the columns of the latent of the queries; None for queries without one.
        rotary: a module that turns the rotary parts, as
            `RotaryEmbedding(qk_rope_head_dim, interleaved=True)`.
        interleaved: whether tables that are given to forward turn pairs of neighbouring columns, as
            DeepSeek's checkpoints want it.
        norm: makes the norms of the latents from their number of columns; RMSNorm with an eps of
            1e-6 if None.
        causal: as in `fastattn.attention`.
        scale: (qk_nope_head_dim + qk_rope_head_dim)^-0.5 if None. With YaRN, DeepSeek multiplies it
            by the square of its mscale.
        bias: whether q_a_proj, kv_a_proj_with_mqa and o_proj have biases.
        dropout: the probability with which a weight of the softmax is dropped in training.
        device, dtype: as in torch.nn.Linear.

    The projections start as torch.nn.Linear's, norms as `norm` makes them.

    Raises:
        ValueError: the sizes do not fit.

    Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1.

    Example:
        >>> rotary = fastattn.nn.RotaryEmbedding(4)
        >>> sizes = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
        >>> layer = fastattn.nn.LatentAttention(32, 2, kv_lora_rank=16, rotary=rotary, **sizes)
        >>> layer(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        rotary: nn.Module | None = None,
        interleaved: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
        causal: bool = True,
        scale: float | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_heads("LatentAttention", num_heads, num_heads)
        check_dropout("LatentAttention", dropout)
        if qk_rope_head_dim < 2 or qk_rope_head_dim % 2:
            raise ValueError(
                "LatentAttention: qk_rope_head_dim must be even and positive, "
                f"got {qk_rope_head_dim}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.q_lora_rank = q_lora_rank
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.interleaved = interleaved
        self.causal = causal
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 if scale is None else scale
        self.dropout = dropout

        norm = partial(RMSNorm, eps=1e-6) if norm is None else norm

        def linear(columns_in: int, columns_out: int, bias: bool = False) -> Linear:
            return Linear(columns_in, columns_out, bias, device, dtype)

        q_columns = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = linear(embed_dim, q_columns)
        else:
            self.q_a_proj = linear(embed_dim, q_lora_rank, bias)
            self.q_a_layernorm = make_on_device(norm, q_lora_rank, device, dtype)
            self.q_b_proj = linear(q_lora_rank, q_columns)
        self.kv_a_proj_with_mqa = linear(embed_dim, kv_lora_rank + qk_rope_head_dim, bias)
        self.kv_a_layernorm = make_on_device(norm, kv_lora_rank, device, dtype)
        self.kv_b_proj = linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim))
        self.o_proj = linear(num_heads * v_head_dim, embed_dim, bias)
        self.rotary = rotary

    @one_node
    def forward(
        self,
        x: torch.Tensor,
        *,
        rotary: Pair | Turn | None = None,
        positions: torch.Tensor | int | None = None,
        cache: KeyValueCache | None = None,
        absorbed: bool = False,
        **terms: Any,
    ) -> torch.Tensor:
        """(B, M, embed_dim) to (B, M, embed_dim).

        Args:
            x: the tokens.
            rotary: tables (cos, sin) for `fastattn.apply_rotary`; or anything to call as the module
                `rotary` and in its place.
            positions: those of x, as in `fastattn.apply_rotary`.
            cache: a `KVCache` of `make_cache`, whose latents are attended to as with absorbed, and
                which knows the terms of `decode_attention`. Or what has a method
                `update(latents, rotary_keys)`, (B, 1, M, kv_lora_rank) and
                (B, 1, M, qk_rope_head_dim), which returns what is attended to.
            absorbed: attend to the latents themselves, with queries multiplied by what would make
                keys of them; values are made of the result. All heads then share one key head of
                kv_lora_rank + qk_rope_head_dim columns, and no token's keys and values are ever in
                memory: the way to decode with a long cache. It needs a kv_b_proj that is a linear
                layer without a bias, and nothing else.
            terms: mask, bias, relative_bias, kv_lengths and so on, see `fastattn.attention`.

        Raises:
            TypeError: terms ask for more than the output.
            ValueError: x does not fit, nothing turns, or kv_b_proj cannot be absorbed.
        """
        check_input("LatentAttention", "x", x, self.embed_dim)
        check_terms("LatentAttention", terms)
        q_nope, q_rope = self._queries(x)
        latent, k_rope = self._latents(x)
        turn = self.rotary if rotary is None else rotary
        if turn is None:
            raise ValueError("LatentAttention: rotary must be given, here or to the module")
        q_rope, k_rope = rotate_heads(q_rope, k_rope, turn, positions, interleaved=self.interleaved)
        kept = cache if isinstance(cache, KVCache) and cache.latent else None
        if cache is not None and kept is None:
            latent, k_rope = cache.update(latent, k_rope)
        if absorbed or kept is not None:
            o = self._attend_to_latents(q_nope, q_rope, latent, k_rope, kept, terms)
        else:
            o = self._attend(q_nope, q_rope, latent, k_rope, terms)
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def make_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache with room for `capacity` tokens of `batch` sequences: a latent of each, no more.

        A token takes kv_lora_rank + qk_rope_head_dim numbers, whatever the number of heads is.
        """
        weight = self.kv_a_proj_with_mqa.weight
        return KVCache(
            batch,
            1,
            capacity,
            self.kv_lora_rank + self.qk_rope_head_dim,
            value_dim=self.kv_lora_rank,
            latent=True,
            device=weight.device,
            dtype=weight.dtype,
        )

    def _queries(self, x: torch.Tensor) -> Pair:
        """The parts without and with positions, (B, H, M, columns)."""
        if self.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = split_heads(q, self.qk_nope_head_dim + self.qk_rope_head_dim).transpose(1, 2)
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return q_nope, q_rope

    def _latents(self, x: torch.Tensor) -> Pair:
        """What keys and values are made of, and the rotary keys: (B, 1, M, columns) each."""
        both = self.kv_a_proj_with_mqa(x)[:, None]
        latent, k_rope = both.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return self.kv_a_layernorm(latent), k_rope

    def _attend(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        terms: dict[str, Any],
    ) -> torch.Tensor:
        """Attention to keys and values made of the latents, (B, H, M, v_head_dim)."""
        kv = split_heads(self.kv_b_proj(latent[:, 0]), self.qk_nope_head_dim + self.v_head_dim)
        k_nope, v = kv.transpose(1, 2).split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        return self._attention(q, k, v, terms)

    def _attend_to_latents(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        cache: KVCache | None,
        terms: dict[str, Any],
    ) -> torch.Tensor:
        """The same, as attention to the latents: W_v (P latent) for (P latent) W_v.

        With a cache it is to those that are in it, too.
        """
        # Hooks for every module are no reason to refuse: they hear of all but this one.
        if not is_only_linear(self.kv_b_proj, has_own_hooks) or self.kv_b_proj.bias is not None:
            raise ValueError(
                "LatentAttention: absorbed=True needs kv_b_proj to be a linear layer without hooks "
                "of its own or a bias and with plain parameters, and so does a KVCache; got "
                f"{type(self.kv_b_proj).__name__}"
            )
        # (H, columns, kv_lora_rank)
        weight = self.kv_b_proj.weight.unflatten(0, (q_nope.shape[1], -1))
        to_key, to_value = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        q = torch.cat((ops.matmul(q_nope, to_key), q_rope), dim=-1)
        k = torch.cat((latent, k_rope), dim=-1)
        if cache is None:
            o = self._attention(q, k, latent, terms)
        elif self.training and self.dropout > 0.0:
            raise ValueError(
                "LatentAttention: there is no dropout of attention to a cache; call eval()"
            )
        else:
            o = cache.attend(q, k, causal=self.causal, scale=self.scale, **terms)
        return ops.matmul(o, to_value.mT)

    def _attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: dict[str, Any]
    ) -> torch.Tensor:
        dropout_p = self.dropout if self.training else 0.0
        return ops.attention(
            q, k, v, causal=self.causal, scale=self.scale, dropout_p=dropout_p, **terms
        )

    def extra_repr(self) -> str:
        """The sizes of heads, and what differs from its default."""
        text = (
            f"{self.embed_dim}, {self.num_heads}, qk_nope_head_dim={self.qk_nope_head_dim}, "
            f"qk_rope_head_dim={self.qk_rope_head_dim}, v_head_dim={self.v_head_dim}"
        )
        if not self.causal:
            text += ", causal=False"
        return text if not self.dropout else f"{text}, dropout={self.dropout}"
