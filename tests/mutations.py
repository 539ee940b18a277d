"""Faults put into the PTX of real kernels, one at a time, to see whether the machine sees them.

    python tests/mutations.py sm_90 product

prints how many of each kind were seen, and by what, and each that was not.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastattn.checking import compare_results, measure_reference, outputs_and_gradients
from fastattn.machine.execution import Execution, execute
from fastattn.machine.parser import PtxError, parse
from fastattn.ops.core.backends import assume_gpu, backend
from fastattn.ops.core.catalog import OPERATIONS, Operation, Sample

KINDS = {
    "mask": (r"@!?%p\d+ (?=(ld|st)\.global)", ""),
    "mask of a copy": (
        r"(cp\.async\.c[ag]\.shared\.global [^;]*, )(0x\w+), (%r\d+);",
        r"\1\2, \2;",
    ),
    "barrier": (r"(?<=\s)bar\.sync\s+0;", ""),
    "wait for copies": (r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 99;"),
    "commit of copies": (r"cp\.async\.commit_group;", ""),
    "proxy fence": (r"fence\.proxy\.async[\w:.]*;", ""),
    "fence of products": (r"wgmma\.fence\.sync\.aligned;", ""),
    "wait for products": (r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "wgmma.wait_group 99;"),
}
"""What is removed, by name: a pattern and what stands there instead."""


def probe_of(kind: str, match: re.Match[str]) -> str:
    """Instructions that stop the kernel where the mask before which they stand masks anything."""
    if kind == "mask":
        guard = match[0].split()[0]
        return (guard.replace("!", "") if "!" in guard else guard.replace("@", "@!")) + " trap; "
    return f"{{ .reg .pred %q; setp.ne.b32 %q, {match[3]}, {match[2]}; @%q trap; }} "


CASES = {
    "norm": ("rms_norm", "float32", Sample("rows", x=(6, 300), weight=(300,), eps=1e-6)),
    "softmax": ("softmax", "bfloat16", Sample("wide rows", x=(3, 700), dim=-1)),
    "deep product": ("matmul", "bfloat16", Sample("deep", a=(128, 200), b=(200, 136))),
    "short product": ("matmul", "bfloat16", Sample("deep", a=(64, 200), b=(200, 64))),
    "odd product": ("matmul", "bfloat16", Sample("deep", a=(70, 150), b=(150, 77))),
    "attention": (
        "attention",
        "bfloat16",
        Sample("two blocks", q=(1, 1, 150, 64), k=(1, 1, 150, 64), v=(1, 1, 150, 64), causal=True),
    ),
}
"""What is mutated: an op, a dtype, and a sample that reaches the loops."""


class Mutant(NamedTuple):
    """A kernel with one fault."""

    kind: str
    line: int
    text: str
    probe: str | None


class Result(NamedTuple):
    """Whether a fault was seen: by an error, a report, or the accuracy rule.

    A fault in code that does not run is "not reached", and a mask that masks nothing here is
    "never false"; any other fault that has no effect is "unseen".
    """

    kernel: str
    mutant: Mutant
    seen: str
    detail: str


def mutants_of(text: str) -> Iterator[Mutant]:
    """All faults of a kernel."""
    for kind, (pattern, replacement) in KINDS.items():
        for match in re.finditer(pattern, text):
            before, after = text[: match.start()], text[match.end() :]
            probe = None
            if kind.startswith("mask"):
                probe = before + probe_of(kind, match) + match[0] + after
            line = 1 + text.count("\n", 0, match.start())
            yield Mutant(kind, line, before + match.expand(replacement) + after, probe)


class Trial:
    """One sample of an op, run again and again with faulty kernels."""

    def __init__(
        self, execution: Execution, operation: Operation, sample: Sample, dtype: torch.dtype
    ) -> None:
        self.execution = execution
        self.arguments = sample, dtype, "cpu"
        self.function = operation.function
        self.measured = measure_reference(
            lambda change: outputs_and_gradients(
                operation.reference, *self.arguments, change=change
            )
        )
        assert self.run() == ("unseen", "")
        self.reached = {
            text: program.lines_reached() for text, program in execution.programs.items()
        }

    def run(self) -> tuple[str, str]:
        """How a fault was seen, if it was."""
        self.execution.reports.clear()
        try:
            with backend("triton"):
                actual = outputs_and_gradients(self.function, *self.arguments)
        except PtxError as error:
            return "error", str(error)
        if self.execution.reports:
            return "report", self.execution.reports[0]
        wrong = [c.name for c in compare_results(actual, self.measured) if not c.passed]
        return ("rule", ", ".join(wrong)) if wrong else ("unseen", "")

    def results(self) -> Iterator[Result]:
        """Try all faults of all kernels."""
        for text, lines in self.reached.items():
            kernel = parse(text).name
            for mutant in mutants_of(text):
                if mutant.line not in lines:
                    yield Result(kernel, mutant, "not reached", "")
                    continue
                seen, detail = self._try(text, mutant.text)
                if seen == "unseen" and mutant.probe is not None:
                    stopped, _ = self._try(text, mutant.probe)
                    seen = "unseen" if stopped == "error" else "never false"
                yield Result(kernel, mutant, seen, detail)

    def _try(self, text: str, other: str) -> tuple[str, str]:
        """Run with another text of one kernel."""
        self.execution.edit = lambda t: other if t == text else t
        return self.run()


def main(target: str, case: str) -> None:
    """Print what was seen of one case's faults."""
    op, dtype, sample = CASES[case]
    with execute(target) as execution, assume_gpu():
        trial = Trial(execution, OPERATIONS[op], sample, getattr(torch, dtype))
        counts: dict[tuple[str, str], dict[str, int]] = {}
        for kernel, mutant, seen, _ in trial.results():
            row = counts.setdefault((kernel, mutant.kind), {})
            row[seen] = row.get(seen, 0) + 1
            if seen == "unseen":
                print(f"unseen: {kernel} line {mutant.line}: {mutant.kind}", flush=True)
    for (kernel, kind), row in counts.items():
        print(json.dumps({"kernel": kernel, "kind": kind, **row}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
