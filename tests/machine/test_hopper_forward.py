"""The warp-specialised forward as compiled for sm_90, executed beside float64.

`pytest --schedules N tests/machine/test_hopper_forward.py` tries N seeds of every policy.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.checking import compare_results, measure_reference
from fastattn.machine.execution import Execution, execute
from fastattn.machine.schedule import POLICIES, Schedule
from fastattn.ops.core.backends import INTERPRETED

if INTERPRETED:
    pytest.skip("the kernels are compiled, which the interpreter excludes", allow_module_level=True)

import hopper_calls
from fastattn.kernels import tuning
from fastattn.kernels.attention.hopper.config import RULE
from fastattn.kernels.attention.hopper.launch import has_descriptor
from hopper_calls import Call, on_gpu

KERNEL = "attention_hopper_forward_kernel"

SHALLOW = {dims: replace(config, block_n=64, stages=2) for dims, config in RULE.items()}
"""Small blocks, and rings that turn soon: the number of either is a constant like another."""

KEYS_ODD, KEYS_EVEN = 64 * 5 - 3, 64 * 6
"""2 STAGES + 1 blocks and one more: the ring turns twice, and ends in either phase."""


@pytest.fixture(scope="module")
def execution(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Execution]:
    folder = tmp_path_factory.mktemp("tables")
    with (
        pytest.MonkeyPatch.context() as patch,
        hopper_calls.measured(folder, SHALLOW, patch),
        execute("sm_90") as running,
        on_gpu(),
    ):
        yield running


@pytest.fixture
def schedules(request: pytest.FixtureRequest) -> list[Schedule]:
    """Every schedule that is asked for, or three."""
    seeds: Any = request.config.getoption("--schedules")
    if seeds:
        return [Schedule(policy, seed) for policy in POLICIES for seed in range(seeds)]
    return [Schedule("random"), Schedule("late"), Schedule("high-warps")]


def take_one(schedules: list[Schedule]) -> list[Schedule]:
    """One of three, or every schedule that is asked for."""
    return schedules[1:2] if len(schedules) == 3 else schedules


CAUSAL = {"causal": True}
PACKED = ([0, 20, 20, 220, 230], [0, 40, 90, 290, 290])
"""The second sequence has no queries, the last one no keys, and the others have fewer tiles than
the third."""

CALLS = {
    "whole, an odd number of blocks": Call((64, 64), (1, 1), (130, KEYS_ODD)),
    "causal, an even number": Call(
        (128, 128), (2, 1), (100, KEYS_EVEN), 1, torch.float16, CAUSAL, transposed=True
    ),
    "window": Call((64, 64), (1, 1), (200, KEYS_ODD), options={"window": (70, 20)}),
    "key lengths": Call(
        (64, 64),
        (1, 1),
        (10, 150),
        batch=2,
        options={"kv_lengths": torch.tensor([0, 100])},
        dead=slice(100, None),
    ),
    "packed": Call(
        (64, 64), (1, 1), (230, 300), options=CAUSAL, packed=PACKED, dead=slice(290, None)
    ),
}

MORE = {
    f"{dims[0]}, {dims[1]}, {name}": call
    for dims in RULE
    for name, call in (
        ("whole", Call(dims, (1, 1), (70, KEYS_EVEN), dtype=torch.float16)),
        (
            "causal window",
            Call(
                dims,
                (2, 1),
                (200, KEYS_ODD),
                options={"causal": True, "window": 100},
                transposed=True,
            ),
        ),
    )
} | {"more queries than keys": Call((128, 128), (1, 1), (300, 100), options=CAUSAL)}


def require_right(execution: Execution, call: Call, schedules: list[Schedule]) -> None:
    """Have the kernel run once for each schedule, its numbers right, and nothing reported."""
    expect, tensors = call.expect(), call.tensors()
    for execution.schedule in schedules:
        execution.launches.clear()
        found = call.attend(*tensors)
        assert execution.launches == {KERNEL: 1}
        assert all(comparison.passed for comparison in expect(found)), expect(found)
        assert execution.reports == []
        assert execution.notes == []


@pytest.mark.parametrize("name", CALLS)
def test_the_forward(execution: Execution, schedules: list[Schedule], name: str):
    require_right(execution, CALLS[name], schedules)


@pytest.mark.proof
@pytest.mark.parametrize("name", MORE)
def test_every_head(execution: Execution, schedules: list[Schedule], name: str):
    require_right(execution, MORE[name], take_one(schedules))


@pytest.mark.proof
@pytest.mark.parametrize("dims", RULE)
def test_the_configurations_of_the_rule(tmp_path: Path, schedules: list[Schedule], dims: Any):
    config = RULE[dims]
    with (
        pytest.MonkeyPatch.context() as patch,
        hopper_calls.measured(tmp_path, RULE, patch),
        execute("sm_90") as execution,
        on_gpu(),
    ):
        for blocks in (2 * config.stages + 1, 2 * config.stages + 2):
            call = Call(dims, lengths=(130, config.block_n * blocks), options=CAUSAL)
            require_right(execution, call, take_one(schedules))


def test_gradients_by_the_backward_of_all_devices(execution: Execution):
    call = Call((64, 64), lengths=(70, 90), options=CAUSAL)
    execution.schedule = Schedule()
    execution.launches.clear()
    leaves = [x.requires_grad_() for x in call.tensors()]
    found = call.attend(*leaves)
    do = torch.randn_like(found["o"])
    gradients = torch.autograd.grad(found["o"], leaves, do)
    assert execution.launches[KERNEL] == 1
    assert execution.launches["attention_keys_backward_kernel"] == 1

    def run(change: Any) -> dict[str, torch.Tensor]:
        inputs = [change(x.detach()).requires_grad_() for x in leaves]
        with fastattn.backend("reference"):
            o = call.attend(*inputs)["o"]
        return dict(
            zip(("dq", "dk", "dv"), torch.autograd.grad(o, inputs, change(do)), strict=True)
        )

    actual = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    assert all(c.passed for c in compare_results(actual, measure_reference(run)))


D = (64, 64)
SMALL = {"lengths": (20, 30)}

OTHERS = {
    "softcap": Call(D, **SMALL, options={"softcap": 5.0}),
    "mask": Call(D, **SMALL, options={"mask": torch.rand(20, 30) < 0.9}),
    "bias": Call(D, **SMALL, options={"bias": torch.randn(20, 30)}),
    "sinks": Call(D, **SMALL, options={"sinks": torch.zeros(2)}),
    "dropout": Call(D, **SMALL, options={"dropout_p": 0.5, "dropout_seed": torch.tensor([1])}),
    "a negative scale": Call(D, **SMALL, options={"scale": -1.0}),
    "float32": Call(D, **SMALL, dtype=torch.float32),
    "other heads": Call((32, 32), **SMALL),
}


@pytest.mark.proof
@pytest.mark.parametrize("name", OTHERS)
def test_what_goes_to_the_forward_of_all_devices(execution: Execution, name: str):
    execution.launches.clear()
    OTHERS[name].attend(*OTHERS[name].tensors())
    assert execution.launches == {"attention_forward_kernel": 1}


@pytest.mark.proof
def test_bits_that_hang_on_no_batch_are_those_of_the_forward_of_all_devices(execution: Execution):
    call = Call(D, **SMALL)
    execution.launches.clear()
    with fastattn.batch_invariant():
        call.attend(*call.tensors())
    assert execution.launches == {"attention_forward_kernel": 1}


def beside(x: torch.Tensor, columns: int) -> torch.Tensor:
    """The same numbers in rows with so many more columns, which are somebody else's."""
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + columns)
    wide[..., :-columns] = x
    return wide[..., :-columns]


def test_which_tensors_a_descriptor_takes():
    x = torch.zeros(2, 3, 5, 64, dtype=torch.bfloat16)
    for taken in (x, x.transpose(1, 2), beside(x, 8), x[:, :, ::2], x[:1, :, :, :32]):
        assert has_descriptor(taken)
    one_of_any_stride = x.as_strided((1, 1, 5, 64), (7, 9, 64, 1))
    assert has_descriptor(one_of_any_stride)
    for refused in (
        beside(x, 1),
        x.flatten()[1 : 1 + 2 * 64].view(1, 1, 2, 64),
        x[..., ::2],
        x[:, :1].expand(2, 3, 5, 64),
        x[:, :, :0],
    ):
        assert not has_descriptor(refused)


def test_no_table_that_ships_turns_it_on():
    assert not any(config.used for config in RULE.values())
    for path in tuning.SHIPPED_TABLES.glob("*.json"):
        assert "attention_hopper_forward" not in json.loads(path.read_text())["kernels"]


def test_gluon_is_not_imported_before_it_is_needed():
    program = (
        "import sys, fastattn, fastattn.kernels.attention.forward\n"
        "assert not [name for name in sys.modules if 'gluon' in name and 'hopper' in name]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
