"""Whatever lies in memory as no kernel expects means the same, for every tensor of every op.

Strides and offsets are read as they are or copied, lazy negations are carried out, subclasses
without a behaviour of their own are tensors. A new op is under these tests once it is defined.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from memory_forms import (
    CASES,
    NESTED,
    amid_garbage,
    forms_of,
    plain,
    sample_with,
    tensor_arguments,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn.ops.core.catalog import Operation
from support import (
    DEVICE,
    OPERATIONS,
    WIDEST,
    assert_close,
    gradients_of,
    outputs_of,
    same_bits,
    tensors_of,
    weighted_sum,
)

EVERY_ARGUMENT = [
    pytest.param(
        operation,
        argument,
        id=f"{operation.name}-{argument}",
        marks=[] if argument == tensor_arguments(operation)[0] else [pytest.mark.slow],
    )
    for operation, argument in CASES
]
EVERY_OP = [pytest.param(operation, id=operation.name) for operation in OPERATIONS.values()]
EVERY_SAMPLE = [
    pytest.param(operation, sample, id=f"{operation.name}-{sample.name}")
    for operation in OPERATIONS.values()
    for sample in operation.samples
]
EVERY_SAMPLE_TWICE = [
    pytest.param(
        operation,
        sample,
        dtype,
        id=f"{operation.name}-{sample.name}-{str(dtype)[6:]}",
        marks=[] if sample in operation.samples[:2] and dtype is WIDEST else [pytest.mark.slow],
    )
    for operation in OPERATIONS.values()
    for sample in operation.samples
    for dtype in (WIDEST, torch.bfloat16)
]

BACKENDS = [pytest.param("triton", marks=pytest.mark.kernels), "reference"]


def device_of(backend: str) -> str:
    return str(DEVICE) if backend == "triton" else "cpu"


def results_of(function: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """All outputs and all gradients."""
    outputs = outputs_of(function, arguments)
    wanted = list(tensors_of(arguments).values())
    gradients = torch.autograd.grad(weighted_sum(outputs), wanted) if wanted else ()
    return [*outputs, *gradients]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], backend: str, what: str):
    """Bit for bit by kernels; PyTorch's own products and sums round by their operands' layout."""
    for a, b in zip(found, expected, strict=True):
        # A gradient that is passed on as it came is still negated lazily.
        a = a.resolve_neg()
        if backend == "triton":
            assert same_bits(a, b), what
        else:
            finite = torch.isfinite(b)
            assert torch.equal(torch.isfinite(a), finite), what
            assert_close(a[finite], b[finite], what)


def assert_every_form_gives_the_same(
    usual: torch.Tensor,
    results: Callable[[torch.Tensor], list[torch.Tensor]],
    backend: str,
    what: str,
) -> None:
    expected_of_usual = results(usual)
    for name, tensor in forms_of(usual).items():
        same_numbers = torch.equal(tensor, usual)
        expected = expected_of_usual if same_numbers else results(plain(tensor))
        assert_same(results(tensor), expected, backend, f"{what}: {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operation", "argument"), EVERY_ARGUMENT)
def test_every_form_of_every_tensor_gives_what_a_plain_one_does(operation, argument, backend):
    sample = sample_with(operation, argument)
    device = device_of(backend)

    def results(tensor: torch.Tensor) -> list[torch.Tensor]:
        arguments = sample.make(WIDEST, device)
        arguments[argument] = tensor.detach().requires_grad_(arguments[argument].requires_grad)
        with fastattn.backend(backend):
            return results_of(operation.function, arguments)

    usual = sample.make(WIDEST, device)[argument]
    assert_every_form_gives_the_same(usual, results, backend, argument)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", EVERY_OP)
def test_every_form_of_incoming_gradients_gives_what_a_plain_one_does(operation, backend):
    def results(place: int, gradient: torch.Tensor) -> list[torch.Tensor]:
        arguments = operation.samples[0].make(WIDEST, device_of(backend))
        with fastattn.backend(backend):
            outputs = outputs_of(operation.function, arguments)
        incoming = [torch.cos(output.detach()) for output in outputs]
        incoming[place] = gradient.detach()
        return list(torch.autograd.grad(outputs, list(tensors_of(arguments).values()), incoming))

    arguments = operation.samples[0].make(WIDEST, device_of(backend))
    with fastattn.backend(backend):
        outputs = outputs_of(operation.function, arguments)
    for place, output in enumerate(outputs):
        assert_every_form_gives_the_same(
            torch.cos(output), partial(results, place), backend, f"gradient of output {place}"
        )


@pytest.mark.kernels
@pytest.mark.parametrize(("operation", "sample", "dtype"), EVERY_SAMPLE_TWICE)
def test_what_lies_around_tensors_reaches_nothing(operation, sample, dtype):
    """Lanes beyond a tensor's rows and columns are not read, or are not counted."""
    results = []
    for form in (plain, amid_garbage):
        arguments = {
            name: form(value.detach()).requires_grad_(value.requires_grad)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in sample.make(dtype, str(DEVICE)).items()
        }
        outputs = outputs_of(operation.function, arguments)
        incoming = [form(torch.cos(output.detach())) for output in outputs]
        wanted = list(tensors_of(arguments).values())
        results.append([*outputs, *torch.autograd.grad(outputs, wanted, incoming)])
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("layout", NESTED)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", EVERY_OP)
def test_a_nested_tensor_is_refused_by_name(operation, backend, layout):
    for argument in tensor_arguments(operation):
        arguments = sample_with(operation, argument).make(WIDEST, device_of(backend))
        arguments[argument] = NESTED[layout](arguments[argument])
        with fastattn.backend(backend), pytest.raises(TypeError) as raised:
            operation.function(**arguments)
        message = str(raised.value)
        assert argument.removeprefix("dropout_") in message
        assert "nested" in message.lower()


