"""Caches whose sequences share the pages of one pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from .. import ops
from .cache import KVCache, Pair


class OutOfPages(RuntimeError):
    """More pages are needed than are free. Nothing was changed."""


class PagedKVCache(KVCache):
    """A `KVCache` whose keys and values lie in pages of one pool, given out as sequences grow.

    Sequences need no room before they have tokens, and share pages: `fork` and `reorder` copy no
    keys, and only a page that is not full is copied, once one of its sequences goes on. Which page
    holds what is known on the host, with how many tokens each sequence has; the table of pages is
    on the device as well. Nothing waits for the device but `crop` and `reorder` for a tensor there.

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
        self.max_pages = max_pages
        self.counts = [0] * batch
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._owners = [0] * pages
        # The last is given out first.
        self._free = list(reversed(range(pages)))
        self._write_counts()
        self._write_table()

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
    def free_pages(self) -> int:
        """How many pages no sequence has."""
        return len(self._free)

    def reserve(self, tokens: int) -> None:
        """Give every sequence the pages that so many more tokens need.

        They are its own: a page that is not full and has other sequences is copied.

        Raises:
            ValueError: a sequence may not have so many pages. Nothing was changed.
            OutOfPages: there are not enough. Nothing was changed.
        """
        self._check_room(tokens)
        shared = self._find_shared() if tokens else []
        wanted = [self._count_pages(count + tokens) for count in self.counts]
        missing = [max(0, n - len(own)) for n, own in zip(wanted, self._pages, strict=True)]
        needed = len(shared) + sum(missing)
        if needed > len(self._free):
            raise OutOfPages(
                f"PagedKVCache: {needed} pages are needed for {tokens} more tokens of "
                f"{self.batch} sequences, and {len(self._free)} are free"
            )
        if needed == 0:
            return
        for own, count in zip(self._pages, missing, strict=True):
            own.extend(self._take_page() for _ in range(count))
        self._copy_pages(shared)
        self._write_table()

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
        used = self.block_table[:, : self._count_pages(self.tokens)].long()
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
        self._release(sequence, 0)
        self._write_counts()

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
        for sequence, (count, most) in enumerate(zip(self.counts, kept, strict=True)):
            self._release(sequence, max(0, min(count, most)))
        self._write_counts()

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

    def _places(self) -> dict[str, Any]:
        return {"lengths": self.lengths, "block_table": self.block_table}

    def _count_pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _find_shared(self) -> list[tuple[int, int]]:
        """(sequence, place) of each page that is written next and has to be copied before.

        Of the sequences that share one the last keeps it, for the others have copies by then.
        """
        owners, found = Counter[int](), []
        for sequence, (count, own) in enumerate(zip(self.counts, self._pages, strict=True)):
            if count % self.page_size:
                place = count // self.page_size
                page = own[place]
                owners[page] += 1
                if owners[page] < self._owners[page]:
                    found.append((sequence, place))
        return found

    def _copy_pages(self, shared: list[tuple[int, int]]) -> None:
        """Give these sequences copies of their pages."""
        if not shared:
            return
        old, new = [], []
        for sequence, place in shared:
            page = self._pages[sequence][place]
            copy = self._take_page()
            self._owners[page] -= 1
            self._pages[sequence][place] = copy
            old.append(page)
            new.append(copy)
        for pool in (self.k, self.v):
            if pool is not None:
                places = torch.tensor([old, new], device=pool.device)
                pool[places[1]] = pool[places[0]]

    def _pick(self, order: list[int]) -> None:
        """Make these the sequences. Those that move or are copies have no pages without tokens."""
        counts = [self.counts[sequence] for sequence in order]
        pages = [
            self._pages[sequence][: self._count_pages(self.counts[sequence])]
            if place != sequence
            else list(self._pages[sequence])
            for place, sequence in enumerate(order)
        ]
        for page in chain.from_iterable(pages):
            self._owners[page] += 1
        for own in self._pages:
            self._give_back(own)
        self.counts, self._pages = counts, pages
        self._write_counts()
        self._write_table()

    def _release(self, sequence: int, count: int) -> None:
        """Leave a sequence so many tokens, and the pages that have them."""
        own, kept = self._pages[sequence], self._count_pages(count)
        self._give_back(own[kept:])
        del own[kept:]
        self.counts[sequence] = count

    def _take_page(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _give_back(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)

    def _write_counts(self) -> None:
        """Tell the device how many tokens there are."""
        self.lengths = torch.tensor(self.counts, dtype=torch.int32, device=self.k.device)
        self.tokens = max(self.counts, default=0)

    def _write_table(self) -> None:
        """Tell the device which pages there are; entries without one are 0 and never looked at."""
        rows = [own + [0] * (self.max_pages - len(own)) for own in self._pages]
        table = torch.tensor(rows, dtype=torch.int32, device=self.k.device)
        self.block_table = table.reshape(self.batch, self.max_pages)

    def _check_sequences(self, sequences: Sequence[int]) -> None:
        wrong = [sequence for sequence in sequences if not 0 <= sequence < self.batch]
        if wrong:
            raise ValueError(f"PagedKVCache: sequences must be in [0, {self.batch}), got {wrong}")
