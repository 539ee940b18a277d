"""A call of attention in words that belong to no library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

import fastattn

PARAMETERS = ("bias", "slopes", "table", "sinks", "rate")
"""The tensors beside q, k and v that may be learned."""

IN_FLOAT32 = ("slopes", "sinks", "rate")
"""Parameters that have few numbers, whatever the dtype of q."""

MASKS = (
    "causal",
    "causal_from_first",
    "window",
    "mask",
    "key_lengths",
    "documents",
    "blocks",
    "prefix",
)
ADDITIONS = ("bias", "slopes", "table")
"""What an M x N tensor of booleans, or of numbers, can say."""


IN_WORDS = {
    "causal_from_first": "a mask that is causal from the first query and key on",
    "mask": "a boolean mask",
    "key_lengths": "key lengths",
    "blocks": "a block mask",
    "prefix": "a mask of one's own",
    "bias": "a bias",
    "slopes": "ALiBi's slopes",
    "table": "a relative bias",
    "rate": "a score function of one's own",
    "lengths": "packed sequences",
    "window": "a window",
    "dropout_p": "dropout",
    "return_lse": "the LSE as output",
}
"""Options whose names say too little."""


class Absent(Exception):
    """A library has no argument for what was asked."""


@dataclass(frozen=True)
class Case:
    """What attention is asked to compute. Query i stands at key i + N - M.

    Attributes:
        q, k, v: (B, H, M, Dk), (B, Hkv, N, Dk), (B, Hkv, N, Dv).
        learned: those of the parameters that get a gradient; q, k and v always do.
        bias: added to the scores, broadcasts to (B, H, M, N).
        slopes: (H,), ALiBi's.
        table: (buckets, H), T5's relative bias in both directions.
        sinks: (H,), one more score without a value.
        rate: (H,), of a score function of one's own: score * 2^(-rate * distance).
        causal: no query sees a key behind its place.
        causal_from_first: query i sees the keys up to key i, whatever M and N.
        window: how many keys a query sees before and after its place, None for all.
        mask: booleans that broadcast to (B, H, M, N), True where a query sees a key.
        key_lengths: (B,), the keys that count.
        documents: (B, N), a query sees the keys of its own number; equal ones are neighbours.
        blocks: (rows, columns), which blocks of `block_size` queries and keys count.
        prefix: (B,), a mask of one's own: causal, but the first so many keys are seen by all.
        lengths: of packed queries and keys, which then have a batch of 1.
        softcap: scores become softcap * tanh(score / softcap), before anything is added.
        dropout_p: the probability that a weight is zeroed.
        return_lse: whether the logsumexp of the scores is asked for.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    learned: tuple[str, ...] = ()
    bias: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    table: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    rate: torch.Tensor | None = None
    causal: bool = False
    causal_from_first: bool = False
    window: tuple[int | None, int | None] | None = None
    mask: torch.Tensor | None = None
    key_lengths: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    block_size: int = 0
    prefix: torch.Tensor | None = None
    lengths: tuple[list[int], list[int]] | None = None
    softcap: float | None = None
    dropout_p: float = 0.0
    return_lse: bool = False

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def shift(self) -> int:
        """The place of query 0 among the keys."""
        return self.k.shape[2] - self.q.shape[2]

    def asked(self) -> set[str]:
        """The names of the options that are not left as they are."""
        plain = ("q", "k", "v", "learned", "block_size")
        return {
            field.name
            for field in fields(self)
            if field.name not in plain and _is_asked(getattr(self, field.name))
        }

    def only(self, *names: str) -> None:
        """Raise `Absent` if anything else is asked for."""
        if others := sorted(self.asked() - set(names)):
            raise Absent("no argument for " + " and ".join(IN_WORDS.get(x, x) for x in others))

    def differentiable(self) -> dict[str, torch.Tensor]:
        """The tensors that get a gradient, by name."""
        return {name: getattr(self, name) for name in ("q", "k", "v", *self.learned)}

    def to(self, device: torch.device, dtype: torch.dtype) -> Case:
        """The same numbers elsewhere, rounded to a dtype; those that learn ask for a gradient."""
        changed: dict[str, Any] = {}
        for name, x in self._tensors():
            moved = x.detach().to(device)
            if x.is_floating_point():
                wide = name in IN_FLOAT32 and dtype.itemsize < 4
                moved = moved.to(torch.float32 if wide else dtype)
            changed[name] = moved.requires_grad_(name in ("q", "k", "v", *self.learned))
        return replace(self, **changed)

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        """The same with other tensors."""
        return replace(self, **{name: change(x) for name, x in self._tensors()})

    def detached(self) -> Case:
        """The same without gradients."""
        return replace(self.changed(torch.Tensor.detach), learned=())

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), torch.Tensor):
                yield field.name, value

    def distances(self) -> torch.Tensor:
        """(M, N): how far a key stands before its query."""
        m, n = (torch.arange(x.shape[2], device=self.q.device) for x in (self.q, self.k))
        return m[:, None] + self.shift - n

    def keep(self) -> torch.Tensor | None:
        """All masks in one tensor that broadcasts to (B, H, M, N); None if there is none."""
        distance = self.distances()
        m, n = (torch.arange(x.shape[2], device=self.q.device) for x in (self.q, self.k))
        masks = []
        if self.causal:
            masks.append(distance >= 0)
        if self.causal_from_first:
            masks.append(distance >= self.shift)
        if self.window is not None:
            before, after = self.window
            masks += [distance <= before] if before is not None else []
            masks += [distance >= -after] if after is not None else []
        if self.mask is not None:
            masks.append(self.mask)
        if self.key_lengths is not None:
            masks.append(n < self.key_lengths[:, None, None, None])
        if self.documents is not None:
            masks.append(self.documents[:, None, :, None] == self.documents[:, None, None, :])
        if self.blocks is not None:
            masks.append(self.blocks[m[:, None] // self.block_size, n // self.block_size])
        if self.prefix is not None:
            masks.append((distance >= self.shift) | (n < self.prefix[:, None, None, None]))
        kept = None
        for mask in masks:
            kept = mask if kept is None else kept & mask
        return kept if kept is None else kept[(None,) * (4 - kept.dim())]

    def added(self) -> torch.Tensor | None:
        """All that is added to the scores in one tensor, (B or 1, H or 1, M or 1, N)."""
        total = self.bias
        if self.slopes is not None:
            alibi = -self.slopes[:, None, None] * self.distances().abs()
            total = alibi[None] if total is None else total + alibi
        if self.table is not None:
            lookup, reach = self.buckets()
            relative = self.table[lookup[(-self.distances()).clamp(-reach, reach) + reach]]
            relative = relative.movedim(-1, 0)[None]
            total = relative if total is None else total + relative
        return None if total is None else total.to(self.q.dtype)

    def buckets(self) -> tuple[torch.Tensor, int]:
        """T5's bucket of each distance of a key behind its query from -reach to reach."""
        assert self.table is not None
        lookup = fastattn.RelativeBias(self.table.detach()).tensors[1][0, 0].long()
        return lookup, lookup.numel() // 2

    def score_tensor(self) -> torch.Tensor | None:
        """Masks and what is added in one tensor: booleans where there are only masks."""
        keep, added = self.keep(), self.added()
        if keep is None or added is None:
            return added if keep is None else keep
        return torch.where(keep, added, float("-inf"))


def _is_asked(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or value not in (None, False, 0.0)
