"""Compile what the public ops launch, and measure the machine code of every kernel."""

from __future__ import annotations

import dataclasses
import importlib
import re
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.machine.driver import TARGETS, Kernel, Recorder, Target, stub_driver
from fastattn.ops.core.backends import assume_gpu, backend
from fastattn.ops.core.catalog import Normal, Sample

from ..op import Op, Shape
from .cost.hardware import HARDWARE
from .cost.predict import Cost, predict_all
from .machine_code import MachineCode, inspect_all


@dataclass(frozen=True)
class Task:
    """One op on one target in one dtype, at several shapes: what one process compiles.

    With `cost` the speed of each kernel is predicted, where the target is one that the model knows.
    """

    cases: str
    op: str
    target: str
    dtype: str
    shapes: tuple[Shape, ...]
    cost: bool = False


@dataclass(frozen=True)
class Row:
    """One kernel of one case.

    Attributes:
        phase: "forward" or "backward".
        dots: How many products the kernel's source asks for.
        tensor_core_dots: How many of them are in a dtype that tensor cores take.
        cost: What is predicted of its speed, if that was asked for.
    """

    op: str
    phase: str
    kernel: str
    shape: Shape
    dtype: str
    target: str
    num_warps: int
    shared_memory: int
    shared_memory_limit: int
    dots: int
    tensor_core_dots: int
    code: MachineCode
    cost: Cost | None = None


@dataclass(frozen=True)
class Failure:
    """A case that could not be compiled, or that launched nothing."""

    op: str
    phase: str
    shape: Shape
    dtype: str
    target: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What came of a task."""

    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]


def load_ops(cases: str) -> dict[str, Op]:
    """Return the ops that a module of cases lists, by name."""
    return {op.name: op for op in importlib.import_module(cases).OPS}


def run(task: Task) -> Outcome:
    """Compile a task's cases. A process may run tasks of one target only."""
    torch.set_num_threads(1)
    op = load_ops(task.cases)[task.op]
    target = TARGETS[task.target]
    recorder = Recorder()
    seen: list[tuple[Kernel, str, Shape]] = []
    failures: list[Failure] = []

    with stub_driver(target, recorder), assume_gpu(), backend("triton"):
        for shape in task.shapes:
            phase = "forward"
            try:
                arguments = _uninitialized(op.sample(shape), getattr(torch, task.dtype))
                outputs = op.call(**arguments)
                forward = recorder.take()
                seen += [(kernel, phase, shape) for kernel in forward]
                phase = "backward"
                _backward(outputs, arguments.values())
                backward = recorder.take()
                seen += [(kernel, phase, shape) for kernel in backward]
                if not forward or (op.own_gradients and not backward):
                    raise RuntimeError("no kernel was launched")
            except Exception as error:
                # A kernel refused for its shared memory is measured all the same.
                seen += [(kernel, phase, shape) for kernel in recorder.take()]
                reason = "".join(traceback.format_exception_only(error)).strip()
                failures.append(Failure(op.name, phase, shape, task.dtype, target.name, reason))
    kernels = {kernel.metadata["hash"]: kernel for kernel, _, _ in seen}
    compiled = list(kernels.values())
    codes = dict(zip(kernels, inspect_all(compiled), strict=True))
    costs: dict[str, Cost] = {}
    if task.cost and task.target in HARDWARE:
        found = predict_all(compiled, list(codes.values()), HARDWARE[task.target])
        costs = dict(zip(kernels, found, strict=True))
    rows = [
        dataclasses.replace(
            _row(task, target, kernel, phase, shape, codes[kernel.metadata["hash"]]),
            cost=costs.get(kernel.metadata["hash"]),
        )
        for kernel, phase, shape in seen
    ]
    return Outcome(tuple(rows), tuple(failures))


def _uninitialized(sample: Sample, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with tensors that nobody fills, so that even the largest take no memory."""
    made = {}
    for name, value in sample.arguments.items():
        if isinstance(value, Normal):
            made[name] = torch.empty(value.shape, dtype=value.dtype or dtype, requires_grad=True)
        else:
            made[name] = value("cpu") if callable(value) else value
    return made


def _backward(outputs: Any, arguments: Iterable[Any]) -> None:
    inputs = [
        value for value in arguments if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [output for output in outputs if output.requires_grad]
    gradients = [torch.empty_like(output) for output in outputs]
    torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)


def _row(
    task: Task, target: Target, kernel: Kernel, phase: str, shape: Shape, code: MachineCode
) -> Row:
    dots = re.findall(r"= tt\.dot(?:_scaled)? .*", kernel.files["ttir"].read_text())
    # Products of float32 and float64 operands in full precision run on the ordinary units.
    plain = [
        dot for dot in dots if re.search(r"xf(32|64)> \*", dot) and not re.search("tf32|bf16x", dot)
    ]
    return Row(
        op=task.op,
        phase=phase,
        kernel=kernel.name,
        shape=shape,
        dtype=task.dtype,
        target=target.name,
        num_warps=kernel.metadata["num_warps"],
        shared_memory=kernel.metadata["shared"],
        shared_memory_limit=target.shared_memory,
        dots=len(dots),
        tensor_core_dots=len(dots) - len(plain),
        code=code,
    )
