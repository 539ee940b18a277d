"""Caches whose sequences share the pages of one pool."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import ops
from .cache import KVCache, Pair
from .page_table import PageTable


class PagedKVCache(KVCache):
    """A `KVCache` whose keys and values lie in pages of one pool, given out as sequences grow.

    Sequences need no room before they have tokens, and share pages: `fork` and `reorder` copy no
    keys, and only a page that is not full is copied, once one of its sequences goes on. Which page
    holds what is known on the host, with how many tokens each sequence has; the table of pages is
    on the device as well. Nothing waits for the device but `crop` and `reorder` for a tensor there.

    Layers of a model that have the same tokens share one table by `beside`: pages are then looked
    for, and the table written, once a step.

    Args:
        pages: pages in the pool, P.
        page_size: keys of a page.
        kv_heads: heads of keys and values, Hkv.
        head_dim: columns of a key.
        batch: sequences, B. They have no tokens at first.
        value_dim, latent: as in `KVCache`.
        max_pages: how many pages a sequence may have; all if None.
        device, dtype: of the keys and values.

    Attributes:
        k, v: (P, Hkv, page_size, D), the pool.
        block_table: (B, max_pages) int32, on the device.
        counts: how many tokens each sequence has, on the host.

    Raises:
        ValueError: a size does not fit.

    Example:
        >>> attention = fastattn.nn.Attention(32, 4, causal=True).eval()
        >>> cache = fastattn.nn.PagedKVCache(6, 4, 4, 8, batch=2)
        >>> prompt, new = torch.randn(1, 9, 32), torch.randn(2, 1, 32)
        >>> cache.batch, cache.free_pages
        (2, 6)
        >>> _ = attention(prompt.expand(2, -1, -1), cache=cache)
        >>> cache.fork(0, into=1)  # the same 3 pages for both
        >>> cache.free_pages
        3
        >>> o = attention(new, cache=cache)  # the last of them is copied
        >>> cache.free_pages
        2
        >>> whole = attention(torch.cat((prompt.expand(2, -1, -1), new), 1))
        >>> torch.testing.assert_close(o, whole[:, 9:])

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    PagedAttention" (2023).
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        batch: int,
        value_dim: int | None = None,
        latent: bool = False,
        max_pages: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        max_pages = pages if max_pages is None else max_pages
        sizes = {"pages": pages, "page_size": page_size, "max_pages": max_pages}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"PagedKVCache: {name} must be positive, got {size}")
        options = {"device": device, "dtype": dtype}
        # A page lies in the pool as a sequence does in a KVCache.
        super().__init__(
            pages, kv_heads, page_size, head_dim, value_dim=value_dim, latent=latent, **options
        )
        self.counts = [0] * batch
        self._table = PageTable(pages, page_size, batch, max_pages, self.k.device)
        # All caches of the table, this among them.
        self._layers = [self]
        self._set_counts(list)

    @property
    def page_size(self) -> int:
        """How many keys a page has."""
        return self.k.shape[2]

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return len(self.counts)

    @property
    def capacity(self) -> int:
        """How many keys a sequence has room for, if there are pages."""
        return self.max_pages * self.page_size

    @property
    def max_pages(self) -> int:
        """How many pages a sequence may have."""
        return self._table.max_pages

    @property
    def free_pages(self) -> int:
        """How many pages no sequence has."""
        return len(self._table.free)

    @property
    def block_table(self) -> torch.Tensor:
        """(B, max_pages) int32, on the device: the pages of each sequence, in order."""
        return self._table.block_table

    def beside(self) -> PagedKVCache:
        """A cache for another layer, of the same shape, with a pool of its own and one table.

        Both are to get the same tokens, layer after layer. What frees, forks, crops or reorders the
        sequences of one does so with all that are beside it.

        Raises:
            ValueError: there are tokens already, which the other layer would lack.

        Example:
            >>> first = fastattn.nn.PagedKVCache(6, 4, 4, 8, batch=1)
            >>> caches = fastattn.nn.CacheStack([first, first.beside(), first.beside()])
        """
        if any(self.counts):
            raise ValueError("PagedKVCache: there must be no tokens yet for a layer beside it")
        other = copy.copy(self)
        other.k = torch.empty_like(self.k)
        other.v = None if self.v is None else torch.empty_like(self.v)
        other.counts = list(self.counts)
        self._layers.append(other)
        return other

    def reserve(self, tokens: int) -> None:
        """Give every sequence the pages that so many more tokens need.

        They are its own: a page that is not full and has other sequences is copied.

        Raises:
            ValueError: a sequence may not have so many pages. Nothing was changed.
            OutOfPages: there are not enough. Nothing was changed.
        """
        self._check_room(tokens)
        copied = self._table.reserve(self.counts, tokens)
        if not copied:
            return
        old, new = torch.tensor(copied, device=self.k.device).unbind(1)
        for layer in self._layers:
            for pool in (layer.k, layer.v):
                if pool is not None:
                    pool[new] = pool[old]

    def append(self, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
        """Write keys and values (B, Hkv, M, D) behind those of each sequence.

        Raises:
            ValueError, OutOfPages: as `reserve`; nothing was written then.
        """
        new = k.shape[2]
        self.reserve(new)
        ops.append_kv(self.k, self.v, k, v, **self._places())
        self.counts = [count + new for count in self.counts]
        self.lengths = self.lengths + new
        self.tokens += new

    def update(self, k: torch.Tensor, v: torch.Tensor | None = None) -> Pair:
        """Append keys and values, and return copies of all there are, as `KVCache.update`."""
        self.append(k, v)
        used = self.block_table[:, : self._table.count_pages(self.tokens)].long()
        # (B, pages, Hkv, page, D) to (B, Hkv, N, D)
        keys, values = (
            None if pool is None else pool[used].transpose(1, 2).flatten(2, 3)[:, :, : self.tokens]
            for pool in (self.k, self.v)
        )
        assert keys is not None
        return keys, keys[..., : self.value_dim] if values is None else values

    def free(self, sequence: int) -> None:
        """Take all tokens from a sequence, and give back the pages that no other has."""
        self._check_sequences([sequence])
        self._table.release(sequence, 0)
        self._set_counts(
            lambda counts: [0 if i == sequence else count for i, count in enumerate(counts)]
        )

    def fork(self, sequence: int, into: int | Sequence[int]) -> None:
        """Make one sequence or several what another is, in the same pages; what they had is freed.

        Raises:
            ValueError: there is no such sequence.
        """
        others = [into] if isinstance(into, int) else list(into)
        self._check_sequences([sequence, *others])
        order = list(range(self.batch))
        for other in others:
            order[other] = sequence
        self._pick(order)

    def crop(self, lengths: torch.Tensor | int) -> None:
        """Keep the first `lengths` keys of each sequence, (B,) or one number for all.

        Pages beyond are given back, reserved ones too. A tensor on a GPU is waited for.
        """
        kept = [lengths] * self.batch if isinstance(lengths, int) else lengths.tolist()
        kept = [max(0, most) for most in kept]
        for sequence, (count, most) in enumerate(zip(self._most_tokens(), kept, strict=True)):
            self._table.release(sequence, min(count, most))
        self._set_counts(lambda counts: list(map(min, counts, kept)))

    def reorder(self, sequences: torch.Tensor) -> None:
        """Keep these sequences in this order, (B,) of their places; one may come several times.

        They share pages, and no keys are copied; what those that move had reserved is given back.
        A tensor on a GPU is waited for.

        Raises:
            ValueError: there is no such sequence.
        """
        order = sequences.tolist()
        self._check_sequences(order)
        self._pick(order)

    def _kin(self) -> object:
        return self._table

    def _places(self) -> dict[str, Any]:
        return {"lengths": self.lengths, "block_table": self.block_table}

    def _pick(self, order: list[int]) -> None:
        """Make these the sequences."""
        self._table.pick(order, self._most_tokens())
        self._set_counts(lambda counts: [counts[sequence] for sequence in order])

    def _most_tokens(self) -> list[int]:
        """How many tokens each sequence has in the layer that has the most of them."""
        return list(map(max, zip(*(layer.counts for layer in self._layers), strict=True)))

    def _set_counts(self, change: Callable[[list[int]], list[int]]) -> None:
        """Change how many tokens there are in each layer, and tell the device."""
        told: dict[tuple[int, ...], torch.Tensor] = {}
        for layer in self._layers:
            layer.counts = change(layer.counts)
            key = tuple(layer.counts)
            if key not in told:
                told[key] = torch.tensor(key, dtype=torch.int32, device=self.k.device)
            # Layers may have one tensor, for nothing writes into it.
            layer.lengths = told[key]
            layer.tokens = max(key, default=0)

    def _check_sequences(self, sequences: Sequence[int]) -> None:
        wrong = [sequence for sequence in sequences if not 0 <= sequence < self.batch]
        if wrong:
            raise ValueError(f"PagedKVCache: sequences must be in [0, {self.batch}), got {wrong}")
