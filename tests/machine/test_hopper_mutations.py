"""Faults planted in the warp-specialised forward: each must be seen, or have its reason."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.machine.execution import Execution, execute
from fastattn.machine.schedule import Schedule
from fastattn.ops.core.backends import INTERPRETED

if INTERPRETED:
    pytest.skip("the kernels are compiled, which the interpreter excludes", allow_module_level=True)

import hopper_calls
from fastattn.kernels.attention.hopper import launch
from fastattn.kernels.attention.hopper.config import HopperConfig
from hopper_calls import Call, kinds_of_faults, on_gpu

SCHEDULES = Schedule("random", 1), Schedule("late")
STAGES = 2
DIMS = (64, 64)
CALL = Call(DIMS, (1, 1), (128, 64 * (2 * STAGES + 1)))
PADDED = Call(
    DIMS,
    (1, 1),
    (128, 150),
    options={"kv_lengths": torch.tensor([100])},
    dead=slice(100, None),
)
"""Values behind the last key are NaN, and one consumer sets them to zero for both."""


@pytest.fixture(scope="module")
def execution(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Execution]:
    configs = {DIMS: HopperConfig(2, 64, STAGES, alternates=True)}
    folder = tmp_path_factory.mktemp("tables")
    with (
        pytest.MonkeyPatch.context() as patch,
        hopper_calls.measured(folder, configs, patch),
        execute("sm_90") as running,
        on_gpu(),
    ):
        yield running


def test_without_a_fault(execution: Execution):
    for execution.schedule in SCHEDULES:
        assert kinds_of_faults(execution, CALL) == set()
        assert kinds_of_faults(execution, PADDED) == set()


FREE_V = "        free_block(supply.v, block - 1, CUT)\n"
AWAIT_V = "        acc = await_values(issued)\n"
FREE_K = "        free_block(supply.k, block, CUT)\n"
AWAIT_K = "        scores = warpgroup_mma_wait(len(acc), deps=(scores,))\n"
FENCE = "        fence_async_shared()\n"

FAULTS: dict[str, tuple[str, str, str, str, Call]] = {
    "no arrival": ("consumer.py", FREE_V, "", "deadlock", CALL),
    "no arrival for keys": ("consumer.py", FREE_K, "", "deadlock", CALL),
    "the producer waits for the other phase": ("ring.py", "phase ^ 1)", "phase)", "deadlock", CALL),
    "the producer does not wait": (
        "ring.py",
        "    mbarrier.wait(ring.empty.index(stage), phase ^ 1)\n",
        "",
        "race",
        CALL,
    ),
    "consumers do not wait": (
        "ring.py",
        "    mbarrier.wait(ring.ready.index(stage), phase)\n",
        "",
        "race",
        CALL,
    ),
    "consumers wait for the other phase": (
        "ring.py",
        "    mbarrier.wait(ring.ready.index(stage), phase)\n",
        "    mbarrier.wait(ring.ready.index(stage), phase ^ 1)\n",
        "race deadlock",
        CALL,
    ),
    "queries are not waited for": (
        "forward.py",
        "    mbarrier.wait(q_ready.index(NUMBER), 0)\n",
        "",
        "race",
        CALL,
    ),
    "values are freed before their product": (
        "consumer.py",
        AWAIT_V + FREE_V,
        FREE_V + AWAIT_V,
        "race",
        CALL,
    ),
    "keys are freed before their product": (
        "consumer.py",
        AWAIT_K + FREE_K,
        FREE_K + AWAIT_K,
        "race",
        CALL,
    ),
    "scores are waited for by one too few": (
        "consumer.py",
        AWAIT_K,
        AWAIT_K.replace("len(acc)", "len(acc) + 1"),
        "numbers registers",
        CALL,
    ),
    "one arrival too few": (
        "ring.py",
        "allocate_barriers(CUT.stages, CUT.consumers),",
        "allocate_barriers(CUT.stages, 1),",
        "race mbarrier deadlock",
        CALL,
    ),
    "one arrival too many": (
        "ring.py",
        "allocate_barriers(CUT.stages, CUT.consumers),",
        "allocate_barriers(CUT.stages, 3),",
        "deadlock",
        CALL,
    ),
    "half of the bytes": (
        "ring.py",
        "mbarrier.expect(ready, descs[0].block_type.nbytes)\n",
        "mbarrier.expect(ready, 4096)\n",
        "race deadlock mbarrier",
        CALL,
    ),
    "another buffer": (
        "ring.py",
        "    return stage\n",
        "    return (block + 1) % CUT.stages\n",
        "race",
        CALL,
    ),
    "values of another block": (
        "consumer.py",
        "issue_values(acc, weights, supply.v, block - 1, CUT)",
        "issue_values(acc, weights, supply.v, block, CUT)",
        "race deadlock numbers",
        CALL,
    ),
    "a block too few": (
        "forward.py",
        "CUT.block_n), 1)\n",
        "CUT.block_n) - 1, 1)\n",
        "numbers deadlock",
        CALL,
    ),
    "the turn is not passed on": (
        "consumer.py",
        "            pass_issue(supply, NUMBER, CUT)\n",
        "            pass\n",
        "deadlock",
        CALL,
    ),
    "every consumer waits for its first turn": (
        "consumer.py",
        "phase ^ 1 if NUMBER == 0 else phase)",
        "phase)",
        "deadlock",
        CALL,
    ),
    "values behind the end are left": (
        "forward.py",
        "        if left < CUT.block_n:\n",
        "        if left < 0:\n",
        "numbers",
        PADDED,
    ),
    "no fence after zeros": ("forward.py", FENCE, "", "proxy", PADDED),
    "zeros are not waited for": (
        "forward.py",
        "    mbarrier.wait(cleared.index(0), 0)\n",
        "",
        "race",
        PADDED,
    ),
    "zeros before the values": (
        "forward.py",
        "        place = await_block(ring, block, CUT)\n",
        "        place = block % CUT.stages\n",
        "race",
        PADDED,
    ),
}
"""Where what is replaced by what, how that may be told, and in which call."""

EQUIVALENT: dict[str, tuple[str, str, str, str]] = {
    "turns are not waited for": (
        "consumer.py",
        "            await_issue(supply, block, NUMBER)\n",
        "            pass\n",
        "turns are for speed: consumers share nothing that one writes but the rings",
    ),
    "weights go from loop to loop as they are": (
        "consumer.py",
        """"mov.b32 $0, $1;", "=r,r", [weights]""",
        """"// $0 $1", "=r,0", [weights]""",
        "the instruction copies, and is there for the assembler",
    ),
}
"""Changes that no run can tell, each with the reason."""

QUICK = (
    "no arrival",
    "consumers wait for the other phase",
    "values are freed before their product",
    "zeros are not waited for",
)


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What makes launches take the kernel with something replaced in one of its files."""
    package = tmp_path / "faulty_hopper"
    shutil.copytree(Path(launch.__file__).parent, package)
    for path in package.glob("*.py"):
        text = path.read_text().replace("from ...", "from fastattn.kernels.")
        path.write_text(text.replace("from ..", "from fastattn.kernels.attention."))
    monkeypatch.syspath_prepend(str(tmp_path))

    def plant(file: str, old: str, new: str) -> None:
        text = (package / file).read_text()
        assert text.count(old) == 1, text.count(old)
        (package / file).write_text(text.replace(old, new))
        module = importlib.import_module("faulty_hopper.forward")
        kernel = module.attention_hopper_forward_kernel
        monkeypatch.setattr(launch, "load_kernel", lambda: kernel)
        launch.bound_launch.cache_clear()

    yield plant
    launch.bound_launch.cache_clear()
    for name in [name for name in sys.modules if name.startswith("faulty_hopper")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.proof) for n in FAULTS]
)
def test_a_fault_is_seen(execution: Execution, faulty: Any, name: str):
    file, old, new, expected, call = FAULTS[name]
    faulty(file, old, new)
    for execution.schedule in SCHEDULES:
        found = kinds_of_faults(execution, call)
        assert found & set(expected.split()), found


@pytest.mark.proof
@pytest.mark.parametrize("name", EQUIVALENT)
def test_what_is_no_fault_is_not_told(execution: Execution, faulty: Any, name: str):
    file, old, new, _ = EQUIVALENT[name]
    faulty(file, old, new)
    for execution.schedule in SCHEDULES:
        assert kinds_of_faults(execution, CALL) == set()
