"""Caches of keys and values, for generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import ops

Pair = tuple[torch.Tensor, torch.Tensor]


class KVCache:
    """The keys and values of one attention layer, with room for `capacity` of each sequence.

    How many a sequence has is a tensor on the device, `lengths`: nothing waits for it. The host
    keeps an upper bound of it, `tokens`, by which a full cache is an error before anything is
    written.

    Args:
        batch: sequences, B.
        kv_heads: heads of keys and values, Hkv.
        capacity: how many keys a sequence has room for, N.
        head_dim: columns of a key.
        value_dim: columns of a value; head_dim if None.
        latent: whether the first value_dim columns of a key are its value, as in `LatentAttention`.
            Then there is no `v`, here and in the methods.
        device, dtype: of the keys and values.

    `Attention` takes it as `cache`: its `attend` appends what is new and attends to all there is.
    So does `LatentAttention`, if it is latent: a key is then a token's latent and its rotary key.

    Raises:
        ValueError: it is latent, and value_dim more than head_dim.

    Example:
        >>> attention = fastattn.nn.Attention(32, 4, causal=True)
        >>> cache = attention.make_cache(batch=2, capacity=16)
        >>> x = torch.randn(2, 5, 32)
        >>> steps = [attention(x[:, :3], cache=cache), attention(x[:, 3:], cache=cache)]
        >>> torch.testing.assert_close(torch.cat(steps, 1), attention(x))
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        latent: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        if latent and value_dim > head_dim:
            raise ValueError(
                f"KVCache: a latent's values are columns of its {head_dim}, got {value_dim}"
            )
        room = (batch, kv_heads, capacity)
        options = {"device": device, "dtype": dtype}
        self.latent = latent
        self.value_dim = value_dim
        # What nobody has written nobody reads.
        self.k = torch.empty((*room, head_dim), **options)
        self.v = None if latent else torch.empty((*room, value_dim), **options)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int32)
        self.tokens = 0

    @property
    def capacity(self) -> int:
        """How many keys a sequence has room for."""
        return self.k.shape[2]

    def append(self, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
        """Write keys and values (B, Hkv, M, D) behind those of each sequence.

        Raises:
            ValueError: there may be no room; nothing was written then.
        """
        new = k.shape[2]
        self._check_room(new)
        ops.append_kv(self.k, self.v, k, v, **self._places())
        self.lengths = self.lengths + new
        self.tokens += new

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, **terms: Any
    ) -> torch.Tensor:
        """Append keys and values, and attend to all of each sequence: (B, H, M, Dv).

        Args:
            q, k, v: (B, heads, M, D), of the new tokens; no v if the cache is latent.
            terms: keyword arguments of `fastattn.decode_attention`.
        """
        self.append(k, v)
        if self.latent:
            terms["value_dim"] = self.value_dim
        return ops.decode_attention(q, self.k, self.v, **self._places(), **terms)

    def update(self, k: torch.Tensor, v: torch.Tensor | None = None) -> Pair:
        """Append keys and values, and return all there are, as sequences of one length have them.

        They are views of the cache, of as many keys as the longest sequence may have.
        """
        self.append(k, v)
        values = self.k[..., : self.value_dim] if self.v is None else self.v
        return self.k[:, :, : self.tokens], values[:, :, : self.tokens]

    def crop(self, lengths: torch.Tensor | int) -> None:
        """Keep the first `lengths` keys of each sequence, (B,) or one number for all.

        A tensor on a GPU is not looked at, so the bound on the host stays.
        """
        self.lengths = self._count_kept(lengths)
        if isinstance(lengths, int):
            self.tokens = min(self.tokens, lengths)
        elif lengths.device.type == "cpu":
            self.tokens = int(self.lengths.max()) if len(self.lengths) else 0

    def reorder(self, sequences: torch.Tensor) -> None:
        """Keep these sequences in this order, (B,) of their places; one may come several times."""
        self.k = self.k[sequences]
        self.v = None if self.v is None else self.v[sequences]
        self.lengths = self.lengths[sequences]

    def _count_kept(self, lengths: torch.Tensor | int) -> torch.Tensor:
        """(B,): how many keys each sequence has if `crop` is told this."""
        if isinstance(lengths, int):
            return self.lengths.clamp(max=lengths)
        return torch.minimum(self.lengths, lengths.to(self.lengths))

    def _check_crop(self, lengths: torch.Tensor | int) -> None:
        """The error of `crop`, if it is one to be expected."""

    def _first_returned(self) -> int:
        """The place of the first key that `update` returns."""
        return 0

    def _kin(self) -> object:
        """What is the same for caches of which one crops and reorders all."""
        return self

    def _places(self) -> dict[str, Any]:
        """Where keys are and go to, as arguments of the ops."""
        return {"lengths": self.lengths}

    def _check_room(self, new: int) -> None:
        if self.tokens + new > self.capacity:
            raise ValueError(
                f"{type(self).__name__}: {self.tokens} of {self.capacity} places may be taken, and "
                f"{new} more are needed"
            )


