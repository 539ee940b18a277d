"""What holds for every op of the catalogue, shown on its samples by the kernels themselves.

A new op is under these tests once it is defined; its own file tests what is special about it.
"""

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastattn.checking import check_sample
from support import (
    DEVICE,
    OPERATIONS,
    WIDEST,
    Operation,
    Sample,
    Seed,
    alike_pairs,
    assert_close,
    gradients_of,
    layouts,
    outputs_of,
    same_bits,
    small_samples,
    tensors_of,
    weighted_sum,
)

pytestmark = pytest.mark.kernels

EVERY_SAMPLE = [
    pytest.param(
        operation,
        sample,
        dtype,
        id=f"{operation.name}-{sample.name}-{str(dtype)[6:]}",
        marks=[]
        if sample in operation.samples[:2] and dtype in (torch.float32, torch.bfloat16)
        else [pytest.mark.slow],
    )
    for operation in OPERATIONS.values()
    for sample in operation.samples
    for dtype in operation.dtypes
    if dtype is not torch.float64 or WIDEST is torch.float64
]
SMALL = small_samples(5000)
TINY = small_samples(400)
# The first sample of an op is its smallest, the second its most ordinary one.
SMALLEST = [
    pytest.param(operation, operation.samples[0], id=operation.name)
    for operation in OPERATIONS.values()
]
ORDINARY = [
    pytest.param(operation, operation.samples[1], id=operation.name)
    for operation in OPERATIONS.values()
]


def arguments_of(sample: Sample, dtype: torch.dtype = WIDEST) -> dict[str, Any]:
    assert DEVICE is not None
    return sample.make(dtype, DEVICE, Seed.value)


@pytest.mark.parametrize(("operation", "sample", "dtype"), EVERY_SAMPLE)
def test_outputs_and_gradients_obey_the_accuracy_rule(operation, sample, dtype):
    for comparison in check_sample(operation, sample, dtype, str(DEVICE), seed=Seed.value):
        assert comparison.passed, comparison


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_inputs_and_incoming_gradients_are_not_changed(operation, sample):
    arguments = arguments_of(sample)
    before = copy.deepcopy(arguments)
    outputs = outputs_of(operation.function, arguments)
    incoming = [torch.randn_like(output) for output in outputs]
    incoming_before = copy.deepcopy(incoming)
    torch.autograd.backward(outputs, incoming)
    for name, tensor in tensors_of(arguments).items():
        assert same_bits(tensor, before[name]), name
        assert tensor._version == 0, name
    for gradient, kept in zip(incoming, incoming_before, strict=True):
        assert same_bits(gradient, kept)


@pytest.mark.parametrize(("operation", "sample"), SMALL)
def test_results_repeat_bit_for_bit(operation, sample):
    def everything() -> list[torch.Tensor]:
        arguments = arguments_of(sample, torch.float32)
        outputs = outputs_of(operation.function, arguments)
        return [*outputs, *gradients_of(operation.function, arguments).values()]

    for first, second in zip(everything(), everything(), strict=True):
        assert same_bits(first, second)


