"""fastattn.backend: who chooses, for how long, and what happens when the choice is impossible."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import reference
from fastattn.ops.core import backends
from fastattn.ops.core.backends import INTERPRETED, use_triton
from support import DEVICE


class KernelCalls(TorchDispatchMode):
    """Notes the registered launchers that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastattn":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


KERNEL = "fastattn.norm_forward.default"


class RecordedGraphs:
    """A compiler that runs what Dynamo hands it, and notes what each graph calls."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.targets: list[list[str]] = []

    def __call__(self, module: torch.fx.GraphModule, _: Any) -> Callable:
        self.targets.append([str(node.target) for node in module.graph.nodes])
        return module.forward


def kernel_calls(function: Callable[[], Any]) -> list[str]:
    with KernelCalls() as calls:
        function()
    return calls.names


def rows() -> torch.Tensor:
    return torch.randn(3, 8, device=DEVICE, requires_grad=True)


def norm(x: torch.Tensor) -> torch.Tensor:
    return fastattn.rms_norm(x, None, 1e-6)


@pytest.mark.kernels
def test_context_manager_and_what_it_restores():
    x = rows()
    assert use_triton(x)
    with fastattn.backend("reference"):
        assert not use_triton(x)
        with fastattn.backend("triton"):
            assert use_triton(x)
            with fastattn.backend("auto"):
                assert use_triton(x)
        assert not use_triton(x)
    assert use_triton(x)


@pytest.mark.kernels
def test_an_exception_restores_the_choice_too():
    with pytest.raises(ZeroDivisionError), fastattn.backend("reference"):
        raise ZeroDivisionError
    assert use_triton(rows())


@pytest.mark.kernels
def test_decorator_also_of_a_function_that_calls_itself():
    seen = []

    @fastattn.backend("reference")
    def descend(depth: int) -> None:
        seen.append(use_triton(x))
        if depth:
            descend(depth - 1)
        seen.append(use_triton(x))

    x = rows()
    descend(2)
    assert seen == [False] * 6
    assert use_triton(x)


@pytest.mark.kernels
def test_one_object_can_be_entered_again():
    x = rows()
    chosen = fastattn.backend("reference")
    with chosen, chosen:
        assert not use_triton(x)
    with chosen:
        assert not use_triton(x)
    assert use_triton(x)


@pytest.mark.kernels
def test_the_choice_belongs_to_its_thread():
    x = rows()
    seen = []
    with fastattn.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(use_triton(x)))
        thread.start()
        thread.join()
    assert seen == [True]


@pytest.mark.kernels
def test_one_decorated_function_in_two_threads():
    # Each thread has to get back what it had, though both are inside the same object at once.
    x = rows()
    inside = threading.Barrier(2, timeout=30)
    after: dict[str, bool] = {}

    @fastattn.backend("reference")
    def meet() -> None:
        inside.wait()

    def visit(name: str) -> None:
        with fastattn.backend(name):  # type: ignore[arg-type]
            meet()
            after[name] = use_triton(x)

    threads = [threading.Thread(target=visit, args=(name,)) for name in ("triton", "reference")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert after == {"triton": True, "reference": False}


@pytest.mark.kernels
def test_backward_runs_where_its_forward_ran():
    x = rows()
    y = norm(x)
    with fastattn.backend("reference"):
        assert kernel_calls(y.sum().backward) == ["norm_backward"]
        y = norm(x)
    assert kernel_calls(y.sum().backward) == []


def test_unknown_names():
    for name in ("cuda", "Triton", "", None):
        with pytest.raises(ValueError, match="expected 'auto', 'triton' or 'reference', got"):
            fastattn.backend(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "auto"),
        ({"FASTATTN_BACKEND": ""}, "auto"),
        ({"FASTATTN_BACKEND": "auto"}, "auto"),
        ({"FASTATTN_BACKEND": "reference"}, "reference"),
    ],
)
def test_the_environment_names_a_backend(environment: dict[str, str], expected: str):
    assert backends.read_variable(environment) == expected


def test_the_environment_may_ask_for_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    assert backends.read_variable({"FASTATTN_BACKEND": "triton"}) == "triton"
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="FASTATTN_BACKEND: 'triton' was asked for, but triton"):
        backends.read_variable({"FASTATTN_BACKEND": "triton"})


@pytest.mark.parametrize("name", ["cuda", "Triton", " auto"])
def test_the_environment_may_not_name_another(name: str):
    with pytest.raises(ValueError, match="FASTATTN_BACKEND: expected 'auto', 'triton' or 'ref"):
        backends.read_variable({"FASTATTN_BACKEND": name})


def import_with(name: str) -> subprocess.CompletedProcess[str]:
    """What a process says that begins with this backend, and in another thread too."""
    program = """
import threading, torch, fastattn
from fastattn.ops.core.backends import current_backend
thread = threading.Thread(target=lambda: print(current_backend()))
thread.start(), thread.join()
with fastattn.backend("auto"):
    fastattn.rms_norm(torch.ones(2, 8))
try:
    fastattn.rms_norm(torch.ones(2, 8))
except RuntimeError as error:
    print(error)
