"""Faults put into the PTX of real kernels, one at a time, to see whether the machine sees them.

    python tests/mutations.py sm_90 "deep product"
    python tests/mutations.py sm_90 attention 10 3

prints how each fault was seen, or why not, and how often; the second tries every tenth fault from
the third on. The tensors lie amid memory that is not theirs.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from memory_forms import Placed, apart, place_gradients

from fastattn.checking import compare_results, measure_reference, outputs_and_gradients
from fastattn.machine.execution import Execution, execute
from fastattn.machine.parser import PtxError, elements, parse
from fastattn.ops.core.backends import assume_gpu, backend
from fastattn.ops.core.catalog import OPERATIONS, Operation, Sample

Edit = str | Callable[[re.Match[str]], str]


def _one_more(match: re.Match[str]) -> str:
    return f"{match[1]}{int(match[2]) + 1};"


KINDS: dict[str, tuple[str, Edit]] = {
    "mask of a load": (
        r"(?P<p>@!?%p\d+) (?P<i>ld\.global[\w.:]* (?P<r>\{[^}]*\}), [^;]*;)",
        r"\g<i>",
    ),
    "mask of a store": (
        r"(?P<p>@!?%p\d+) (?P<i>st\.global[\w.:]* \[[^]]*\], )(?P<r>\{[^}]*\});",
        r"\g<i>\g<r>;",
    ),
    "mask of a load of shared memory": (
        r"(?P<p>@!?%p\d+) (?P<i>ld\.shared[\w.:]* (?P<r>%\w+|\{[^}]*\}), [^;]*;)",
        r"\g<i>",
    ),
    "mask of a store to shared memory": (
        r"(?P<p>@!?%p\d+) (?P<i>st\.shared[\w.:]* \[[^]]*\], )(?P<r>%\w+|\{[^}]*\});",
        r"\g<i>\g<r>;",
    ),
    "mask of a copy": (
        r"(?P<i>cp\.async\.c[ag]\.shared\.global (?P<a>\[[^]]*\]), [^;]*, )"
        r"(?P<n>0x\w+), (?P<r>%r\d+);",
        r"\g<i>\g<n>, \g<n>;",
    ),
    "barrier": (r"(?<=\s)bar\.sync\s+0;", ""),
    "wait for copies": (r"cp\.async\.wait_group\s+\d+;", ""),
    "wait for all but one copy more": (r"(cp\.async\.wait_group\s+)(\d+);", _one_more),
    "commit of copies": (r"cp\.async\.commit_group;", ""),
    "proxy fence": (r"fence\.proxy\.async[\w:.]*;", ""),
    "fence of products": (r"wgmma\.fence\.sync\.aligned;", ""),
    "wait for products": (r"wgmma\.wait_group\.sync\.aligned\s+\d+;", ""),
    "wait for all but one product more": (
        r"(wgmma\.wait_group\.sync\.aligned\s+)(\d+);",
        _one_more,
    ),
}
"""What is removed or weakened, by name: a pattern and what stands there instead.