@pytest.mark.parametrize(("operation", "sample"), SMALL)
def test_each_gradient_is_the_same_when_it_alone_is_wanted(operation, sample):
    every = gradients_of(operation.function, arguments_of(sample))
    for wanted in every:
        arguments = arguments_of(sample)
        for name, tensor in tensors_of(arguments).items():
            tensor.requires_grad_(name == wanted)
        alone = gradients_of(operation.function, arguments)
        assert list(alone) == [wanted]
        assert same_bits(alone[wanted], every[wanted]), wanted


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_each_output_alone_gives_its_gradient(operation, sample):
    # The other outputs then send no gradient at all, not a gradient of zeros.
    for index in range(len(outputs_of(operation.function, arguments_of(sample)))):
        found, expected = (
            torch.autograd.grad(
                weighted_sum([outputs_of(function, arguments)[index]]),
                list(tensors_of(arguments).values()),
                allow_unused=True,
                materialize_grads=True,
            )
            for function in (operation.function, operation.reference)
            for arguments in [arguments_of(sample)]
        )
        for name, a, b in zip(tensors_of(arguments_of(sample)), found, expected, strict=True):
            assert_close(a, b, f"d{name} of output {index}")


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
@pytest.mark.slow
def test_any_layout_of_inputs_gives_the_same(operation, sample):
    plain = arguments_of(sample)
    expected_outputs = outputs_of(operation.function, plain)
    expected = gradients_of(operation.function, plain)
    for name in tensors_of(plain):
        for layout, tensor in layouts(plain[name].detach()):
            changed = arguments_of(sample)
            changed[name] = tensor.requires_grad_()
            for a, b in zip(outputs_of(operation.function, changed), expected_outputs, strict=True):
                assert same_bits(a, b), f"{name}: {layout}"
            for other, gradient in gradients_of(operation.function, changed).items():
                assert same_bits(gradient, expected[other]), f"{name}: {layout}"


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
@pytest.mark.slow
def test_any_layout_of_incoming_gradients_gives_the_same(operation, sample):
    def gradients(incoming: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        arguments = arguments_of(sample)
        outputs = outputs_of(operation.function, arguments)
        return torch.autograd.grad(outputs, list(tensors_of(arguments).values()), incoming)

    shapes = [torch.randn_like(o) for o in outputs_of(operation.function, arguments_of(sample))]
    expected = gradients(shapes)
    for index, gradient in enumerate(shapes):
        for layout, tensor in layouts(gradient):
            found = gradients([*shapes[:index], tensor, *shapes[index + 1 :]])
            for a, b in zip(found, expected, strict=True):
                assert same_bits(a, b), layout
    constant = [torch.ones((), device=DEVICE, dtype=s.dtype).expand_as(s) for s in shapes]
    for a, b in zip(gradients(constant), gradients([c.clone() for c in constant]), strict=True):
        assert same_bits(a, b), "expanded from one number"


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_expanded_inputs_collect_their_gradient(operation, sample):
    # A row that is broadcast over the batch: strides of zero.
    name = next(iter(tensors_of(arguments_of(sample))))

    def run(function: Any) -> torch.Tensor:
        arguments = arguments_of(sample)
        row = arguments[name][:1].detach().clone().requires_grad_()
        arguments[name] = row.expand_as(arguments[name])
        return torch.autograd.grad(weighted_sum(outputs_of(function, arguments)), row)[0]

    assert_close(run(operation.function), run(operation.reference), name)


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_one_tensor_passed_twice(operation, sample):
    for first, second in alike_pairs(arguments_of(sample)):
        results = []
        for function in (operation.function, operation.reference):
            arguments = arguments_of(sample)
            arguments[second] = arguments[first]
            loss = weighted_sum(outputs_of(function, arguments))
            (gradient,) = torch.autograd.grad(loss, arguments[first], create_graph=True)
            # A bias's gradient does not depend on the bias: then there is nothing to go through.
            (again,) = torch.autograd.grad(
                weighted_sum([gradient], seed=2),
                arguments[first],
                allow_unused=True,
                materialize_grads=True,
            )
            results.append((gradient, again))
        (found, found_again), (expected, expected_again) = results
        assert_close(found, expected, f"{first} is {second}")
        assert_close(found_again, expected_again, f"{first} is {second}, second derivative")


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_first_gradients_come_from_the_kernel_also_when_recorded(operation, sample):
    plain = gradients_of(operation.function, arguments_of(sample))
    recorded = gradients_of(operation.function, arguments_of(sample), create_graph=True)
    for name, gradient in plain.items():
        assert same_bits(gradient, recorded[name]), name


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_second_and_third_derivatives_of_inputs_that_depend_on_each_other(operation, sample):
    def derivatives(function: Any) -> list[torch.Tensor]:
        arguments = arguments_of(sample)
        leaf = torch.ones((), dtype=WIDEST, device=DEVICE, requires_grad=True)
        for name, tensor in tensors_of(arguments).items():
            arguments[name] = tensor.detach() * torch.cos(leaf) + torch.sin(leaf) * 0.3
        value = weighted_sum([o.tanh() for o in outputs_of(function, arguments)])
        found = []
        for _ in range(3):
            (value,) = torch.autograd.grad(value, leaf, create_graph=True)
            found.append(value)
        return found

    names = ("first", "second", "third")
    for name, a, b in zip(
        names, derivatives(operation.function), derivatives(operation.reference), strict=True
    ):
        # Sums over all elements: compared at their own magnitude.
        assert abs(a.item() - b.item()) <= (1e-9 if WIDEST is torch.float64 else 1e-3) * (
            1 + abs(b.item())
        ), name


@pytest.mark.skipif(WIDEST is not torch.float64, reason="compiled kernels have no float64")
@pytest.mark.parametrize(("operation", "sample"), SMALL)
def test_gradcheck_fast(operation, sample):
    arguments = arguments_of(sample)
    torch.autograd.gradcheck(*as_positional(operation, arguments), fast_mode=True)


@pytest.mark.skipif(WIDEST is not torch.float64, reason="compiled kernels have no float64")
@pytest.mark.parametrize(("operation", "sample"), TINY)
@pytest.mark.slow
def test_gradgradcheck_fast(operation, sample):
    arguments = arguments_of(sample)
    torch.autograd.gradgradcheck(*as_positional(operation, arguments), fast_mode=True)


@pytest.mark.skipif(WIDEST is not torch.float64, reason="compiled kernels have no float64")
@pytest.mark.parametrize(("operation", "sample"), SMALLEST)
@pytest.mark.slow
def test_gradcheck_full_on_the_smallest(operation, sample):
    torch.autograd.gradcheck(*as_positional(operation, arguments_of(sample)))


def as_positional(operation: Operation, arguments: dict[str, Any]) -> tuple[Any, tuple]:
    """The call as a function of its tensors alone, which gradcheck wants."""
    tensors = tensors_of(arguments)

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = {**arguments, **dict(zip(tensors, values, strict=True))}
        # Where an output is infinite, as the lse of a query without keys, numerical derivatives
        # are NaN and the others must be 0.
        return tuple(
            torch.where(output.isinf(), 0.0, output)
            for output in outputs_of(operation.function, given)
        )

    return function, tuple(tensors.values())


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
@pytest.mark.slow
def test_compiles_without_graph_breaks(operation, sample, compiler):
    torch.compiler.reset()
    compiled = torch.compile(operation.function, fullgraph=True, backend=compiler)
    arguments = arguments_of(sample, torch.float32)

    def assert_same(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
        if operation.own_gradients:
            assert same_bits(found, expected), name
        else:
            torch.testing.assert_close(found, expected, msg=name)

    for a, b in zip(
        outputs_of(compiled, arguments), outputs_of(operation.function, arguments), strict=True
    ):
        assert_same(a, b, "output")
    expected = gradients_of(operation.function, arguments)
    for name, gradient in gradients_of(compiled, arguments).items():
        assert_same(gradient, expected[name], name)


class RecordedCalls(TorchDispatchMode):
    """Collects every call of a registered op of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastattn":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("operation", "sample"), SMALLEST)
def test_registered_ops_pass_opcheck(operation, sample):
    arguments = arguments_of(sample, torch.float32)
    with RecordedCalls() as recorded:
        gradients_of(operation.function, arguments)
    assert recorded.calls
    for op, args in recorded.calls:
        detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        # Autograd is the Function's business, not that of the op inside it.
        torch.library.opcheck(op, detached, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_functorch_grad(operation, sample):
    arguments = arguments_of(sample)
    tensors = tensors_of(arguments)

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return weighted_sum(outputs_of(operation.function, {**arguments, **values}))

    found = torch.func.grad(loss)({name: t.detach() for name, t in tensors.items()})
    for name, gradient in gradients_of(operation.function, arguments).items():
        assert same_bits(found[name], gradient), name


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_vmap_refuses_clearly(operation, sample):
    arguments = arguments_of(sample)
    tensors = {name: t.detach()[None] for name, t in tensors_of(arguments).items()}
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda values: operation.function(**{**arguments, **values}))(tensors)


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_forward_mode_refuses_clearly(operation, sample):
    arguments = arguments_of(sample)
    name, tensor = next(iter(tensors_of(arguments).items()))
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, torch.autograd.forward_ad.dual_level():
            tangent = torch.ones_like(tensor)
            arguments[name] = torch.autograd.forward_ad.make_dual(tensor.detach(), tangent)
            with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
                operation.function(**arguments)


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_checkpoint_gives_the_same_gradients(operation, sample):
    expected = gradients_of(operation.function, arguments_of(sample))

    def recomputed(**arguments: Any) -> Any:
        return checkpoint(operation.function, use_reentrant=False, **arguments)

    for name, gradient in gradients_of(recomputed, arguments_of(sample)).items():
        assert same_bits(gradient, expected[name]), name


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_autocast_gives_a_supported_dtype_and_right_numbers(operation, sample):
    arguments = arguments_of(sample, torch.float32)
    plain = outputs_of(operation.function, arguments)
    with torch.autocast(str(DEVICE), dtype=torch.bfloat16):
        cast = outputs_of(operation.function, arguments)
    for a, b in zip(cast, plain, strict=True):
        assert a.dtype in (torch.float32, torch.bfloat16)
        assert (a.float() - b).abs().max() <= 2.0**-7 * b.abs().max()


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_no_gradient_is_recorded_under_no_grad(operation, sample):
    with torch.no_grad():
        outputs = outputs_of(operation.function, arguments_of(sample))
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize(("operation", "sample"), ORDINARY)
def test_backends_can_be_forced(operation, sample):
    import fastattn

    arguments = arguments_of(sample)
    with RecordedCalls() as recorded, fastattn.backend("reference"):
        outputs = outputs_of(operation.function, arguments)
    assert not recorded.calls
    for a, b in zip(outputs, outputs_of(operation.reference, arguments), strict=True):
        assert same_bits(a, b)
