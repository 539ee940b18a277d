"""Print what attention compiles to for a term before and after it is edited, as JSON.

Run in a process of its own, with an empty folder for Triton's cache as its argument.
"""

import importlib.util
import json
import linecache
import os
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(sys.argv[1])
# The files that follow each other differ in less than their times and sizes may show.
sys.dont_write_bytecode = True
os.environ["TRITON_CACHE_DIR"] = str(FOLDER / "cache")

import torch  # noqa: E402

import fastattn  # noqa: E402
from fastattn.machine.driver import TARGETS, Recorder, stub_driver  # noqa: E402
from fastattn.ops.core.backends import assume_gpu, backend  # noqa: E402

TERM = """
import triton
import triton.language as tl
from fastattn.terms import ScoreFunctions, ScoreTerm


@triton.jit
def inner(score):
    return {inner}


@triton.jit
def outer(score, m, n, place, args):
    return {outer}


@triton.jit
def passed_on(dscore, score, m, n, place, args):
    return dscore


class Edited(ScoreTerm):
    @classmethod
    def triton_functions(cls):
        return ScoreFunctions(outer, passed_on)
"""


def written(inner: str, outer: str) -> ModuleType:
    """The module of a term, under one and the same name every time."""
    path = FOLDER / "edited.py"
    path.write_text(TERM.format(inner=inner, outer=outer))
    linecache.clearcache()
    spec = importlib.util.spec_from_file_location("edited", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Compile the term as it was at first, edited, with what it calls edited, and as at first."""
    q = torch.empty(1, 1, 64, 16, dtype=torch.bfloat16)
    recorder = Recorder()
    found = []
    with stub_driver(TARGETS["sm_90"], recorder), assume_gpu(), backend("triton"):
        for inner, outer in (
            ("score * 2.0", "inner(score)"),
            ("score * 2.0", "inner(score) + 3.0"),
            ("tl.exp2(score)", "inner(score) + 3.0"),
            ("score * 2.0", "inner(score)"),
        ):
            term = written(inner, outer).Edited()
            fastattn.attention(q, q, q, score_mods=[term])
            (kernel,) = recorder.take()
            found.append(kernel.files["ptx"].read_text())
    print(json.dumps([found.index(text) for text in found]))


main()