"""
    environment = {**os.environ, "FASTATTN_BACKEND": name, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not backends.HAS_TRITON, reason="asks for Triton")
def test_the_variable_is_read_at_import():
    said = import_with("triton").stdout.splitlines()
    assert said[0] == "triton"
    assert "backend 'triton' was asked for, but" in said[1]
    assert import_with("reference").stdout.splitlines() == ["reference"]
    wrong = import_with("gpu")
    assert wrong.returncode != 0
    assert "FASTATTN_BACKEND: expected 'auto', 'triton' or 'reference', got 'gpu'" in wrong.stderr


class Elsewhere:
    """As much of a tensor on a GPU as `use_triton` asks for."""

    is_cpu = False

    def __init__(self, dtype: torch.dtype, device_type: str = "cuda") -> None:
        self.dtype = dtype
        self.device = torch.device(device_type, 0)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of every kind")
def test_a_fall_to_the_reference_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(backends, "_told", set())
    old = "this is 7.5"
    monkeypatch.setattr(backends, "_obstacles", {("cuda", 0): old, ("meta", 0): "it is meta"})
    x: Any = Elsewhere(torch.float32)
    with fastattn.backend("reference"):
        assert not use_triton(x)
    assert not use_triton(torch.ones(2))
    assert not use_triton(Elsewhere(torch.float32, "meta"))  # type: ignore[arg-type]
    assert not caplog.records
    assert not use_triton(x)
    assert not use_triton(x)
    (record,) = caplog.records
    assert record.name == "fastattn"
    assert record.levelname == "WARNING"
    assert old in record.getMessage()
    assert "on cuda" in record.getMessage()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter computes in float64")
def test_a_fall_for_its_dtype_is_told_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(backends, "_told", set())
    monkeypatch.setattr(backends, "_obstacles", {("cuda", 0): None})
    assert use_triton(Elsewhere(torch.float32))  # type: ignore[arg-type]
    assert not caplog.records
    assert not use_triton(Elsewhere(torch.float64))  # type: ignore[arg-type]
    assert "do not compute in float64" in caplog.records[0].getMessage()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors on the CPU")
def test_triton_on_a_cpu_says_why_not():
    x = torch.randn(3, 8)
    with fastattn.backend("triton"):
        for call in (
            lambda: norm(x),
            lambda: fastattn.add_layer_norm(x, x),
            lambda: fastattn.dropout(x, 0.5),
        ):
            with pytest.raises(RuntimeError, match=r"'triton' was asked for, but .*'cpu'"):
                call()
    assert torch.equal(norm(x), reference.rms_norm(x, None, 1e-6))


@pytest.mark.parametrize("mode", ["reference", pytest.param("auto", marks=pytest.mark.kernels)])
def test_meta_tensors_give_meta_tensors(mode):
    x = torch.empty(3, 8, device="meta")
    with fastattn.backend(mode):
        y, new_residual = fastattn.add_layer_norm(x, x, dropout_p=0.1)
        assert fastattn.dropout(x).is_meta
    assert y.is_meta
    assert new_residual.shape == y.shape == (3, 8)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter computes in float64")
def test_triton_in_float64_says_why_not():
    x = rows().double()
    with fastattn.backend("triton"), pytest.raises(RuntimeError, match="float64"):
        norm(x)
    assert not kernel_calls(lambda: norm(x))


@pytest.mark.kernels
def test_a_change_of_backend_recompiles():
    graphs = RecordedGraphs()
    compiled = torch.compile(norm, fullgraph=True, backend=graphs)
    x = rows().detach()
    compiled(x)
    with fastattn.backend("reference"):
        compiled(x)
        compiled(x)
    compiled(x)
    assert [names.count(KERNEL) for names in graphs.targets] == [1, 0]


@pytest.mark.kernels
def test_a_thread_s_first_choice_recompiles():
    graphs = RecordedGraphs()
    compiled = torch.compile(norm, fullgraph=True, backend=graphs)
    x = rows().detach()

    def choose():
        compiled(x)
        with fastattn.backend("reference"):
            compiled(x)

    thread = threading.Thread(target=choose)
    thread.start()
    thread.join()
    assert [names.count(KERNEL) for names in graphs.targets] == [1, 0]


@pytest.mark.kernels
def test_compiled_code_in_another_thread_takes_that_thread_s_choice():
    graphs = RecordedGraphs()
    compiled = torch.compile(norm, fullgraph=True, backend=graphs)
    x = rows().detach()
    with fastattn.backend("reference"):
        compiled(x)
        thread = threading.Thread(target=compiled, args=(x,))
        thread.start()
        thread.join()
    assert [names.count(KERNEL) for names in graphs.targets] == [0, 1]


@pytest.mark.kernels
def test_a_choice_inside_compiled_code():
    @fastattn.backend("reference")
    def decorated(x: torch.Tensor) -> torch.Tensor:
        return norm(x)

    def mixed(x: torch.Tensor) -> torch.Tensor:
        with fastattn.backend("reference"):
            y = norm(x)
        return y + norm(x) + decorated(x)

    graphs = RecordedGraphs()
    x = rows().detach()
    compiled = torch.compile(mixed, fullgraph=True, backend=graphs)
    torch.testing.assert_close(compiled(x), mixed(x))
    assert [names.count(KERNEL) for names in graphs.targets] == [1]
    assert use_triton(x)
