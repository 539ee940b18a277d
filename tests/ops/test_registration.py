"""Registered launchers: when they are, for whom, and what DTensor needs of their signatures."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn.ops.core.lazy_imports import lazy_module
from fastattn.ops.core.norm import norm_forward
from fastattn.ops.core.registration import kernel_op
from fastattn.ops.core.sharding import rowwise
from fastattn.ops.merge_attention import merge_attention_forward
from support import DEVICE

ROOT = Path(__file__).parents[2]

NOWHERE = lazy_module("fastattn.kernels.nowhere")


def run_in_a_process(code: str) -> str:
    """What `code` prints in a fresh process, which has registered nothing yet."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_settings_that_dtensor_would_not_see_are_refused():
    # DTensor would take the outputs of one call for those of another that differs in `wide` alone.
    def misplaced(x: torch.Tensor, wide: bool, dtype: torch.dtype) -> torch.Tensor:
        return x.new_empty(x.shape[0] if wide else 1, dtype=dtype)

    with pytest.raises(TypeError, match=r"misplaced: dtypes and integers must come before .*bool"):
        kernel_op(NOWHERE.misplaced, sharding=rowwise((0,), (0,)))(misplaced)
    assert not hasattr(torch.ops.fastattn, "misplaced")


def test_absent_outputs_stay_absent_where_the_op_has_none():
    arguments = (
        None,
        None,
        None,
        None,
        1e-6,
        0.0,
        0.0,
        torch.float32,
        torch.float32,
        False,
        "float32",
    )
    with FakeTensorMode():
        y, hidden, statistics = norm_forward(torch.empty(3, 8), *arguments)
    assert y.shape == (3, 8)
    assert hidden is None
    assert statistics.shape == (3, 1)


def test_a_launcher_is_registered_when_something_traces_it():
    printed = run_in_a_process("""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from fastattn.ops.dropout import dropout_forward
print(hasattr(torch.ops.fastattn, "dropout_forward"))
with FakeTensorMode():
    dropout_forward(torch.empty(3), torch.zeros(1, dtype=torch.int64), 0.5)
print(hasattr(torch.ops.fastattn, "dropout_forward"))
print(hasattr(torch.ops.fastattn, "norm_forward"))
torch.ops.import_module("fastattn.ops.registered")
print(hasattr(torch.ops.fastattn, "norm_forward"))
""")
    assert printed.split() == ["False", "True", "False", "True"]


def test_threads_that_trace_a_launcher_first_wait_for_each_other():
    def threaded(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    launch = kernel_op(NOWHERE.threaded)(threaded)
    start = threading.Barrier(8)
    shapes = []

    def trace() -> None:
        start.wait()
        with FakeTensorMode():
            shapes.append(launch(torch.empty(3)).shape)

    threads = [threading.Thread(target=trace) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shapes == [(3,)] * 8


@pytest.mark.kernels
@pytest.mark.slow
def test_an_exported_graph_runs_in_a_process_that_has_traced_nothing(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 8, device=DEVICE)
    module = fastattn.nn.RMSNorm(8, device=DEVICE)
    path = tmp_path / "exported.pt2"
    torch.export.save(torch.export.export(module, (x,)), path)
    torch.save((x, module(x)), tmp_path / "expected.pt")
    printed = run_in_a_process(f"""
import torch
torch.ops.import_module("fastattn.ops.registered")
program = torch.export.load({str(path)!r})
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
print("fastattn.norm_forward" in program.graph_module.code)
print(torch.equal(program.module()(x), expected))
""")
    assert printed.split() == ["True", "True"]


class DTensor(torch.Tensor):
    """What is known by its name."""


def test_launchers_without_a_rule_refuse_distributed_tensors_by_name():
    lse = torch.ones(2, 1, 1, 3).as_subclass(DTensor)
    with pytest.raises(TypeError, match="merge_attention_forward: part_lse is a DTensor"):
        merge_attention_forward(torch.ones(2, 1, 1, 3, 4), lse, torch.float32)
    caches = torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8)
    k, lengths = torch.ones(1, 1, 1, 8), torch.tensor([2])
    with pytest.raises(TypeError, match="decode_attention: k is a DTensor"):
        fastattn.decode_attention(k, caches[0].as_subclass(DTensor), caches[1], lengths=lengths)
    with pytest.raises(TypeError, match="append_kv: v_cache is a DTensor"):
        fastattn.append_kv(caches[0], caches[1].as_subclass(DTensor), k, k, lengths=lengths)
