"""Caches of an encoder-decoder: what its decoder has read, and what the encoder gave it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import ops
from .cache import CacheStack, KVCache


class ContextCache:
    """The keys and values of a context that one layer attends to: computed once, never added to.

    `Attention` takes it as `cache` in cross attention, with a context in the first call alone.

    Attributes:
        k, v: (B, Hkv, N, D) of B contexts; None until there are any.
        lengths: (B,) how many keys of each count.

    Example:
        >>> attention, cache = fastattn.nn.Attention(32, 4), fastattn.nn.ContextCache()
        >>> x, context = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
        >>> steps = [attention(x[:, :3], context, cache=cache), attention(x[:, 3:], cache=cache)]
        >>> torch.testing.assert_close(torch.cat(steps, 1), attention(x, context))
    """

    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    lengths: torch.Tensor

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        *,
        kv_lengths: torch.Tensor | None = None,
        **terms: Any,
    ) -> torch.Tensor:
        """Attend to all keys: (B * n, H, M, D) to the same, n neighbours sharing a context.

        Args:
            k, v: (B, Hkv, N, D), what is attended to from now on; if None, what there is.
            kv_lengths: (B,) how many of these count; all if None.
            terms: keyword arguments of `fastattn.decode_attention`.

        Raises:
            ValueError: there is nothing to attend to.
        """
        if k is not None:
            self.k, self.v = k, v
            whole = torch.full(k.shape[:1], k.shape[2], device=k.device)
            self.lengths = whole if kv_lengths is None else kv_lengths
        if self.k is None:
            raise ValueError("ContextCache: no context has been read; give one in the first call")
        # Sequences with one context are queries beside each other: its keys are read once.
        shared = q.unflatten(0, (len(self.k), -1)).transpose(1, 2)
        o = ops.decode_attention(
            shared.flatten(2, 3), self.k, self.v, lengths=self.lengths, causal=False, **terms
        )
        return o.unflatten(2, shared.shape[2:4]).transpose(1, 2).flatten(0, 1)

    def reorder(self, contexts: torch.Tensor) -> None:
        """Keep these contexts in this order, (B,) of their places."""
        if self.k is None or self.v is None:
            return
        self.k, self.v = self.k[contexts], self.v[contexts]
        self.lengths = self.lengths[contexts]


class EncoderDecoderCache(CacheStack):
    """The caches of a decoder's layers: of its own tokens, and of the context it attends to.

    Models make it by `make_cache`. In the first call with it a model reads what is to be encoded;
    in those that follow neither the encoder runs nor are keys and values of its output computed.

    Attributes:
        contexts: a `ContextCache` for each layer.
        sharing: how many sequences there are for each context, one after another.

    Example:
        >>> config = fastattn.models.T5Config(vocab_size=50, d_model=32, d_kv=8, num_heads=4)
        >>> model = fastattn.models.T5ForConditionalGeneration(config).eval()
        >>> source, tokens = torch.tensor([[5, 7, 9]]), torch.tensor([[0, 4, 8]])
        >>> cache = model.make_cache(batch=1, capacity=8)
        >>> first = model(source, decoder_input_ids=tokens[:, :2], cache=cache).logits
        >>> last = model(decoder_input_ids=tokens[:, 2:], cache=cache).logits
        >>> whole = model(source, decoder_input_ids=tokens).logits
        >>> torch.testing.assert_close(torch.cat((first, last), 1), whole)
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        super().__init__(caches)
        self.contexts = [ContextCache() for _ in caches]
        self.sharing = 1

    def repeat(self, times: int) -> None:
        """Make several sequences of each, which share its context."""
        super().repeat(times)
        self.sharing *= times

    def reorder(self, sequences: torch.Tensor) -> None:
        """Keep these sequences in this order, see `KVCache.reorder`.

        Where several share a context, they change places among each other alone.

        Raises:
            ValueError: one would get another context, where that is seen without waiting: on a CPU.
                Nothing was changed then.
        """
        if self.sharing > 1:
            places = torch.arange(len(sequences), device=sequences.device)
            moved = sequences // self.sharing != places // self.sharing
            if sequences.device.type == "cpu" and moved.any():
                raise ValueError(
                    f"EncoderDecoderCache: each {self.sharing} sequences share a context and "
                    f"change places among each other alone, got {sequences.tolist()}"
                )
        super().reorder(sequences)
        if self.sharing == 1:
            for context in self.contexts:
                context.reorder(sequences)
