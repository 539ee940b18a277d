"""Which pages hold which tokens: what `PagedKVCache` knows on the host, for several layers too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch


class OutOfPages(RuntimeError):
    """More pages are needed than are free. Nothing was changed."""


class PageTable:
    """The pages of each sequence, of those that a pool has.

    How many tokens a sequence has is the caller's, as a list `counts`: while a step goes through
    layers that share a table, the first has more than the last.

    Args:
        pages: pages in the pool.
        page_size: tokens of a page.
        batch: sequences. They have no pages at first.
        max_pages: how many a sequence may have.
        device: of `block_table`.

    Attributes:
        pages: the pages of each sequence, in order.
        owners: how many sequences have each page.
        free: the pages that none has; the last is given out first.
        block_table: (batch, max_pages) int32; entries without a page are 0 and never looked at.
    """

    def __init__(self, pages: int, page_size: int, batch: int, max_pages: int, device: Any) -> None:
        self.page_size = page_size
        self.max_pages = max_pages
        self.device = device
        self.pages: list[list[int]] = [[] for _ in range(batch)]
        self.owners = [0] * pages
        self.free = list(reversed(range(pages)))
        self._write()

    def count_pages(self, tokens: int) -> int:
        """How many pages so many tokens need."""
        return -(-tokens // self.page_size)

    def reserve(self, counts: Sequence[int], tokens: int) -> list[tuple[int, int]]:
        """Give every sequence the pages that so many more tokens need, and none but its own.

        Returns:
            (old, new): the pages to be copied, which are not full and have other sequences.

        Raises:
            OutOfPages: there are not enough. Nothing was changed.
        """
        shared = self._find_shared(counts) if tokens else []
        wanted = [self.count_pages(count + tokens) for count in counts]
        missing = [max(0, n - len(own)) for n, own in zip(wanted, self.pages, strict=True)]
        needed = len(shared) + sum(missing)
        if needed > len(self.free):
            raise OutOfPages(
                f"PagedKVCache: {needed} pages are needed for {tokens} more tokens of "
                f"{len(counts)} sequences, and {len(self.free)} are free"
            )
        if needed == 0:
            return []
        for own, count in zip(self.pages, missing, strict=True):
            own.extend(self._take() for _ in range(count))
        copied = []
        for sequence, place in shared:
            old, new = self.pages[sequence][place], self._take()
            self.owners[old] -= 1
            self.pages[sequence][place] = new
            copied.append((old, new))
        self._write()
        return copied

    def release(self, sequence: int, count: int) -> None:
        """Leave a sequence the pages that have its first `count` tokens."""
        own, kept = self.pages[sequence], self.count_pages(count)
        self._give_back(own[kept:])
        del own[kept:]

    def pick(self, order: Sequence[int], counts: Sequence[int]) -> None:
        """Make these the sequences. Those that move or are copies have no pages without tokens."""
        pages = [
            self.pages[sequence][: self.count_pages(counts[sequence])]
            if place != sequence
            else list(self.pages[sequence])
            for place, sequence in enumerate(order)
        ]
        for page in chain.from_iterable(pages):
            self.owners[page] += 1
        for own in self.pages:
            self._give_back(own)
        self.pages = pages
        self._write()

    def _find_shared(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        """(sequence, place) of each page that is written next and has to be copied before.

        Of the sequences that share one the last keeps it, for the others have copies by then.
        """
        owners, found = Counter[int](), []
        for sequence, (count, own) in enumerate(zip(counts, self.pages, strict=True)):
            if count % self.page_size:
                place = count // self.page_size
                page = own[place]
                owners[page] += 1
                if owners[page] < self.owners[page]:
                    found.append((sequence, place))
        return found

    def _take(self) -> int:
        page = self.free.pop()
        self.owners[page] = 1
        return page

    def _give_back(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            self.owners[page] -= 1
            if self.owners[page] == 0:
                self.free.append(page)

    def _write(self) -> None:
        """Tell the device which pages there are."""
        rows = [own + [0] * (self.max_pages - len(own)) for own in self.pages]
        table = torch.tensor(rows, dtype=torch.int32, device=self.device)
        self.block_table = table.reshape(len(self.pages), self.max_pages)
