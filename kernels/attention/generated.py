"""Terms whose Triton functions are written by a program: their source, and what it may call.

The functions of a source are compiled from memory, never from a file that others could write.
`linecache` has the lines, so that Triton, tracebacks and debuggers find them.
"""

import hashlib
import linecache
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from ..common import tanh
from .composition import define
from .functions import MaskFunctions, ParameterFunctions, ScoreFunctions
from .places import exists


@triton.jit
def floor_divide(a, b):
    """The largest integer not above a / b, as Python and PyTorch divide integers."""
    quotient = a // b
    inexact = (a - quotient * b) != 0
    return tl.where(inexact & ((a < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def floor_remainder(a, b):
    """What that leaves, of b's sign."""
    return a - floor_divide(a, b) * b


@triton.jit
def truncate(x):
    """The integer next to a float on the way to zero."""
    return tl.where(x < 0.0, tl.ceil(x), tl.floor(x))


@triton.jit
def sign(x):
    """-1, 0 or 1, in the dtype of x."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def tanh_of(x):
    """The hyperbolic tangent of a float."""
    result, _ = tanh(x)
    return result


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of a float, which neither overflows nor loses what is small."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def wrap_index(i, size):
    """An index from the end, as a negative one is, from the beginning."""
    i = i.to(tl.int64)
    return tl.where(i < 0, i + size, i)


HELPERS = {
    function.__name__: function
    for function in (
        exists,
        floor_divide,
        floor_remainder,
        sigmoid,
        sign,
        tanh_of,
        truncate,
        wrap_index,
    )
}
"""What a source may call besides `tl`."""

_known: set[str] = set()


def define_source(source: str, loads_tiles: bool, learned: Sequence[tuple[int, bool]] = ()) -> str:
    """Enter the term that a source has the functions of, and return its name.

    Args:
        source: of `keep` for a mask, of `score` and `score_backward` for a score term, each with
            the parameters that functions.py says, without decorators; and of `parameter_0` and so
            on for what it learns, with `index_0` where that is a table.
        loads_tiles: whether it loads a number for each score.
        learned: of each parameter the place of its tensor, and whether that has a number for each
            score.
    """
    known = f"{source}{learned}"
    # Long enough that no other source has it: another term's kernel would be taken without a word.
    name = f"written {hashlib.sha256(known.encode()).hexdigest()[:32]} {int(loads_tiles)}"
    if name not in _known:
        file = f"<attention term {name}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        scope: dict[str, Any] = {"tl": tl, **HELPERS}
        exec(compile(source, file, "exec"), scope)
        _define(name, scope, loads_tiles, learned)
        _known.add(name)
    return name


def _define(
    name: str, scope: dict[str, Any], loads_tiles: bool, learned: Sequence[tuple[int, bool]]
) -> None:
    """Enter the term whose functions are in a scope."""

    def find(function: str) -> Any:
        return triton.jit(scope[function]) if function in scope else None

    if "keep" in scope:
        define(name, MaskFunctions(find("keep"), loads_tiles=loads_tiles))
        return
    parameters = tuple(
        ParameterFunctions(find(f"parameter_{i}"), find(f"index_{i}"), tensor, per_score)
        for i, (tensor, per_score) in enumerate(learned)
    )
    score, backward = find("score"), find("score_backward")
    functions = ScoreFunctions(
        score, backward, hides=True, loads_tiles=loads_tiles, parameters=parameters
    )
    define(name, functions)
