"""Faults planted in the warp-specialised backward kernels: each must be seen."""

import importlib
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastattn.machine.execution import Execution, execute
from fastattn.machine.parser import PtxError
from fastattn.machine.schedule import Schedule
from fastattn.ops.core.backends import INTERPRETED

if INTERPRETED:
    pytest.skip("the kernels are compiled, which the interpreter excludes", allow_module_level=True)

from fastattn.kernels.attention.hopper import launch_backward
from fastattn.kernels.attention.hopper.backward_config import KEYS, QUERIES, HopperBackwardConfig
from fastattn.kernels.attention.launch import Call, Gradient
from hopper_calls import on_gpu

SCHEDULES = Schedule("random", 1), Schedule("late")
STAGES = 2
CONFIG = HopperBackwardConfig(64, STAGES)
BLOCKS = 2 * STAGES + 1
D = 64


class Problem(NamedTuple):
    """One head of a sequence, or of two packed ones, and its gradients in float64."""

    call: Call
    gradient: Gradient
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def make_problem(queries: int, keys: int, others: int = 0) -> Problem:
    """A sequence; with as many `others` behind it, of queries and of keys, that are NaN."""
    generator = torch.Generator().manual_seed(1)

    def rows(count: int) -> torch.Tensor:
        x = torch.randn(count, D, generator=generator)
        return torch.cat([x, torch.full((others, D), math.nan)]).to(torch.bfloat16)

    q, k, v, do = rows(queries), rows(keys), rows(keys), rows(queries)
    of_q, of_do = q[:queries].double(), do[:queries].double()
    of_k, of_v = k[:keys].double(), v[:keys].double()
    scores = of_q @ of_k.T / 8
    lse = scores.logsumexp(1)
    weights = (scores - lse[:, None]).exp()
    delta = (weights @ of_v * of_do).sum(1)
    ds = weights * (of_do @ of_v.T - delta[:, None]) / 8
    lse, delta = (
        torch.cat([x.float(), torch.full((others,), math.nan)])[None, None] for x in (lse, delta)
    )
    starts = [torch.tensor([0, n, n + others], dtype=torch.int32) for n in (queries, keys)]
    lengths = (*starts, queries, keys) if others else (None, None, 0, 0)
    tensors = (x[None, None] for x in (q, k, v, do))
    *attended, incoming = tensors
    call = Call(*attended, *lengths, None, 0.0, 1 / 8, "ieee", "", [], [], [], False)
    gradient = Gradient(incoming, lse, lse, delta)
    return Problem(call, gradient, ds @ of_k, ds.T @ of_q, weights.T @ of_do)


WHOLE = {KEYS: make_problem(64 * BLOCKS, 128), QUERIES: make_problem(128, 64 * BLOCKS)}
PACKED = make_problem(70, 100, 60)
"""Behind the sequence's last rows come some of another, which are NaN: one consumer sets them to
zero for both."""


@pytest.fixture(scope="module")
def execution() -> Iterator[Execution]:
    with execute("sm_90") as running, on_gpu():
        yield running


def is_right(kernel: str, problem: Problem) -> bool:
    """Whether a kernel's numbers are right, up to a few roundings to bfloat16.

    That tells a planted fault, which is far off, from none; how exact the kernels are is held by
    the accuracy rule in test_hopper_backward.py.
    """
    if kernel == KEYS:
        found = launch_backward.launch_keys_backward(problem.call, problem.gradient, CONFIG)
        expected = problem.dk, problem.dv
    else:
        found = (launch_backward.launch_queries_backward(problem.call, problem.gradient, CONFIG),)
        expected = (problem.dq,)
    return all(
        torch.allclose(x[0, 0, : len(exact)].double(), exact, rtol=1e-2, atol=2e-2)
        for x, exact in zip(found, expected, strict=True)
    )


