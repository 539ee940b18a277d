"""Attention as a module: projections around `fastattn.attention`, and what modules add to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn as nn

from .. import ops
from ..ops.core.arguments import refuse_nested
from .cache import KVCache
from .context_cache import ContextCache
from .linear import Linear
from .ring_cache import RingKVCache, choose_capacity
from .score_positions import AlibiPositions, RelativePositionBias, ScorePositions
from .tracing import one_node

Pair = tuple[torch.Tensor, torch.Tensor]
Turn = Callable[..., Pair]
"""Turns q and k by positions: called as `RotaryEmbedding` is."""


class KeyValueCache(Protocol):
    """What earlier calls left: `update` appends to it and returns all there is.

    A cache may have a method `attend(q, k, v, **terms)` besides, as `KVCache` has, which is then
    called instead: it appends as well, and attends to what it holds where it lies.
    """

    def update(self, k: torch.Tensor, v: torch.Tensor, /) -> Pair: ...


class Attention(nn.Module):
    """Self-attention or cross attention between an input and an output projection.

    o_proj(attention(q_proj(x), k_proj(context), v_proj(context))), the context being x itself in
    self-attention. The parameters have the names and shapes of Hugging Face's Llama and of its
    many kin: `q_proj`, `k_proj`, `v_proj` and `o_proj`, `q_norm` and `k_norm` with qk_norm (Qwen3),
    `sinks` with sinks (gpt-oss).

    Args:
        embed_dim: the columns of x and of the output.
        num_heads: the heads of the queries, H.
        num_kv_heads: the heads of keys and values, which divide H; H if None. Fewer are
            grouped-query attention, one is multi-query attention.
        head_dim: the columns of a head, D; embed_dim / num_heads if None.
        context_dim: the columns of a context, if they are not embed_dim.
        rotary: a module that turns queries and keys by their positions, as `RotaryEmbedding`.
        relative: a module whose positions enter the scores, as `AlibiPositions` or
            `RelativePositionBias`.
        qk_norm: makes the norms of queries and of keys from the number of columns D, before they
            are turned: `RMSNorm`, or `partial(RMSNorm, eps=1e-6)`.
        causal, window, softcap, scale: as in `fastattn.attention`.
        sinks: whether every head has a learnable logit that takes its share of the softmax, and
            nothing of the output.
        bias: whether q_proj, k_proj and v_proj have biases.
        out_bias: whether o_proj has one; as bias if None.
        dropout: the probability with which a weight of the softmax is dropped in training.
        device, dtype: as in torch.nn.Linear.

    The projections start as torch.nn.Linear's, norms as `qk_norm` makes them, sinks at 0.

    Raises:
        ValueError: the sizes do not fit.

    Sources: Vaswani et al., "Attention Is All You Need" (2017); Ainslie et al., "GQA" (2023);
    Henry et al., "Query-Key Normalization for Transformers" (2020).

    Example:
        >>> rotary = fastattn.nn.RotaryEmbedding(8)
        >>> layer = fastattn.nn.Attention(32, 4, num_kv_heads=2, rotary=rotary, causal=True)
        >>> layer(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        context_dim: int | None = None,
        rotary: nn.Module | None = None,
        relative: ScorePositions | None = None,
        qk_norm: Callable[[int], nn.Module] | None = None,
        causal: bool = False,
        window: int | tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        sinks: bool = False,
        bias: bool = False,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads("Attention", num_heads, num_kv_heads)
        check_dropout("Attention", dropout)
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"Attention: embed_dim must be a multiple of num_heads unless head_dim is "
                    f"given, got {embed_dim} and {num_heads}"
                )
            head_dim = embed_dim // num_heads
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.context_dim = embed_dim if context_dim is None else context_dim
        self.causal = causal
        self.window = window
        self.softcap = softcap
        self.scale = scale
        self.dropout = dropout

        kv_columns = num_kv_heads * head_dim
        self.q_proj = Linear(embed_dim, num_heads * head_dim, bias, device, dtype)
        self.k_proj = Linear(self.context_dim, kv_columns, bias, device, dtype)
        self.v_proj = Linear(self.context_dim, kv_columns, bias, device, dtype)
        out_bias = bias if out_bias is None else out_bias
        self.o_proj = Linear(num_heads * head_dim, embed_dim, out_bias, device, dtype)
        self.rotary = rotary
        self.relative = relative
        self.q_norm = None if qk_norm is None else make_on_device(qk_norm, head_dim, device, dtype)
        self.k_norm = None if qk_norm is None else make_on_device(qk_norm, head_dim, device, dtype)
        self.sinks = (
            nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) if sinks else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the sinks to 0; the other parameters belong to modules that reset their own."""
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    @one_node
    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        rotary: Pair | Turn | None = None,
        positions: torch.Tensor | int | None = None,
        cache: KeyValueCache | ContextCache | None = None,
        **terms: Any,
    ) -> torch.Tensor:
        """(B, M, embed_dim) to (B, M, embed_dim).

        Args:
            x: what the queries are made of.
            context: (B, N, context_dim), what keys and values are made of; x if None, or what a
                `ContextCache` has.
            rotary: tables (cos, sin) for `fastattn.apply_rotary`, which a model of many layers
                computes once; or anything to call as the module `rotary` and in its place.
            positions: those of x for rotary positions, as in `fastattn.apply_rotary`.
            cache: a `KVCache`, or what has a method `update(k, v)`, (B, Hkv, M, D) each, which
                returns what is attended to. A KVCache knows the terms of `decode_attention`. In
                cross attention a `ContextCache`, which is given the context once.
            terms: mask, bias, alibi_slopes, relative_bias, kv_lengths, document_ids, block_mask and
                score_mods of `fastattn.attention`.

        Raises:
            TypeError: terms ask for more than the output.
            ValueError: x or context does not fit, or rotary positions meet a context.
        """
        check_input("Attention", "x", x, self.embed_dim)
        check_terms("Attention", terms)
        if context is not None:
            check_input("Attention", "context", context, self.context_dim)
        turn = self.rotary if rotary is None else rotary
        if turn is not None and (context is not None or isinstance(cache, ContextCache)):
            raise ValueError(
                "Attention: rotary positions are those of one sequence, so there is no context"
            )
        if isinstance(cache, ContextCache):
            return self._attend_context(x, context, cache, terms)
        q, k, v = self._project(x, x if context is None else context)
        if turn is not None:
            q, k = rotate_heads(q, k, turn, positions, interleaved=False)
        attend: Callable[..., torch.Tensor] | None = getattr(cache, "attend", None)
        if attend is not None:
            o = self._attend_cached(attend, cache, q, k, v, terms)
            return self.o_proj(o.transpose(1, 2).flatten(2))
        if cache is not None:
            k, v = cache.update(k, v)
        relative = {} if self.relative is None else self.relative.terms(q.shape[2], k.shape[2])
        o = ops.attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
            sinks=self.sinks,
            dropout_p=self.dropout if self.training else 0.0,
            **relative,
            **terms,
        )
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def _attend_cached(
        self,
        attend: Callable[..., torch.Tensor],
        cache: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        terms: dict[str, Any],
    ) -> torch.Tensor:
        """Attention by the cache itself."""
        self._check_dropout()
        relative = {}
        if self.relative is not None:
            relative = self.relative.terms(q.shape[2], cache.capacity)
        options = {"window": self.window, "softcap": self.softcap, "sinks": self.sinks}
        return attend(q, k, v, causal=self.causal, scale=self.scale, **options, **relative, **terms)

    def _attend_context(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None,
        cache: ContextCache,
        terms: dict[str, Any],
    ) -> torch.Tensor:
        """Cross attention to a context, which is projected in the call that it is given in."""
        self._check_dropout()
        if self.causal or self.window is not None or self.relative is not None:
            raise ValueError(
                "Attention: with a ContextCache there is no causal, window or relative attention"
            )
        heads = self._project(x, context)
        options = {"softcap": self.softcap, "sinks": self.sinks, "scale": self.scale}
        o = cache.attend(*heads, **options, **terms)
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def _check_dropout(self) -> None:
        if self.training and self.dropout > 0.0:
            raise ValueError("Attention: there is no dropout of attention to a cache; call eval()")

    def make_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache with room for `capacity` tokens of `batch` sequences.

        With a window that is much smaller it is a `RingKVCache`, which keeps no more than it shows.
        """
        weight = self.k_proj.weight
        options = {"device": weight.device, "dtype": weight.dtype}
        sizes = (self.num_kv_heads, capacity, self.head_dim)
        before = self.window[0] if isinstance(self.window, Sequence) else self.window
        # Positions of one's own may ask where keys stand.
        by_distance = (type(None), AlibiPositions, RelativePositionBias)
        if before is not None and isinstance(self.relative, by_distance):
            ring = choose_capacity(before)
            if ring < capacity:
                sizes = (self.num_kv_heads, ring, self.head_dim)
                return RingKVCache(batch, *sizes, window=before, **options)
        return KVCache(batch, *sizes, **options)

    def _project(self, x: torch.Tensor, context: torch.Tensor | None) -> list[torch.Tensor]:
        """q, and of a context k and v as well, (B, heads, length, D)."""
        heads: list[torch.Tensor] = []
        sources = ((self.q_proj, self.q_norm, x), (self.k_proj, self.k_norm, context))
        for projection, norm, source in (*sources, (self.v_proj, None, context)):
            if source is not None:
                split = split_heads(projection(source), self.head_dim)
                heads.append(split if norm is None else norm(split))
        return [x.transpose(1, 2) for x in heads]

    def extra_repr(self) -> str:
        """The sizes, and what differs from its default."""
        text = f"{self.embed_dim}, {self.num_heads}, {self.num_kv_heads}, {self.head_dim}"
        options = ("causal", "window", "softcap", "scale", "dropout")
        return ", ".join(
            [text, *(f"{name}={getattr(self, name)}" for name in options if getattr(self, name))]
        )


