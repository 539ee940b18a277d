"""Caches that keep what a window shows, and write over what it has left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import ops
from .cache import KVCache, Pair


class RingKVCache(KVCache):
    """A `KVCache` for attention in a window: the last `capacity` keys of each sequence.

    A key's place is its number modulo `capacity`, so that each is written over once the window has
    left it, and there is no end to the tokens that may come. A call with no more than capacity -
    window new tokens attends to the ring where it lies. One with more, such as a prompt, attends to
    copies of the window before it and to what is new; this is kept until the next call writes the
    end of it into the ring, so that prompts of different lengths can be cropped in between.

    Args:
        batch, kv_heads, head_dim, value_dim, latent, device, dtype: as in `KVCache`.
        capacity: how many keys of each sequence are kept.
        window: how many keys before its own place a query sees, fewer than capacity.

    Places in the ring are not those in the sequence, which no term but `score_mods` notices: those
    are refused. `crop` goes back behind the last call, to anywhere in it, and further if it is by
    no more than capacity - window tokens.

    Raises:
        ValueError: the window does not fit.

    Example:
        >>> attention = fastattn.nn.Attention(32, 4, causal=True, window=3)
        >>> cache = fastattn.nn.RingKVCache(2, 4, 5, 8, window=3)
        >>> x = torch.randn(2, 20, 32)
        >>> steps = [attention(part, cache=cache) for part in x.split([7, 1, 2, 10], 1)]
        >>> torch.testing.assert_close(torch.cat(steps, 1), attention(x))

    Source: the rolling buffer of Jiang et al., "Mistral 7B" (2023).
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        window: int,
        value_dim: int | None = None,
        latent: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if not 0 <= window < capacity:
            raise ValueError(
                f"RingKVCache: window must be in [0, {capacity}), the capacity, got {window}"
            )
        options = {"value_dim": value_dim, "latent": latent, "device": device, "dtype": dtype}
        super().__init__(batch, kv_heads, capacity, head_dim, **options)
        self.window = window
        # The new keys and values of the last call, and how many tokens there were before.
        self._unwritten: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | None = None
        # How far each sequence had got in the ring when it was cropped.
        self._reached = torch.zeros_like(self.lengths)
        self._make_laps()

    def append(self, k: torch.Tensor, v: torch.Tensor | None = None) -> None:
        """Put keys and values (B, Hkv, M, D) behind those of each sequence."""
        self._write()
        new = k.shape[2]
        fits = self._fits(new)
        # Without tokens what is wrong with the others is an error all the same.
        written = [x if fits or x is None else x[:, :, :0] for x in (k, v)]
        lengths = self.lengths - self._first_of_laps(new)
        ops.append_kv(self.k, self.v, *written, lengths=lengths, block_table=self._laps)  # type: ignore[arg-type]
        if not fits:
            self._unwritten = k.detach(), None if v is None else v.detach(), self.lengths
        self.lengths = self.lengths + new
        self.tokens += new

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None, **terms: Any
    ) -> torch.Tensor:
        """Append keys and values, and attend to those in the window: (B, H, M, Dv).

        Args:
            q, k, v: (B, heads, M, D), of the new tokens; no v if the cache is latent.
            terms: keyword arguments of `fastattn.decode_attention`, a window among them.

        Raises:
            ValueError: there is no window, or a larger one than the cache has, or score_mods.
        """
        self._check_terms(terms)
        starts = terms.pop("starts", None)
        if self._fits(k.shape[2]):
            self.append(k, v)
            first = self._first_of_laps(0)
            keys, values, lengths = self.k, self.v, self.lengths - first
            terms["block_table"] = self._laps
        else:
            keys, values, before = self._join_recent(k, v)
            lengths = torch.full_like(self.lengths, keys.shape[2])
            # A sequence with fewer tokens has nothing in the first places.
            first = self.lengths - before
            starts = torch.zeros_like(self.lengths) if starts is None else starts
            self.append(k, v)
        if starts is not None:
            terms["starts"] = starts - first
        if self.latent:
            terms["value_dim"] = self.value_dim
        return ops.decode_attention(q, keys, values, lengths=lengths, **terms)

    def update(self, k: torch.Tensor, v: torch.Tensor | None = None) -> Pair:
        """Append keys and values, and return copies of what new queries see, behind the window.

        As sequences of one length have them: no more than `window` of those before, then the new.
        """
        keys, values, _ = self._join_recent(k, v)
        self.append(k, v)
        return keys, keys[..., : self.value_dim] if values is None else values

    def crop(self, lengths: torch.Tensor | int) -> None:
        """Keep the first `lengths` keys of each sequence, (B,) or one number for all.

        Raises:
            ValueError: keys that the window then shows have been written over. A tensor on a GPU
                is not looked at: such a sequence's last key becomes NaN, and what sees it.
        """
        self._check_crop(lengths)
        kept = self._count_kept(lengths)
        lost, reached = self._find_lost(kept)
        sequence = torch.arange(len(kept), device=kept.device)
        place = (kept - 1) % self.capacity
        last = self.k[sequence, :, place]
        self.k[sequence, :, place] = last.masked_fill(lost[:, None, None], float("nan"))
        self._reached = torch.where(kept == 0, 0, reached)
        super().crop(lengths)

    def reorder(self, sequences: torch.Tensor) -> None:
        """Keep these sequences in this order, (B,) of their places; one may come several times."""
        self._write()
        super().reorder(sequences)
        self._reached = self._reached[sequences]
        self._make_laps()

    def _first_returned(self) -> int:
        return max(self.tokens - self.window, 0)

    def _check_room(self, new: int) -> None:
        """There is always room."""

    def _check_crop(self, lengths: torch.Tensor | int) -> None:
        kept = self._count_kept(lengths)
        lost, _ = self._find_lost(kept)
        if kept.device.type == "cpu" and lost.any():
            sequence = int(lost.nonzero()[0])
            raise ValueError(
                f"RingKVCache: of {int(self.lengths[sequence])} tokens the first "
                f"{int(kept[sequence])} cannot be kept alone: keys in their window of "
                f"{self.window} have been written over"
            )

    def _check_terms(self, terms: dict[str, Any]) -> None:
        window = terms.get("window")
        before = window[0] if isinstance(window, Sequence) else window
        if before is None or before > self.window:
            raise ValueError(f"RingKVCache: window must be {self.window} or less, got {window}")
        if terms.get("score_mods"):
            raise ValueError(
                "RingKVCache: score_mods would get other places than a sequence's; use a KVCache"
            )

    def _fits(self, new: int) -> bool:
        """Whether so many new keys fit into the ring beside the window of the first."""
        return new <= self.capacity - self.window

    def _make_laps(self) -> None:
        """Make the table by which the ring is read: two laps of it, one behind the other."""
        sequences = torch.arange(len(self.k), device=self.k.device, dtype=torch.int32)
        self._laps = sequences[:, None].repeat(1, 2)

    def _first_of_laps(self, new: int) -> torch.Tensor:
        """(B,): the number of the key at the first place of the laps, with `new` tokens more."""
        laps = (self.lengths + new) // self.capacity - 1
        return laps.clamp(min=0) * self.capacity

    def _write(self) -> None:
        """Write the last call's tokens into the ring, if they are not: those that crop has left."""
        if self._unwritten is None:
            return
        k, v, before = self._unwritten
        self._unwritten = None
        count = min(k.shape[2], self.capacity)
        sequence, number = self._number_last(count)
        token, place = number - before[:, None], number % self.capacity
        new = (token >= 0)[..., None, None]
        for cache, x in ((self.k, k), (self.v, v)):
            if cache is not None and x is not None:
                # (B, count, Hkv, D)
                written = x[sequence, :, token.clamp(min=0)].to(cache.dtype)
                cache[sequence, :, place] = torch.where(new, written, cache[sequence, :, place])

    def _number_last(self, count: int) -> Pair:
        """(B, 1) and (B, count): the sequences, and the numbers of their last tokens."""
        device = self.lengths.device
        last = torch.arange(-count, 0, device=device)
        return torch.arange(len(self.k), device=device)[:, None], self.lengths[:, None] + last

    def _join_recent(
        self, k: torch.Tensor, v: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """The keys and values that a window shows of those before, with new ones behind.

        And how many of those before there are: as many of each sequence, whatever it has.
        """
        self._write()
        before = min(self.tokens, self.window)
        sequence, number = self._number_last(before)
        joined = []
        for cache, x in ((self.k, k), (self.v, v)):
            if x is not None and cache is not None and before:
                recent = cache[sequence, :, number % self.capacity].transpose(1, 2)
                x = torch.cat((recent, x.detach()), 2)
            joined.append(x)
        return (*joined, before)  # type: ignore[return-value]

    def _find_lost(self, kept: torch.Tensor) -> Pair:
        """(B,) each: whether keys that are then needed are there no more, and how far all got."""
        before = self.lengths if self._unwritten is None else self._unwritten[2]
        reached = torch.maximum(self._reached, before)
        needed = (kept - self.window).clamp(min=0)
        lost = (kept > 0) & (kept < before) & (needed < reached - self.capacity)
        return lost, reached


SLACK = 32
"""How many tokens behind its window a ring of `choose_capacity` has room for, and goes back."""


def choose_capacity(window: int) -> int:
    """Keys of a ring for a window and SLACK, in whole tiles."""
    return -(-(window + SLACK) // 64) * 64
