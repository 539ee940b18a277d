"""Calls of attention that the warp-specialised forward carries, and how tests turn it on."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

import fastattn
from fastattn.checking import Change, Comparison, compare_results, measure_reference
from fastattn.commands.tune import write_entry
from fastattn.kernels import tuning
from fastattn.machine.execution import Execution
from fastattn.machine.parser import PtxError
from fastattn.ops.core.backends import assume_gpu

Dims = tuple[int, int]
"""The columns of keys and of values."""


@contextlib.contextmanager
def measured(
    folder: Any,
    configs: Mapping[Dims, Any],
    monkeypatch: pytest.MonkeyPatch,
    kernel: str = "attention_hopper_forward",
) -> Iterator[None]:
    """A user's table says that a kernel is the faster one with these configurations."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    for (key_dim, value_dim), config in configs.items():
        entry = {
            "features": {"key_dim": key_dim, "value_dim": value_dim},
            "config": dataclasses.asdict(dataclasses.replace(config, used=True)),
            "shared_memory": 0,
        }
        write_entry(tuning.user_tables() / "sm90.json", kernel, entry)
    tuning.forget_tables()
    yield
    monkeypatch.undo()
    tuning.forget_tables()


class Call(NamedTuple):
    """One call of attention, (B, H, M, D), or of packed sequences, (T, H, D)."""

    dims: Dims
    heads: Dims = (2, 1)
    """Of queries and of keys."""
    lengths: Dims = (130, 300)
    """Queries and keys; packed, all tokens together."""
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    options: Mapping[str, Any] = MappingProxyType({})
    transposed: bool = False
    """Whether heads lie next to each other in memory."""
    packed: tuple[list[int], list[int]] | None = None
    """Where the sequences of queries and of keys begin."""
    dead: slice | None = None
    """Keys that belong to nothing, whose numbers are NaN."""

    def tensors(self) -> list[torch.Tensor]:
        """q, k and v."""
        generator = torch.Generator().manual_seed(torch.initial_seed())
        (queries, keys), (key_dim, value_dim) = self.lengths, self.dims
        sizes = ((self.heads[0], queries, key_dim), (self.heads[1], keys, key_dim))
        found = []
        for heads, length, dim in (*sizes, (self.heads[1], keys, value_dim)):
            x = torch.randn(self.batch, length, heads, dim, generator=generator).to(self.dtype)
            if len(found) and self.dead is not None:
                x[:, self.dead] = math.nan
            x = x[0] if self.packed else x.transpose(1, 2)
            found.append(x if self.packed or self.transposed else x.contiguous())
        return found

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs, by the backend that is on."""
        if self.packed is None:
            o, lse = fastattn.attention(q, k, v, return_lse=True, **self.options)
        else:
            starts = [torch.tensor(own, dtype=torch.int32) for own in self.packed]
            longest = [int(own.diff().max()) for own in starts]
            o, lse = fastattn.attention_varlen(
                q, k, v, *starts, *longest, return_lse=True, **self.options
            )
        return {"o": o, "lse": lse}

    def expect(self) -> Callable[[dict[str, torch.Tensor]], list[Comparison]]:
        """What applies the accuracy rule to outputs. What is dead is zero to the reference."""
        tensors = [x.nan_to_num(0.0) for x in self.tensors()]

        def run(change: Change) -> dict[str, torch.Tensor]:
            with fastattn.backend("reference"):
                return self.attend(*(change(x) for x in tensors))

        truth = measure_reference(run)
        return lambda found: compare_results(found, truth)


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    """Calls on CPU tensors launch kernels."""
    with assume_gpu(), fastattn.backend("triton"):
        yield


def kinds_of_faults(execution: Execution, call: Call) -> set[str]:
    """Under which names the faults of a call are told; "numbers" if these are wrong."""
    execution.reports.clear()
    try:
        found = call.attend(*call.tensors())
        right = all(comparison.passed for comparison in call.expect()(found))
        texts = [] if right else [": numbers: "]
    except PtxError as error:
        texts = [str(error)]
    kinds = (re.search(r": (\w+): ", text) for text in [*execution.reports, *texts])
    return {match[1] for match in kinds if match is not None}
