"""What every test gets: the right process for it, and memory that betrays what was not written."""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_interpreter import quicken_interpreter

import support
from fastattn.interpreter import round_to_bfloat16
from fastattn.ops.core.backends import INTERPRETED
from support import Seed

# Inductor remembers on disk what it generated, and takes code for one processor's vectors to be as
# good for another's.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = Path(tempfile.gettempdir(), f"torchinductor-of-{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


# No test says how long anything takes, and an example may take long where much else runs.
if importlib.util.find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options: other random numbers, compiled kernels on a CPU, more calls and orders."""
    parser.addoption("--seed", type=int, default=0, help="of the tests' random numbers")
    parser.addoption("--compiled", metavar="TARGET", help="execute what is compiled for sm_90, ...")
    parser.addoption("--examples", type=int, default=3, help="random calls of each op")
    parser.addoption("--variation", type=int, help="with --compiled: round as another GPU might")
    parser.addoption("--every-example", action="store_true", help="also those that take long")
    schedules = "seeds of every policy for warp-specialised kernels; 0 for a few schedules"
    parser.addoption("--schedules", type=int, default=0, metavar="N", help=schedules)


def pytest_configure(config: pytest.Config) -> None:
    """Remember the seed where tests' helpers find it, and stand in for a GPU if that is asked."""
    seed: Any = config.getoption("--seed")
    Seed.value = seed
    target: Any = config.getoption("--compiled")
    if target:
        from compiled_plugin import CompiledRun

        variation: Any = config.getoption("--variation")
        config.pluginmanager.register(CompiledRun(target, variation))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave what needs other libraries, or a site that was built, to a run that names it."""
    if collection_path.name not in ("integrations", "site"):
        return None
    named = any(collection_path.name in Path(argument).parts for argument in config.args)
    return None if named else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `kernels` where none can run, `gpu` without a GPU, `example` if not asked for."""
    impossible = {"gpu"} if not torch.cuda.is_available() else set()
    if support.DEVICE is None:
        impossible |= {"kernels", "gpu"}
    if not config.getoption("--every-example"):
        impossible.add("example")
    kept, deselected = [], []
    for item in items:
        unfit = any(mark.name in impossible for mark in item.iter_markers())
        (deselected if unfit else kept).append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = kept


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> None:
    """Spare Triton's interpreter four fifths of its time, and have it round as a GPU does."""
    round_to_bfloat16()
    quicken_interpreter()


@pytest.fixture
def products_by_element(monkeypatch) -> None:
    """Make the interpreter's products sum each element in one order, wherever it is in its tile.

    NumPy leaves them to a library whose rounding depends on a row's place in its matrix. On a GPU
    all of a tile goes through the same instructions.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    def create_dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        wide = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype)
        # The sum over the first axis is one addition of whole matrices after another.
        products = wide[0].T[:, :, None] * wide[1][:, None, :]
        return interpreter.TensorHandle(products.sum(0) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Make `torch.empty` give NaN (and the largest integers), so that unwritten outputs show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan(), "torch no longer fills uninitialised memory"
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(Seed.value)