def kinds_of_faults(execution: Execution, kernel: str, problem: Problem) -> set[str]:
    """Under which names a kernel's faults are told; "numbers" if its results are wrong."""
    execution.reports.clear()
    try:
        texts = [] if is_right(kernel, problem) else [": numbers: "]
    except PtxError as error:
        texts = [str(error)]
    found = (re.search(r": (\w+): ", text) for text in [*execution.reports, *texts])
    return {match[1] for match in found if match is not None}


@pytest.mark.proof
@pytest.mark.parametrize("kernel", [KEYS, QUERIES])
def test_without_a_fault(execution: Execution, kernel: str):
    for execution.schedule in SCHEDULES:
        for problem in (WHOLE[kernel], PACKED):
            assert kinds_of_faults(execution, kernel, problem) == set()


K, Q, G = "backward_keys.py", "backward_queries.py", "gradients.py"

FREE_Q = "        free_block(q_ring.ring, turn - 1, CUT)\n"
FREE_DO = "        free_block(do_ring.ring, turn, CUT)\n    return KeyGradients"
AWAIT_DV = "        dv = await_values(dv_issued)\n"
WEIGHTS = "    weights = weigh_transposed("
SCORES_DONE = "    scores = warpgroup_mma_wait(PENDING, deps=(scores,))\n"
FREE_K = "        free_block(k_ring, turn - 1, CUT)\n"
AWAIT_DQ = "        dq = await_values(issued)\n"
FREE_V = "    free_block(v_ring, turn, CUT)\n"
AWAIT_DWEIGHTS = "    dweights = warpgroup_mma_wait(PENDING, deps=(dweights,))\n"

FAULTS: dict[str, tuple[str, str, str, str, str, bool]] = {
    "queries are never freed": (KEYS, K, FREE_Q, "", "deadlock", False),
    "do is freed before its product": (
        KEYS,
        K,
        AWAIT_DV + FREE_DO,
        FREE_DO.replace("    return KeyGradients", AWAIT_DV + "    return KeyGradients"),
        "race",
        False,
    ),
    "queries are freed in the turn of their scores": (
        KEYS,
        K,
        FREE_Q,
        FREE_Q.replace("turn - 1", "turn"),
        "race deadlock mbarrier",
        False,
    ),
    "the producer waits for the other phase": (
        KEYS,
        G,
        "phase ^ 1)",
        "phase)",
        "deadlock",
        False,
    ),
    "the producer does not wait": (
        KEYS,
        G,
        "    mbarrier.wait(ring.empty.index(stage), phase ^ 1)\n",
        "",
        "race",
        False,
    ),
    "rows are not waited for": (
        KEYS,
        G,
        "    place = await_block(source.ring, turn, CUT)\n",
        "    place = turn % CUT.stages\n",
        "race",
        False,
    ),
    "numbers are not expected": (
        KEYS,
        G,
        "descs[0].block_type.nbytes + numbers_desc.block_type.nbytes\n",
        "descs[0].block_type.nbytes\n",
        "race mbarrier deadlock",
        False,
    ),
    "scores are waited for by one too few": (
        KEYS,
        K,
        SCORES_DONE,
        SCORES_DONE.replace("PENDING,", "PENDING + 1,"),
        "numbers registers",
        False,
    ),
    "dk and do v are waited for by one too few": (
        KEYS,
        K,
        "await_sums(dk, dweights, len(dv))",
        "await_sums(dk, dweights, len(dv) + 1)",
        "numbers registers",
        False,
    ),
    "ds with queries of its own turn": (
        KEYS,
        K,
        "issue_sums(dk, dscores, q_ring.ring, turn - 1, CUT)",
        "issue_sums(dk, dscores, q_ring.ring, turn, CUT)",
        "numbers",
        False,
    ),
    "the last ds is left out": (
        KEYS,
        K,
        "    dk = await_values(issue_sums(dk, dscores, q_ring.ring, turn_count - 1, CUT))\n",
        "",
        "numbers",
        False,
    ),
    "a head too few": (
        KEYS,
        K,
        "HEADS.group * (turns.masked + turns.full)",
        "HEADS.group * (turns.masked + turns.full) - 1",
        "numbers end deadlock",
        False,
    ),
    "one arrival too few": (
        KEYS,
        G,
        "allocate_barriers(CUT.stages, CUT.consumers),",
        "allocate_barriers(CUT.stages, 1),",
        "race mbarrier deadlock",
        False,
    ),
    "keys are not waited for": (
        KEYS,
        K,
        "    mbarrier.wait(k_ready.index(NUMBER), 0)\n",
        "",
        "race",
        False,
    ),
    "no fence after zeros": (KEYS, G, "    fence_async_shared()\n", "", "proxy", True),
    "zeros are not waited for": (
        KEYS,
        K,
        "    mbarrier.wait(cleared.index(turn % CUT.stages), (turn // CUT.stages) & 1)\n",
        "",
        "race",
        True,
    ),
    "another sequence's rows are left": (
        KEYS,
        K,
        "        if end < CUT.block_m:\n",
        "        if end < 0:\n",
        "numbers",
        True,
    ),
    "keys are never freed": (QUERIES, Q, FREE_K, "", "deadlock", False),
    "keys are freed before their product": (
        QUERIES,
        Q,
        AWAIT_DQ + FREE_K,
        FREE_K + AWAIT_DQ,
        "race",
        False,
    ),
    "values are freed before their product": (
        QUERIES,
        Q,
        AWAIT_DWEIGHTS + FREE_V,
        FREE_V + AWAIT_DWEIGHTS,
        "race",
        False,
    ),
    "scores of queries are waited for by one too few": (
        QUERIES,
        Q,
        "PENDING + len(task.do)\n",
        "PENDING + len(task.do) + 1\n",
        "numbers registers",
        False,
    ),
    "ds with keys of its own turn": (
        QUERIES,
        Q,
        "issue_sums(dq, dscores, k_ring, turn - 1, CUT)",
        "issue_sums(dq, dscores, k_ring, turn, CUT)",
        "numbers",
        False,
    ),
    "do is not waited for": (
        QUERIES,
        Q,
        "    mbarrier.wait(do_ready.index(NUMBER), 0)\n",
        "",
        "race",
        False,
    ),
    "another sequence's keys are left": (
        QUERIES,
        Q,
        "        if (first > 0) | (end < CUT.block_n):\n",
        "        if first > CUT.block_n:\n",
        "numbers",
        True,
    ),
}
"""In which kernel and file what is replaced by what, how that may be told, and whether it takes
packed sequences."""