Of masks the groups p, i, r, n and a are the guard, the instruction without it, the registers (of a
copy, how many bytes are copied), the most bytes, and the address in shared memory.
"""


def _negate(guard: str) -> str:
    return guard.replace("!", "") if "!" in guard else guard.replace("@", "@!")


def trap_where_masked(kind: str, match: re.Match[str]) -> str:
    """The instruction after one that stops the kernel where its mask masks anything."""
    if kind == "mask of a copy":
        trap = f"{{ .reg .pred %q; setp.ne.b32 %q, {match['r']}, {match['n']}; @%q trap; }}"
    else:
        trap = f"{_negate(match['p'])} trap;"
    return f"{trap} {match[0]}"


def poison_where_masked(kind: str, match: re.Match[str]) -> str:
    """The instruction before one that puts NaN where it masks: in registers, or in memory."""
    if kind == "mask of a copy":
        words = int(match["n"], 0) // 4
        store = f"st.shared.v{words}.b32" if words > 1 else "st.shared.b32"
        values = ", ".join(["-1"] * words)
        text = f"setp.ne.b32 %q, {match['r']}, {match['n']}; "
        text += f"@%q {store} {match['a']}, {{ {values} }}; @!%q {match[0]}"
        return f"{{ .reg .pred %q; {text} }}"
    guard, moves = _negate(match["p"]), []
    for number, name in enumerate(elements(match["r"])):
        width = {"%rs": 16, "%rd": 64}.get(name[:3], 32)
        value = (1 << width - 1) - 1
        if "load" in kind:
            moves.append(f"{guard} mov.b{width} {name}, {value};")
        else:
            moves.append(f".reg .b{width} %q{number}; mov.b{width} %q{number}, {value};")
    if "load" in kind:
        return f"{match[0]} {' '.join(moves)}"
    poison = ", ".join(f"%q{number}" for number in range(len(moves)))
    poison = f"{{ {poison} }}" if "{" in match["r"] else poison
    return f"{match[0]} {{ {' '.join(moves)} {guard} {match['i']}{poison}; }}"


def _amid(op: str, dtype: str, **arguments: object) -> tuple[str, str, Sample]:
    return op, dtype, Placed(Sample("amid", **arguments), apart)


SQUARE = dict.fromkeys("qkv", (1, 1, 150, 64))

CASES: dict[str, tuple[str, str, Sample]] = {
    "norm": _amid("rms_norm", "float32", x=(6, 300), weight=(300,), eps=1e-6),
    "softmax": _amid("softmax", "bfloat16", x=(3, 700)),
    "deep product": _amid("matmul", "bfloat16", a=(128, 200), b=(200, 136)),
    "short product": _amid("matmul", "bfloat16", a=(64, 200), b=(200, 64)),
    "odd product": _amid("matmul", "bfloat16", a=(70, 150), b=(150, 77)),
    "attention": _amid("attention", "bfloat16", **SQUARE, causal=True),
    "full attention": _amid("attention", "bfloat16", **SQUARE, return_lse=True),
    "attention in float32": _amid("attention", "float32", **SQUARE),
}
"""What is mutated: an op, a dtype, and a sample that reaches the loops."""


class Mutant(NamedTuple):
    """One fault of a kernel: what stands in a part of its text, and two probes of what is there."""

    kind: str
    line: int
    span: tuple[int, int]
    fault: str
    trap: str | None = None
    poison: str | None = None

    def edit(self, text: str, instead: str) -> str:
        """The text with something else in that part."""
        return text[: self.span[0]] + instead + text[self.span[1] :]


class Result(NamedTuple):
    """How a fault was seen, "by an error", "by a report" or "by the numbers", or why it was not.

    "not reached": its code does not run. "never false": a mask that masks nothing here. "unused":
    what is read where the mask is false, within the tensors, changes nothing though it were NaN.
    "same value": what is stored there is what stands there, or another thread stores it;
    "overwritten": its CTA stores something else there later. "covered": seen as soon as the
    redundant ones of its kind are removed as well. "redundant": all of those can be removed
    together. Anything else is "unseen".
    """

    kernel: str
    mutant: Mutant
    how: str
    detail: str = ""


SEEN = ("by an error", "by a report", "by the numbers")


def mutants_of(text: str) -> Iterator[Mutant]:
    """All faults of a kernel."""
    for kind, (pattern, edit) in KINDS.items():
        for match in re.finditer(pattern, text):
            fault = match.expand(edit) if isinstance(edit, str) else edit(match)
            mutant = Mutant(kind, 1 + text.count("\n", 0, match.start()), match.span(), fault)
            if kind.startswith("mask"):
                trap, poison = trap_where_masked(kind, match), poison_where_masked(kind, match)
                mutant = mutant._replace(trap=trap, poison=poison)
            yield mutant


class Trial:
    """One sample of an op, run again and again with faulty kernels."""

    def __init__(
        self, execution: Execution, operation: Operation, sample: Sample, dtype: torch.dtype
    ) -> None:
        self.execution = execution
        self.arguments = sample, dtype, "cpu"
        self.function = place_gradients(operation.function, apart)
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
            return "by an error", str(error)
        if self.execution.reports:
            return "by a report", self.execution.reports[0]
        wrong = [c.name for c in compare_results(actual, self.measured) if not c.passed]
        return ("by the numbers", ", ".join(wrong)) if wrong else ("unseen", "")

    def results(self, step: int = 1, first: int = 0) -> Iterator[Result]:
        """Try every so manieth fault of all kernels."""
        number = 0
        for text, lines in self.reached.items():
            kernel = parse(text).name
            unseen: dict[str, list[Mutant]] = defaultdict(list)
            for mutant in mutants_of(text):
                number += 1
                if (number - 1 - first) % step:
                    continue
                result = self._try_alone(kernel, text, mutant, lines)
                if result.how == "unseen" and not mutant.kind.startswith("mask"):
                    unseen[mutant.kind].append(mutant)
                else:
                    yield result
            for mutants in unseen.values():
                yield from self._try_together(kernel, text, mutants)

    def _try_alone(self, kernel: str, text: str, mutant: Mutant, lines: set[int]) -> Result:
        if mutant.line not in lines:
            return Result(kernel, mutant, "not reached")
        how, detail = self._try(text, mutant.edit(text, mutant.fault))
        if how == "unseen" and mutant.trap is not None:
            if self._try(text, mutant.edit(text, mutant.trap))[0] == "unseen":
                how = "never false"
            else:
                assert mutant.poison is not None
                used = self._try(text, mutant.edit(text, mutant.poison))[0] != "unseen"
                if "of a store" in mutant.kind:
                    how = "same value" if used else "overwritten"
                else:
                    how = "unseen" if used else "unused"
        return Result(kernel, mutant, how, detail)

    def _try_together(self, kernel: str, text: str, mutants: Sequence[Mutant]) -> Iterator[Result]:
        """Remove one after the other of what can be missed alone, as long as that is not seen."""
        removed: list[Mutant] = []
        for mutant in mutants:
            how, detail = "unseen", ""
            if removed:
                how, detail = self._try(text, _edit_all(text, [*removed, mutant]))
            if how == "unseen":
                removed.append(mutant)
                yield Result(kernel, mutant, "redundant")
            else:
                yield Result(kernel, mutant, "covered", detail)

    def _try(self, text: str, other: str) -> tuple[str, str]:
        """Run with another text of one kernel."""
        self.execution.edit = lambda t: other if t == text else t
        return self.run()


def _edit_all(text: str, mutants: Sequence[Mutant]) -> str:
    for mutant in sorted(mutants, key=lambda m: m.span, reverse=True):
        text = mutant.edit(text, mutant.fault)
    return text


def main(target: str, case: str, step: str = "1", first: str = "0") -> None:
    """Print what was seen of one case's faults."""
    op, dtype, sample = CASES[case]
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    with execute(target) as execution, assume_gpu():
        trial = Trial(execution, OPERATIONS[op], sample, getattr(torch, dtype))
        for kernel, mutant, how, detail in trial.results(int(step), int(first)):
            counts[kernel, mutant.kind][how] += 1
            if how not in SEEN:
                print(f"{how}: {kernel} line {mutant.line}: {mutant.kind} {detail}", flush=True)
    for (kernel, kind), row in counts.items():
        print(json.dumps({"kernel": kernel, "kind": kind, **row}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
