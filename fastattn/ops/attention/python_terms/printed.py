"""A traced term as the kernels take it: its source, and all arguments."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .learning import Layout
from .printing import Function
from .term_arguments import TermArguments
from .trace import INDICES, Traced, TracedScore


class Printed(NamedTuple):
    """A term as the kernels take it."""

    source: str
    arguments: TermArguments
    loads_tiles: bool
    numbers_used: frozenset[str]
    layouts: Sequence[Layout] = ()
    """The tensors that learn, whose arranged forms follow the captured tensors."""
    learned: Sequence[tuple[int, bool]] = ()
    """What `define_source` of the kernels takes."""


def print_mask(traced: Traced) -> Printed:
    """A mask, whose source has `keep`."""
    arguments = TermArguments(traced.numbers)
    keep = Function(traced, INDICES, arguments, "truth")
    return _join(arguments, {"keep(m, n, place, args)": keep})


def print_score(traced: TracedScore) -> Printed:
    """A score term, whose source has `score`, `score_backward`, and what it learns."""
    arguments = TermArguments(traced.forward.numbers, learned=len(traced.layouts))

    def gradient(graph: Traced) -> Function:
        return Function(graph, ("dscore", "score", *INDICES), arguments, "score")

    functions = {
        "score(score, m, n, place, args)": Function(
            traced.forward, ("score", *INDICES), arguments, "score"
        ),
        "score_backward(dscore, score, m, n, place, args)": gradient(traced.backward),
    }
    for i, read in enumerate(traced.learned):
        functions[f"parameter_{i}(dscore, score, m, n, place, args)"] = gradient(read.backward)
        if read.index is not None:
            index = Function(read.index, INDICES, arguments, "index")
            functions[f"index_{i}(m, n, place, args)"] = index
    printed = _join(arguments, functions)
    first = len(arguments.tensors)
    learned = [(first + x.layout, traced.layouts[x.layout].per_score) for x in traced.learned]
    return printed._replace(layouts=traced.layouts, learned=learned)


def _join(arguments: TermArguments, functions: Mapping[str, Function]) -> Printed:
    parts = [
        "\n    ".join((f"def {head}:", *function.lines)) + "\n"
        for head, function in functions.items()
    ]
    return Printed(
        arguments.resolve("\n\n".join(parts)),
        arguments,
        any(function.loads_tiles for function in functions.values()),
        frozenset().union(*(function.numbers_used for function in functions.values())),
    )
