"""Faults planted in warp-specialised kernels: each must be seen, and as what it is."""

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastattn.machine.execution import Execution, execute
from fastattn.machine.parser import PtxError
from fastattn.machine.schedule import Schedule
from fastattn.ops.core.backends import INTERPRETED

if INTERPRETED:
    pytest.skip("the kernels are compiled, which the interpreter excludes", allow_module_level=True)

import gluon_attention
import tma_kernels
from triton.tools.tensor_descriptor import TensorDescriptor

SCHEDULES = Schedule("random", 1), Schedule("late")
STAGES = 2


@pytest.fixture(scope="module")
def execution() -> Iterator[Execution]:
    with execute("sm_90") as running:
        yield running


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


Q, K, V = random(128, 64), random(64 * (2 * STAGES + 1), 64), random(64 * (2 * STAGES + 1), 64)
EXACT = (Q.double() @ K.double().T / 8).softmax(-1) @ V.double()
A, B = random(64, 200), random(200, 64)


def attend(attention: Callable[..., torch.Tensor] = gluon_attention.attention) -> bool:
    """Whether attention's numbers are right."""
    return bool(torch.allclose(attention(Q, K, V, STAGES).double(), EXACT, rtol=1e-2, atol=5e-3))


def multiply() -> bool:
    """Whether the matrix product's numbers are right."""
    c = torch.full((64, 64), float("nan"), dtype=torch.bfloat16)
    descriptors = (TensorDescriptor.from_tensor(x, [64, 64]) for x in (A, B, c))
    tma_kernels.matmul_kernel[1, 1](*descriptors, 200, 64, 64, 64, num_stages=3)
    return bool(torch.allclose(c.double(), A.double() @ B.double(), rtol=1e-2, atol=1e-2))


def kinds_of_faults(execution: Execution, run: Callable[[], bool]) -> set[str]:
    """Under which names a run's faults are told; "numbers" if they are wrong."""
    execution.reports.clear()
    try:
        texts = [] if run() else [": numbers: "]
    except PtxError as error:
        texts = [str(error)]
    found = (re.search(r": (\w+): ", text) for text in [*execution.reports, *texts])
    return {match[1] for match in found if match is not None}


def test_without_a_fault(execution: Execution):
    for execution.schedule in SCHEDULES:
        assert kinds_of_faults(execution, attend) == set()
        assert kinds_of_faults(execution, multiply) == set()


# In the source, compiled anew.

ARRIVE_V = "        mbarrier.arrive(v_empty.index(v_stage), count=1)\n"
WAIT_V = "        acc = warpgroup_mma_wait(0, deps=(acc_running,))\n"
SOURCE = {
    "no arrival": (ARRIVE_V, "", "deadlock"),
    "the producer waits for the other phase": ("phase ^ 1)", "phase)", "deadlock"),
    "the producer does not wait": (
        "    mbarrier.wait(empty.index(stage), phase ^ 1)\n",
        "",
        "race",
    ),
    "a consumer does not wait": (
        "        mbarrier.wait(v_ready.index(v_stage), v_phase)\n",
        "",
        "race",
    ),
    "a consumer waits for the other phase": (
        "mbarrier.wait(v_ready.index(v_stage), v_phase)",
        "mbarrier.wait(v_ready.index(v_stage), v_phase ^ 1)",
        "race deadlock",
    ),
    "freed before the product is waited for": (WAIT_V + ARRIVE_V, ARRIVE_V + WAIT_V, "race"),
    "one arrival too few": (
        "mbarrier.init(v_empty.index(stage), count=2)",
        "mbarrier.init(v_empty.index(stage), count=1)",
        "race",
    ),
    "half of the bytes": (
        "desc.block_type.nbytes)\n    place",
        "2048)\n    place",
        "race deadlock",
    ),
    "scores not waited for": (
        "s = warpgroup_mma_wait(1, deps=(s_running,))",
        "s = warpgroup_mma_wait(2, deps=(s_running,))",
        "numbers",
    ),
    "another stage": ("v_stage = (block - 1)", "v_stage = block", "numbers race deadlock"),
}
"""What is replaced, by what, and how that may be told."""


@pytest.mark.parametrize("name", SOURCE)
def test_faults_in_the_source(execution: Execution, tmp_path: Path, name: str):
    old, new, expected = SOURCE[name]
    text = Path(gluon_attention.__file__).read_text()
    assert text.count(old) == 1, text.count(old)
    path = tmp_path / "faulty_attention.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("faulty_attention", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for execution.schedule in SCHEDULES:
        found = kinds_of_faults(execution, lambda: attend(module.attention))
        assert found & set(expected.split()), found


# In the code.

CODE = {
    "no wgmma.fence": (attend, r"wgmma\.fence\.sync\.aligned;", "", "registers"),
    "more registers than there are": (
        attend,
        r"setmaxnreg\.inc\.sync\.aligned\.u32 \t240;",
        "setmaxnreg.inc.sync.aligned.u32 256;",
        "deadlock",
    ),
    "a copy by all threads": (attend, r"@%p\d+ (?=cp\.async\.bulk)", "", "copy"),
    "no mbarrier": (attend, r"@%p\d+ mbarrier\.init[^;]*;", "", "mbarrier"),
    "no barrier before an arrival": (
        attend,
        r"bar\.sync \t\d, 128;(?=(?:\n.*){1,9}mbarrier\.arrive\.shared)",
        "",
        "race",
    ),
    "no proxy fence": (multiply, r"fence\.proxy\.async\.shared::cta;", "", "proxy"),
    "no wait for a store": (multiply, r"cp\.async\.bulk\.wait_group[^;]*;", "", "end"),
    "no commit of products": (multiply, r"wgmma\.commit_group[^;]*;", "", "numbers"),
}
"""What runs, what is replaced wherever it stands, by what, and how that must be told."""


@pytest.mark.parametrize("name", CODE)
def test_faults_in_the_code(execution: Execution, name: str):
    run, pattern, replacement, expected = CODE[name]
    counts = itertools.count()

    def edit(text: str) -> str:
        changed, count = re.subn(pattern, replacement, text)
        next(counts) if count else None
        return changed

    execution.edit = edit
    try:
        for execution.schedule in SCHEDULES:
            found = kinds_of_faults(execution, run)
            assert expected in found, found
    finally:
        execution.edit = None
    assert next(counts) > 0