class CacheStack(Sequence[KVCache]):
    """The caches of a model's layers, one for each. They always hold the same tokens.

    Models of Hugging Face's take one as `cache` too, for sequences of one length: they ask for it
    by `update`, `get_seq_length`, `get_query_offset` and `get_mask_sizes`.

    Raises:
        ValueError: there is no cache.

    Example:
        >>> caches = [fastattn.nn.KVCache(1, 2, 16, 8) for _ in range(2)]
        >>> fastattn.nn.CacheStack(caches)[1] is caches[1]
        True
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        if not caches:
            raise ValueError("CacheStack: there must be one layer at least")
        self._caches = tuple(caches)

    def __len__(self) -> int:
        return len(self._caches)

    def __getitem__(self, layer: Any) -> Any:
        return self._caches[layer]

    def __iter__(self) -> Iterator[KVCache]:
        return iter(self._caches)

    @property
    def lengths(self) -> torch.Tensor:
        """(B,) how many tokens each sequence has."""
        return self._caches[0].lengths

    @property
    def tokens(self) -> int:
        """At most so many tokens a sequence has."""
        return self._caches[0].tokens

    def positions(self, tokens: int) -> torch.Tensor:
        """(B, tokens): where that many new tokens of each sequence stand."""
        lengths = self.lengths
        return lengths[:, None] + torch.arange(tokens, device=lengths.device)

    def update(self, k: torch.Tensor, v: torch.Tensor, layer: int, **kwargs: Any) -> Pair:
        """Append keys and values of one layer, and return all there are, see `KVCache.update`.

        `kwargs` of Hugging Face's models mean nothing here.
        """
        return self._caches[layer].update(k, v)

    def get_seq_length(self, layer: int = 0) -> int:
        """How many tokens there are."""
        return self._caches[layer].tokens

    def get_query_offset(self, layer: int = 0) -> int:
        """Where the next token will stand."""
        return self._caches[layer].tokens

    def get_mask_sizes(self, queries: int, layer: int) -> tuple[int, int]:
        """How many keys `update` will return for so many new ones, and the place of the first."""
        first = self._caches[layer]._first_returned()
        return self._caches[layer].tokens - first + queries, first

    def crop(self, lengths: torch.Tensor | int) -> None:
        """Keep the first `lengths` tokens of each sequence, see `KVCache.crop`.

        Raises:
            ValueError: a `RingKVCache` cannot go back so far. Nothing was changed.
        """
        for cache in self._caches:
            cache._check_crop(lengths)
        for cache in self._leaders():
            cache.crop(lengths)

    def reorder(self, sequences: torch.Tensor) -> None:
        """Keep these sequences in this order, see `KVCache.reorder`."""
        for cache in self._leaders():
            cache.reorder(sequences)

    def _leaders(self) -> list[KVCache]:
        """One cache of each kin."""
        return list({id(cache._kin()): cache for cache in self._caches}.values())

    def repeat(self, times: int) -> None:
        """Make several sequences of each, one after another."""
        places = torch.arange(len(self.lengths), device=self.lengths.device)
        self.reorder(places.repeat_interleave(times))
