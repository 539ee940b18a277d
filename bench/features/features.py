"""The rows: each a feature of attention, and how it is tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import fastattn

from .case import Case

PLAIN, GQA, CAUSAL = "plain", "gqa", "causal"
VARIANTS = (PLAIN, GQA, CAUSAL)

VALUES, DROPOUT, SECOND, REPEATED = "values", "dropout", "second", "repeated"
"""How a feature is judged, see judging.py."""

GROUPED = (8, 2)
BUCKETS = 32


@dataclass
class Maker:
    """Makes the tensors of a case, of the size that suits the device.

    Attributes:
        length: of sequences.
        dim: of heads.
        block: of a block mask.
        heads: (H, Hkv).
        batch: elements.
    """

    length: int
    dim: int
    block: int
    heads: tuple[int, int]
    batch: int = 2
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def case(
        self,
        queries: int = 0,
        keys: int = 0,
        dims: tuple[int, int] | None = None,
        batch: int = 0,
        **options: Any,
    ) -> Case:
        """q, k, v and the options; 0 means the usual length, or batch."""
        of_keys, of_values = dims or (self.dim, self.dim)
        keys, batch = keys or self.length, batch or self.batch
        return Case(
            self.normal(batch, self.heads[0], queries or self.length, of_keys),
            self.normal(batch, self.heads[1], keys, of_keys),
            self.normal(batch, self.heads[1], keys, of_values),
            **options,
        )

    def some(self, *shape: int) -> torch.Tensor:
        """Booleans, three of five of which are True, and the first key always."""
        kept = torch.rand(shape, generator=self.generator) < 0.6
        kept[..., 0] = True
        return kept

    @property
    def shorter(self) -> int:
        """Fewer queries than keys."""
        return self.length * 5 // 8

    @property
    def key_lengths(self) -> torch.Tensor:
        return self.numbers(self.length * 3 // 4, self.length // 3 + 1)

    def numbers(self, *numbers: int) -> torch.Tensor:
        """One for each batch element."""
        return torch.tensor(numbers[: self.batch], dtype=torch.int32)

    @property
    def slopes(self) -> torch.Tensor:
        return fastattn.alibi_slopes(self.heads[0])

    def learned_bias(self, *shape: int) -> Case:
        return self.case(bias=self.normal(*shape), learned=("bias",))

    def packed(self, *others: int) -> Case:
        """Three packed sequences, the keys of which have these other lengths."""
        lengths = [self.length // 2 + 5, self.length // 4 - 3, self.length // 4 - 2]
        of_keys = list(others) or lengths
        return self.case(sum(lengths), sum(of_keys), batch=1, lengths=(lengths, of_keys))

    def with_nan(self) -> Case:
        """Keys and values that do not count are NaN."""
        case = self.case(key_lengths=self.key_lengths)
        counts = torch.arange(self.length) < self.key_lengths[:, None]
        k, v = (x.masked_fill(~counts[:, None, :, None], float("nan")) for x in (case.k, case.v))
        return replace(case, k=k, v=v)

    def with_lonely_queries(self) -> Case:
        mask = self.some(self.batch, 1, self.length, self.length)
        mask[:, :, :: self.length // 4] = False
        return self.case(mask=mask)

    def documents(self) -> Case:
        place = torch.arange(self.length)
        ids = torch.stack([place * 4 // self.length, place * 7 // self.length]).int()
        return self.case(documents=ids[: self.batch])

    def blocks(self) -> Case:
        count = self.length // self.block
        table = torch.eye(count, dtype=torch.bool) | self.some(count, count)
        return self.case(blocks=table, block_size=self.block)


@dataclass(frozen=True)
class Feature:
    """A row.

    Attributes:
        name: in tables.
        make: the plain case.
        judged: how.
        variants: with what else it is tried.
        dtype: the only one in which it means anything.
        longer: how many times the usual length it takes to show on a GPU.
    """

    name: str
    make: Callable[[Maker], Case]
    judged: str = VALUES
    variants: tuple[str, ...] = VARIANTS
    dtype: torch.dtype | None = None
    longer: int = 1

    def case(self, variant: str, on_gpu: bool) -> Case:
        """One of its cases, in float64 on the CPU, the same every time."""
        heads = GROUPED if variant == GQA else (4, 4) if on_gpu else (2, 2)
        if on_gpu:
            maker = Maker(512 * self.longer, 64, 128, heads)
        else:
            # Small, because Triton's interpreter computes it.
            maker = Maker(64, 32, 16, heads, batch=1 if variant == GQA else 2)
        case = self.make(maker)
        return replace(case, causal=True) if variant == CAUSAL else case


FEATURES = (
    Feature("plain", lambda m: m.case()),
    Feature(
        "causal from the last query and key, M < N",
        lambda m: m.case(m.shorter, causal=True),
        variants=(PLAIN, GQA),
    ),
    Feature(
        "causal from the first query and key, M < N",
        lambda m: m.case(m.shorter, causal_from_first=True),
        variants=(PLAIN, GQA),
    ),
    Feature("sliding window to the left", lambda m: m.case(window=(m.length // 4, None))),
    Feature("window to both sides, M < N", lambda m: m.case(m.shorter, window=(m.length // 4, 5))),
    Feature(
        "boolean mask (B, H, M, N)",
        lambda m: m.case(mask=m.some(m.batch, m.heads[0], m.length, m.length)),
    ),
    Feature("boolean mask (B, 1, 1, N)", lambda m: m.case(mask=m.some(m.batch, 1, 1, m.length))),
    Feature("key padding by lengths", lambda m: m.case(key_lengths=m.key_lengths)),
    Feature("NaN behind the padding does not leak", Maker.with_nan),
    Feature("queries that a mask leaves no key give 0", Maker.with_lonely_queries),
    Feature(
        "queries before the first key give 0, causal, M > N",
        lambda m: m.case(m.length, m.shorter, causal=True),
        variants=(PLAIN, GQA),
    ),
    Feature("packed sequences", Maker.packed),
    Feature(
        "packed sequences, cross",
        lambda m: m.packed(m.length // 2 + 5, m.length // 2 - 3, m.length // 4),
    ),
    Feature("documents", Maker.documents),
    Feature("block mask", Maker.blocks),
    Feature(
        "additive bias (B, H, M, N) and its gradient",
        lambda m: m.learned_bias(m.batch, m.heads[0], m.length, m.length),
    ),
    Feature(
        "additive bias (1, H, M, N) and its gradient",
        lambda m: m.learned_bias(1, m.heads[0], m.length, m.length),
    ),
    Feature(
        "additive bias (B, 1, 1, N) and its gradient",
        lambda m: m.learned_bias(m.batch, 1, 1, m.length),
    ),
    Feature(
        "T5's relative bias and its table's gradient",
        lambda m: m.case(table=m.normal(BUCKETS, m.heads[0]), learned=("table",)),
    ),
    Feature("ALiBi", lambda m: m.case(slopes=m.slopes)),
    Feature(
        "ALiBi with learned slopes",
        lambda m: m.case(slopes=m.slopes, learned=("slopes",)),
    ),
    Feature("softcap", lambda m: m.case(softcap=2.0)),
    Feature(
        "sinks and their gradient",
        lambda m: m.case(sinks=m.normal(m.heads[0]), learned=("sinks",)),
    ),
    Feature("dropout", lambda m: m.case(64, 64, (64, 64), dropout_p=0.25), DROPOUT),
    Feature(
        "a score function of one's own, and its parameter's gradient",
        lambda m: m.case(rate=m.normal(m.heads[0]).abs() / 16, learned=("rate",)),
    ),
    Feature(
        "a mask of one's own (prefix LM)",
        lambda m: m.case(prefix=m.numbers(m.length // 3, 3)),
        variants=(PLAIN, GQA),
    ),
    Feature("LSE as output, and its gradient", lambda m: m.case(return_lse=True)),
    Feature("keys of 192, values of 128", lambda m: m.case(dims=(192, 128))),
    Feature("head dimension 80", lambda m: m.case(dims=(80, 80))),
    Feature("head dimension 512", lambda m: m.case(dims=(512, 512))),
    Feature("float32 at full precision", lambda m: m.case(), dtype=torch.float32),
    Feature("second derivatives", lambda m: m.case(), SECOND),
    Feature("the same bits every time", lambda m: m.case(), REPEATED, longer=4),
    Feature(
        "the same bits every time, of a bias (1, H, M, N) too",
        lambda m: m.learned_bias(1, m.heads[0], m.length, m.length),
        REPEATED,
        longer=2,
    ),
)
