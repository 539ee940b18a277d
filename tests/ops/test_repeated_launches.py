"""A call after others computes what it computes alone: no launch is reused where it does not fit.

Launches are remembered by what Triton would look at (see kernels/launch.py). Each op is called with
tensors elsewhere in memory, other shapes, dtypes, numbers and absent tensors in between. Executed
with `--compiled sm_90`, where arguments that a kernel was not compiled for are an error.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from memory_forms import FORMS, Placed, apart, tensor_arguments

import fastattn
from fastattn.checking import compare_results, measure_reference, outputs_and_gradients
from fastattn.ops.core.backends import INTERPRETED
from fastattn.ops.core.catalog import Operation, Sample
from support import DEVICE, OPERATIONS, same_bits

Call = tuple[str, Sample, torch.dtype]

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter remembers no launches"),
]

NUMBERS: dict[str, tuple[float, ...]] = {
    "p": (0.25, 0, 0.0),
    "dropout_p": (0.25, 0, 0.0),
    "label_smoothing": (0.25, 1, 1.0),
}
"""Numbers for arguments that take a range of them; for the others those of `ANY`."""

ANY = (2, 2.0, 1, 1.0, 0.75)
"""Integers equal to floats, for which Triton compiles something else."""


def calls_of(operation: Operation) -> Iterator[Call]:
    """An ordinary call and others in between, so that each comes after one that it is unlike."""
    usual = operation.samples[1]
    for dtype in (torch.float32, torch.bfloat16):
        yield "usual", usual, dtype
    for name, form in (("apart", apart), ("reversed", FORMS["reversed order"])):
        yield f"all tensors {name}", Placed(usual, form), torch.float32
    for argument in tensor_arguments(operation):
        if argument in usual.arguments:
            for name in ("at an offset", "slice of wider rows"):
                moved = Placed(usual, {argument: FORMS[name]})
                yield f"{argument} {name}", moved, torch.float32
    parameters = inspect.signature(operation.function).parameters
    for name, parameter in parameters.items():
        if re.search(r"\bfloat\b", str(parameter.annotation)):
            for number in NUMBERS.get(name, ANY):
                arguments = {**usual.arguments, name: number}
                if name == "dropout_p" and number and "dropout_seed" in parameters:
                    arguments["dropout_seed"] = lambda device: torch.tensor([5], device=device)
                elif name == "dropout_p" and number:
                    arguments["seed"] = lambda device: torch.tensor([5], device=device)
                yield f"{name}={number}", Sample("number", **arguments), torch.float32
    yield "usual", usual, torch.float16
    for sample in (operation.samples[0], *operation.samples[2:]):
        if sum(x.numel() for x in sample.make(torch.float32, "cpu").values() if _is(x)) < 4000:
            yield sample.name, sample, torch.float32


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_call_after_others_is_what_it_is_alone(operation: Operation):
    def run(sample: Sample, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        with fastattn.backend("triton"):
            return outputs_and_gradients(operation.function, sample, dtype, str(DEVICE))

    usual = run(operation.samples[1], torch.float32)
    for what, sample, dtype in calls_of(operation):
        found = run(sample, dtype)
        measured = measure_reference(
            lambda change, sample=sample, dtype=dtype: outputs_and_gradients(
                operation.reference, sample, dtype, str(DEVICE), change=change
            )
        )
        failed = [one for one in compare_results(found, measured) if not one.passed]
        assert not failed, (what, failed)
        # Now every launch is remembered, and must be one of this very call's.
        for name, again in run(sample, dtype).items():
            assert same_bits(again, found[name]), (what, name)
        for name, again in run(operation.samples[1], torch.float32).items():
            assert same_bits(again, usual[name]), (f"after {what}", name)