QUICK = (
    "do is freed before its product",
    "scores are waited for by one too few",
    "zeros are not waited for",
    "keys are freed before their product",
)


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What makes launches take a kernel with something replaced in one of its files."""
    package = tmp_path / "faulty_backward"
    shutil.copytree(Path(launch_backward.__file__).parent, package)
    for path in package.glob("*.py"):
        text = path.read_text().replace("from ...", "from fastattn.kernels.")
        path.write_text(text.replace("from ..", "from fastattn.kernels.attention."))
    monkeypatch.syspath_prepend(str(tmp_path))

    def plant(kernel: str, file: str, old: str, new: str) -> None:
        text = (package / file).read_text()
        assert text.count(old) == 1, text.count(old)
        (package / file).write_text(text.replace(old, new))
        module = importlib.import_module(f"faulty_backward.{launch_backward.MODULES[kernel]}")
        found = getattr(module, f"{kernel}_kernel")
        monkeypatch.setattr(launch_backward, "load_kernel", lambda module, name: found)
        launch_backward.bound_launch.cache_clear()

    yield plant
    launch_backward.bound_launch.cache_clear()
    for name in [name for name in sys.modules if name.startswith("faulty_backward")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.proof) for n in FAULTS]
)
def test_a_fault_is_seen(execution: Execution, faulty: Any, name: str):
    kernel, file, old, new, expected, packed = FAULTS[name]
    faulty(kernel, file, old, new)
    problem = PACKED if packed else WHOLE[kernel]
    for execution.schedule in SCHEDULES:
        found = kinds_of_faults(execution, kernel, problem)
        assert found & set(expected.split()), found
