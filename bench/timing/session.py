"""One run of the benchmarks: which cases, what has been measured, and the file that keeps it."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..contenders import COMPILED, contender_names
from ..environment import ROOT, default_device, describe, slug
from ..op import Op, Shape, shape_name
from ..output import write
from ..registry import OPS
from . import results
from .clock import measure_ceilings
from .runner import Effort, Outcome, measure_case


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype."""

    op: Op
    shape: Shape
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op.name}-{shape_name(self.shape)}-{str(self.dtype).removeprefix('torch.')}"


def default_target(device: torch.device) -> Any:
    """The target whose bytes are counted: this GPU, or the H100 that benchmarks are planned for."""
    from fastattn.kernels.config import Target, device_target

    if device.type == "cuda":
        return device_target(device.index or 0)
    return Target("cuda", 90, 32, multiprocessors=132, shared_memory=232_448)


class Session:
    """Measures each case once, when it is first asked for, and writes the file after each."""

    def __init__(
        self,
        *,
        ops: Sequence[str] | None = None,
        contenders: Sequence[str] | None = None,
        device: torch.device | None = None,
        shapes: Sequence[Shape] = (),
        quick: bool = True,
        minutes: float | None = None,
        out: Path | None = None,
    ) -> None:
        self.device = device or default_device()
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.out = out
        on_gpu = self.device.type == "cuda"
        self.cases = _cases(on_gpu, ops, shapes, quick=quick)
        self._wanted = contenders
        self._quick = quick
        self._effort = Effort(rounds=8 if quick else 30, seconds=3.0 if on_gpu else 2.0)
        self._outcomes: dict[Case, Outcome] = {}
        self._document: dict[str, Any] | None = None

    def contenders(self, case: Case) -> list[str]:
        """Who takes part in a case."""
        names = contender_names(case.op)
        if self._wanted is not None:
            return [name for name in names if name in self._wanted]
        # It compiles for half a minute a case.
        return [name for name in names if not (self._quick and name == COMPILED)]

    def out_of_time(self, case: Case) -> bool:
        """Whether a case that has not been measured may not be started any more."""
        if case in self._outcomes or self.deadline is None:
            return False
        return time.monotonic() > self.deadline

    def outcome(self, case: Case) -> Outcome:
        """What is known of a case, measured now if it has not been."""
        if case not in self._outcomes:
            document = self.document
            ceilings = measure_ceilings(self.device)
            # Kept before it is filled in: a case that cannot be measured is not tried again.
            self._outcomes[case] = Outcome(failures=dict.fromkeys(self.contenders(case), "failed"))
            outcome = measure_case(
                case.op, case.shape, case.dtype, self.device, self.contenders(case), self._effort
            )
            self._outcomes[case] = outcome
            rows = results.make_rows(
                case.op,
                case.shape,
                case.dtype,
                outcome,
                ceilings,
                default_target(self.device),
                on_gpu=self.device.type == "cuda",
            )
            document["results"] += rows
            document["failures"] += [
                {"case": str(case), "contender": name, "reason": reason}
                for name, reason in outcome.failures.items()
            ]
            if self.out is not None:
                write(self.out, document)
            results.print_case(rows, outcome.failures)
        return self._outcomes[case]

    @property
    def document(self) -> dict[str, Any]:
        """The content of the result file so far."""
        if self._document is None:
            ceilings = measure_ceilings(self.device)
            self._document = describe(self.device) | {
                "ceilings": {
                    "copy_gigabytes_per_second": ceilings.copy / 1e9,
                    "product_teraflops_per_second": ceilings.product / 1e12,
                },
                "results": [],
                "failures": [],
            }
            if self._document["backend"] == "reference":
                print(results.CPU_NOTE)
            results.print_ceilings(ceilings)
        return self._document


def _cases(
    on_gpu: bool, names: Sequence[str] | None, shapes: Sequence[Shape], *, quick: bool
) -> list[Case]:
    """The cases, the most telling first: every op in its first dtype and at its first size, ...

    Raises:
        ValueError: a shape has not as many numbers as the op's.
    """
    ranked = []
    for place, op in enumerate(OPS):
        if op.benchmark is None or (names is not None and op.name not in names):
            continue
        sizes = op.timing.sizes if on_gpu else op.timing.small_sizes
        sizes = shapes or sizes[: 2 if quick else None]
        for shape in shapes:
            if len(shape) != len(op.small):
                raise ValueError(
                    f"a shape of {op.name} has {len(op.small)} numbers, as {shape_name(op.small)}, "
                    f"got {shape_name(shape)}"
                )
        for dtype_rank, dtype in enumerate(op.dtypes[: 1 if quick else 2]):
            for size_rank, shape in enumerate(sizes):
                ranked.append(((dtype_rank, size_rank, place), Case(op, shape, dtype)))
    return [case for _, case in sorted(ranked, key=lambda item: item[0])]


def default_out(device: torch.device) -> Path:
    """bench/results/<device>-<date>.json"""
    described = describe(device)["device"]["name"]
    today = datetime.date.today().isoformat()
    return ROOT / "bench" / "results" / f"{slug(described)}-{today}.json"