def assert_shapes(operation: Operation, arguments: dict[str, Any], known: list) -> None:
    """Outputs of the known shapes and dtypes, and gradients of those of their arguments."""
    outputs = outputs_of(operation.function, arguments)
    assert [(output.shape, output.dtype) for output in outputs] == known
    for name, gradient in gradients_of(operation.function, arguments).items():
        assert (gradient.shape, gradient.dtype) == (arguments[name].shape, arguments[name].dtype)


def known_outputs(operation: Operation, sample: Any) -> list:
    with fastattn.backend("reference"):
        outputs = outputs_of(operation.function, sample.make(torch.float16, "cpu"))
    return [(output.shape, output.dtype) for output in outputs]


@pytest.mark.parametrize(("operation", "sample"), EVERY_SAMPLE)
def test_meta_tensors_give_shapes_and_dtypes(operation, sample):
    known = known_outputs(operation, sample)
    assert_shapes(operation, sample.make(torch.float16, "meta"), known)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", EVERY_OP)
def test_fake_tensors_give_shapes_and_dtypes(operation, backend):
    for sample in operation.samples[:2]:
        known = known_outputs(operation, sample)
        # Tables of samples are made of numbers that are not fake.
        with FakeTensorMode(allow_non_fake_inputs=True), fastattn.backend(backend):
            assert_shapes(operation, sample.make(torch.float16, device_of(backend)), known)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", EVERY_OP)
def test_inference_tensors_give_the_same_where_no_gradient_is_wanted(operation, backend):
    sample = operation.samples[0]
    device = device_of(backend)
    with fastattn.backend(backend):
        with torch.no_grad():
            expected = outputs_of(operation.function, sample.make(WIDEST, device))
        with torch.inference_mode():
            made = sample.make(WIDEST, device)
            inside = outputs_of(operation.function, made)
        with torch.no_grad():
            outside = outputs_of(operation.function, made)
    assert all(output.is_inference() for output in inside)
    for a, b, c in zip(inside, outside, expected, strict=True):
        assert same_bits(a, c)
        assert same_bits(b, c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", EVERY_OP)
def test_an_inference_tensor_beside_one_that_wants_a_gradient_is_pytorchs_error(operation, backend):
    # Or is not saved at all, as the addend of a sum.
    sample = operation.samples[0]
    plain_arguments = sample.make(WIDEST, device_of(backend))
    for name, tensor in tensors_of(plain_arguments).items():
        if len(tensors_of(plain_arguments)) == 1:
            continue
        arguments = sample.make(WIDEST, device_of(backend))
        with torch.inference_mode():
            arguments[name] = plain(tensor)
        with fastattn.backend(backend):
            expected = gradients_of(operation.function, plain_arguments)
            gradients = gradients_unless_inference_tensors_are_saved(operation, arguments)
        for other, gradient in gradients.items():
            assert same_bits(gradient, expected[other]), f"{other} beside {name}"


def gradients_unless_inference_tensors_are_saved(
    operation: Operation, arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    try:
        return gradients_of(operation.function, arguments)
    except RuntimeError as error:
        if "Inference tensors cannot be saved for backward" not in str(error):
            raise
    return {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", EVERY_OP)
def test_the_default_device_has_no_say(operation, backend):
    arguments = operation.samples[0].make(WIDEST, device_of(backend))
    with fastattn.backend(backend):
        outputs = outputs_of(operation.function, arguments)
        incoming = [torch.cos(output.detach()) for output in outputs]
        wanted = list(tensors_of(arguments).values())
        expected = [*outputs, *torch.autograd.grad(outputs, wanted, incoming)]
        with torch.device("meta"):
            outputs = outputs_of(operation.function, arguments)
            found = [*outputs, *torch.autograd.grad(outputs, wanted, incoming)]
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


@pytest.mark.kernels
@pytest.mark.slow
@pytest.mark.parametrize("argument", ["q", "bias", "sinks"])
def test_lazily_negated_tensors_compile(argument):
    # What is written out has strides of its own, which a graph must know.
    attention = OPERATIONS["attention"]
    arguments = sample_with(attention, "bias").make(WIDEST, str(DEVICE))
    compiled = torch.compile(attention.function, fullgraph=True, backend="aot_eager")
    expected = outputs_of(attention.function, arguments)
    for name, tensor in forms_of(arguments[argument]).items():
        if tensor.is_neg():
            torch.compiler.reset()
            found = outputs_of(compiled, {**arguments, argument: tensor.requires_grad_()})
            for a, b in zip(found, expected, strict=True):
                assert same_bits(a, b), name
