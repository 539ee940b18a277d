"""The warp-specialised backward kernels as compiled for sm_90, executed beside float64.

`pytest --schedules N tests/machine/test_hopper_backward.py` tries N seeds of every policy.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.checking import Change, compare_results, measure_reference
from fastattn.machine.execution import Execution, execute
from fastattn.machine.schedule import POLICIES, Schedule
from fastattn.ops.core.backends import INTERPRETED

if INTERPRETED:
    pytest.skip("the kernels are compiled, which the interpreter excludes", allow_module_level=True)

import hopper_calls
from fastattn.kernels.attention.hopper.backward_config import KEYS, QUERIES, RULES
from hopper_calls import Call, on_gpu

LAUNCHED = {"attention_delta_kernel": 1, f"{KEYS}_kernel": 1, f"{QUERIES}_kernel": 1}

STAGES = 2

SHALLOW = {
    kernel: {dims: dataclasses.replace(config, stages=STAGES) for dims, config in rule.items()}
    for kernel, rule in RULES.items()
}
"""Rings that turn soon: the number of buffers is a constant like another."""

ODD, EVEN = 64 * (2 * STAGES + 1) - 3, 64 * (2 * STAGES + 2)
"""Lengths of 2 STAGES + 1 blocks and one more: the ring turns twice, and ends in either phase."""


@contextlib.contextmanager
def executing(folder: Path, configs: dict[str, Any]) -> Iterator[Execution]:
    """The machine, to which tables say that both kernels are the faster ones."""
    with contextlib.ExitStack() as stack:
        for kernel, own in configs.items():
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            stack.enter_context(hopper_calls.measured(folder, own, patch, kernel))
        execution = stack.enter_context(execute("sm_90"))
        stack.enter_context(on_gpu())
        yield execution


@pytest.fixture(scope="module")
def execution(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Execution]:
    with executing(tmp_path_factory.mktemp("tables"), SHALLOW) as running:
        yield running


@pytest.fixture
def schedules(request: pytest.FixtureRequest) -> list[Schedule]:
    """Every schedule that is asked for, or two."""
    seeds: Any = request.config.getoption("--schedules")
    if seeds:
        return [Schedule(policy, seed) for policy in POLICIES for seed in range(seeds)]
    return [Schedule("random"), Schedule("late")]


CAUSAL = {"causal": True}
PACKED = ([0, 20, 20, 220, 230], [0, 40, 90, 290, 290])
"""The second sequence has no queries, the last one no keys, and the others have fewer tiles than
the third."""

CALLS = {
    "window, an odd number of blocks": Call(
        (64, 64), (1, 1), (ODD, ODD), options={"window": (200, 20)}
    ),
    "causal, an even number": Call((128, 128), (1, 1), (EVEN, EVEN), 1, torch.float16, CAUSAL),
    "packed": Call((64, 64), (2, 1), (230, 300), packed=PACKED),
}

MORE = {
    "whole, an odd number": Call((64, 64), (2, 1), (ODD, ODD)),
    "window": Call((64, 64), (1, 1), (200, ODD), options={"window": (70, 20)}),
    "packed and causal": Call((64, 64), (2, 1), (230, 300), options=CAUSAL, packed=PACKED),
    "sinks": Call((64, 64), (2, 1), (150, 200), options={"sinks": torch.tensor([0.5, -1.0])}),
    "key lengths": Call(
        (64, 64), (2, 1), (150, 300), 2, options={"kv_lengths": torch.tensor([0, 200])}
    ),
} | {
    f"{dims[0]}, {dims[1]}, {name}": Call(
        dims, heads, lengths, dtype=dtype, transposed=transposed, options=options
    )
    for dims in ((64, 64), (96, 96), (128, 128), (192, 128))
    for dtype, transposed, heads in (
        (torch.float16, False, (1, 1)),
        (torch.bfloat16, True, (4, 2)),
    )
    for name, lengths, options in (
        (f"{dtype} whole", (EVEN, 70), {}),
        (f"{dtype} causal", (ODD, 350), CAUSAL),
        (f"{dtype} causal, more queries than keys", (400, 100), CAUSAL),
        (f"{dtype} window", (300, ODD), {"causal": True, "window": 100}),
    )
}

SOME = {
    "key lengths",
    "packed and causal",
    "96, 96, torch.bfloat16 window",
    "192, 128, torch.bfloat16 causal",
}
"""Those that are run, in one order, where no schedules are asked for: all take most of an hour."""


def require_right(execution: Execution, call: Call, schedules: list[Schedule]) -> None:
    """Have each kernel run once for each schedule, the gradients right, and nothing reported."""
    leaves = [x.requires_grad_() for x in call.tensors()]
    outputs = tuple(call.attend(*leaves).values())
    incoming = [torch.randn_like(x) for x in outputs]

    def run(change: Change) -> dict[str, torch.Tensor]:
        inputs = [change(x.detach()).requires_grad_() for x in leaves]
        with fastattn.backend("reference"):
            found = tuple(call.attend(*inputs).values())
        gradients = torch.autograd.grad(found, inputs, [change(x) for x in incoming])
        return dict(zip(("dq", "dk", "dv"), gradients, strict=True))

    measured, first = measure_reference(run), None
    for execution.schedule in schedules:
        execution.launches.clear()
        gradients = torch.autograd.grad(outputs, leaves, incoming, retain_graph=True)
        assert execution.launches == LAUNCHED
        found = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        comparisons = compare_results(found, measured)
        assert all(comparison.passed for comparison in comparisons), comparisons
        assert execution.reports == []
        assert execution.notes == []
        # The same bits every time.
        first = first or gradients
        assert all(map(torch.equal, first, gradients))


@pytest.mark.parametrize("name", CALLS)
def test_the_backward(execution: Execution, schedules: list[Schedule], name: str):
    require_right(execution, CALLS[name], schedules)


@pytest.mark.proof
@pytest.mark.parametrize("name", MORE)
def test_every_head(
    execution: Execution, schedules: list[Schedule], name: str, request: pytest.FixtureRequest
):
    if not request.config.getoption("--schedules"):
        if name not in SOME:
            pytest.skip("takes long; --schedules 1 runs it")
        schedules = schedules[-1:]
    require_right(execution, MORE[name], schedules)


def test_some_of_them_are_run():
    assert set(MORE) >= SOME


@pytest.mark.proof
def test_an_element_alone_has_the_bits_that_it_has_in_a_batch(execution: Execution):
    execution.schedule = Schedule()
    leaves = Call((64, 64), (4, 2), (150, 200), 2, options=CAUSAL).tensors()

    def gradients(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own = [x.clone().requires_grad_() for x in tensors]
        o = fastattn.attention(*own, causal=True)
        return torch.autograd.grad(o, own, torch.full_like(o, 0.5) + o.detach())

    together = gradients(*leaves)
    for element in range(2):
        alone = gradients(*(x[element : element + 1] for x in leaves))
        assert all(map(torch.equal, alone, (x[element : element + 1] for x in together)))


OTHERS = {
    "softcap": {"softcap": 5.0},
    "mask": {"mask": torch.ones(20, 30, dtype=torch.bool).tril(20)},
    "dropout": {"dropout_p": 0.5, "dropout_seed": torch.tensor([1])},
    "a negative scale": {"scale": -1.0},
}


@pytest.mark.proof
@pytest.mark.parametrize("name", OTHERS)
def test_what_goes_to_the_kernels_of_all_devices(execution: Execution, name: str):
    call = Call((64, 64), lengths=(20, 30), options=OTHERS[name])
    leaves = [x.requires_grad_() for x in call.tensors()]
    o = call.attend(*leaves)["o"]
    execution.launches.clear()
    torch.autograd.grad(o, leaves, torch.ones_like(o))
    assert not {f"{KEYS}_kernel", f"{QUERIES}_kernel"} & execution.launches.keys()
    assert execution.launches["attention_keys_backward_kernel"] == 1
