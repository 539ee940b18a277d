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
from .functions import MaskFunctions, ScoreFunctions
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


def define_source(source: str, loads_tiles: bool) -> str:
    """Enter the term that a source has the functions of, and return its name.

    Args:
        source: of `keep` for a mask, of `score` and `score_backward` for a score term, each with
            the parameters that functions.py says, without decorators.
        loads_tiles: whether it loads a number for each score.
    """
    # Long enough that no other source has it: another term's kernel would be taken without a word.
    name = f"written {hashlib.sha256(source.encode()).hexdigest()[:32]} {int(loads_tiles)}"
    if name not in _known:
        file = f"<attention term {name}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        scope: dict[str, Any] = {"tl": tl, **HELPERS}
        exec(compile(source, file, "exec"), scope)
        functions = [triton.jit(scope[name]) for name in _names_of(scope)]
        if len(functions) == 1:
            define(name, MaskFunctions(functions[0], loads_tiles=loads_tiles))
        else:
            define(name, ScoreFunctions(*functions, hides=True, loads_tiles=loads_tiles))
        _known.add(name)
    return name


def _names_of(scope: dict[str, Any]) -> Sequence[str]:
    return ("keep",) if "keep" in scope else ("score", "score_backward")
