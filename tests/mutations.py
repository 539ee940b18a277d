"""Faults put into the PTX of real kernels, one at a time, to see whether the machine sees them.

    python tests/mutations.py sm_90 matmul "batch" bfloat16

prints how many of each kind were seen, and by what, and each that was not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastattn.checking import compare_results, measure_reference, outputs_and_gradients
from fastattn.machine.execution import Execution, execute
from fastattn.machine.parser import PtxError, parse
from fastattn.machine.translator import Translator
from fastattn.ops.core.backends import assume_gpu, backend
from fastattn.ops.core.catalog import OPERATIONS, Operation, Sample

KINDS = {
    "mask": (r"@!?%p\d+ (?=(ld|st)\.global)", ""),
    "mask of a copy": (r"(cp\.async\.c[ag]\.shared\.global [^;]*, )(0x\w+), %r\d+;", r"\1\2, \2;"),
    "barrier": (r"(?<=\s)bar\.sync\s+0;", ""),
    "wait for copies": (r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 99;"),
    "commit of copies": (r"cp\.async\.commit_group;", ""),
    "proxy fence": (r"fence\.proxy\.async[\w:.]*;", ""),
    "fence of products": (r"wgmma\.fence\.sync\.aligned;", ""),
    "wait for products": (r"wgmma\.wait_group\.sync\.aligned\s+\d+;", "wgmma.wait_group 99;"),
}
"""What is removed, by name: a pattern and what stands there instead."""


class Mutant(NamedTuple):
    """A kernel with one fault."""

    kind: str
    line: int
    text: str


class Result(NamedTuple):
    """Whether a fault was seen: by an error, a report, or the accuracy rule.

    A fault in code that did not run is "not reached"; any other that has no effect is "unseen".
    """

    kernel: str
    mutant: Mutant
    seen: str
    detail: str


def mutants_of(text: str) -> Iterator[Mutant]:
    """All faults of a kernel."""
    for kind, (pattern, replacement) in KINDS.items():
        for match in re.finditer(pattern, text):
            mutated = text[: match.start()] + match.expand(replacement) + text[match.end() :]
            yield Mutant(kind, 1 + text.count("\n", 0, match.start()), mutated)


class Trial:
    """One sample of an op, run again and again with faulty kernels."""

    def __init__(
        self, execution: Execution, operation: Operation, sample: Sample, dtype: torch.dtype
    ) -> None:
        self.execution = execution
        self.arguments = sample, dtype, "cpu"
        self.function = operation.function
        self.texts: dict[str, str] = {}
        self.measured = measure_reference(
            lambda change: outputs_and_gradients(
                operation.reference, *self.arguments, change=change
            )
        )
        execution.edit = self._remember
        assert self.run() == ("unseen", "")

    def _remember(self, text: str) -> str:
        self.texts[text] = parse(text).name
        return text

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
        for text, kernel in list(self.texts.items()):
            lines = self._lines_reached(text)
            for mutant in mutants_of(text):
                if mutant.line not in lines:
                    yield Result(kernel, mutant, "not reached", "")
                    continue
                self.execution.edit = lambda t, text=text, m=mutant: m.text if t == text else t
                yield Result(kernel, mutant, *self.run())

    def _lines_reached(self, text: str) -> set[int]:
        """The lines of a kernel in blocks that run."""
        programs: list[Translator] = []
        original = Translator.__init__

        def remember(translator: Any, *arguments: Any) -> None:
            original(translator, *arguments)
            programs.append(translator)

        Translator.__init__ = remember
        try:
            # One space more makes it another text, which is translated anew.
            self.execution.edit = lambda t: t + " " if t == text else t
            self.run()
        finally:
            Translator.__init__ = original
        return {
            i.line
            for program in programs
            for block in program._translated
            for i in program.blocks[block]
        }


def main(target: str, op: str, sample: str, dtype: str) -> None:
    """Print what was seen of one sample's faults."""
    operation = OPERATIONS[op]
    (chosen,) = (s for s in operation.samples if s.name == sample)
    with execute(target) as execution, assume_gpu():
        trial = Trial(execution, operation, chosen, getattr(torch, dtype))
        counts: dict[tuple[str, str], dict[str, int]] = {}
        for result in trial.results():
            row = counts.setdefault((result.kernel, result.mutant.kind), {})
            row[result.seen] = row.get(result.seen, 0) + 1
            if result.seen == "unseen":
                print(f"UNSEEN {result.kernel} line {result.mutant.line}: {result.mutant.kind}")
    for (kernel, kind), row in counts.items():
        print(f"{kernel:<34}{kind:<20}{row}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