def split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(B, S, heads * D) as (B, S, heads, D).

    How many heads there are is left to x: of a projection that is split over ranks, one has a part.
    """
    return x.unflatten(-1, (-1, head_dim))


def rotate_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    turn: Pair | Turn,
    positions: torch.Tensor | int | None,
    *,
    interleaved: bool,
) -> Pair:
    """q and k, (B, heads, S, D), turned by tables (cos, sin), or by a module called with both."""
    if callable(turn):
        return turn(q, k, positions)
    cos, sin = turn
    return ops.apply_rotary_qk(q, k, cos, sin, interleaved=interleaved, positions=positions)


def make_on_device(
    make: Callable[[int], nn.Module], columns: int, device: Any, dtype: Any
) -> nn.Module:
    """A module of so many columns, on the device and in the dtype of its owner."""
    # Made there, for from a default device without numbers it could not be moved.
    with torch.get_default_device() if device is None else torch.device(device):
        module = make(columns)
    return module.to(device=device, dtype=dtype)


def check_heads(name: str, num_heads: int, num_kv_heads: int) -> None:
    """Key heads divide query heads."""
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"{name}: num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}"
        )


def check_dropout(name: str, dropout: float) -> None:
    """A probability below 1."""
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{name}: dropout must be in [0, 1), got {dropout}")


def check_input(name: str, argument: str, x: torch.Tensor, columns: int) -> None:
    """(B, S, columns)."""
    if x.is_nested:
        refuse_nested(name, argument)
    if x.dim() != 3 or x.shape[-1] != columns:
        raise ValueError(
            f"{name}: {argument} must be (B, S, {columns}), got the shape {tuple(x.shape)}"
        )


def check_terms(name: str, terms: dict[str, Any]) -> None:
    """Keyword arguments of attention that leave a module one output."""
    if terms.get("return_lse"):
        raise TypeError(
            f"{name}: return_lse must not be given, for a module returns its output alone; "
            "fastattn.attention returns both"
        )
