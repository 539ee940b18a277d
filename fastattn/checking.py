"""The accuracy rule: when an op agrees with its reference, and the comparison that applies it.

Every output and gradient is compared with the reference in float64, on the same numbers. The
yardstick is the error that the reference itself makes when it computes in the tested dtype:

    error <= factor * error of the reference + rounding,  factor = 2 (outputs) or 3 (gradients)

for the root mean square over all elements and for the largest element alike, where `rounding` is
`ROUNDING[dtype]` of the same norm of the float64 result: the last rounding of the result, and in
float64, its own yardstick, the order of sums. Samples are of order one; `NOTHING` is added so that
an exact zero may be compared with rounding.

One error of the reference would be one draw from the rounding errors of one processor: a tensor of
few elements may come out right by luck. The error of the reference is therefore the largest of
several: at the inputs themselves, and at `NEIGHBOURS` neighbours of them, whose every number is
moved by at most `DISTANCE` of itself and rounded to its dtype again. The gradients that a backward
pass begins with count as inputs: some gradients, as a bias's, are sums of nothing else. A neighbour
is the same problem with other rounding errors, and is held against its own float64 result, so that
the move itself counts for nothing. Tensors of many elements, whose errors are many draws already,
get nothing from it that the factor did not allow them before.

A gradient may be exactly zero because terms of order one cancel: attention's of a query that sees
one key, or of a bias that all keys share. A formula that subtracts equal numbers leaves nothing
there, and what it leaves is no yardstick for one that subtracts equal sums. Attention's kernels
take the sum over keys from the output, sum_c do_c o_c, and leave the rounding of that: of its
additions in float32, and of the output where 16 bits do not hold it. With S = sum_c |do_c o_c| that
is up to `ROUNDING[dtype]` S for each score in 16 bits, and 2^-20 S where the output is exact or
float32. Samples have no such gradient; tests/ops/test_attention_rounding.py holds kernels to that.

All of it is about rounding, and holds where a derivative is continuous. At a kink, as of a ReLU
whose input comes rounded from other layers, the side may change, which is no error of a kernel: a
whole model is held to the rule with smooth activations, or in float32.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .ops.core.backends import backend
from .ops.core.catalog import Operation, Sample

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0

NEIGHBOURS = 4
"""Neighbours of the inputs at which the reference's error is measured as well."""

FEW_NEIGHBOURS, MANY_ELEMENTS = 1, 2**17
"""Where there are many elements, luck is small and a neighbour dear: so few serve."""

DISTANCE = 2.0**-6
"""How far a neighbour's numbers are from the inputs', relative: two units of bfloat16 and more."""

ROUNDING = {
    torch.float64: 2.0**-43,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""Half a unit in the last place, relative. In float64 the truth has the same rounding errors as
what is compared with it, which a sample may magnify a thousandfold."""

NOTHING = 2.0**-40
"""What counts as zero, absolutely: gradients that cancel exactly leave rounding errors only."""

Results = Mapping[str, torch.Tensor]
"""Outputs and gradients by name; a gradient's begins with "d"."""


class Change:
    """What is done to the inputs of a computation: moved to a neighbour, widened to float64, both.

    Called with one input after the other, in the same order for each change of one seed, so that
    the same numbers come out narrow and wide.

    Args:
        neighbour: 0 leaves the numbers as they are, any other chooses a neighbour.
        wide: widen floating-point tensors, and dtypes, to float64.
    """

    def __init__(self, neighbour: int = 0, *, wide: bool = False) -> None:
        self.neighbour = neighbour
        self.wide = wide
        self.generator = torch.Generator().manual_seed(neighbour)

    def __call__(self, value: Any) -> Any:
        """The changed input: a new leaf for a floating-point tensor, everything else as it is."""
        if isinstance(value, torch.dtype):
            return torch.float64 if self.wide else value
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        changed = value.detach().clone()
        if self.neighbour:
            step = torch.rand(value.shape, generator=self.generator, dtype=torch.float64)
            factor = 1.0 + DISTANCE * (2.0 * step - 1.0)
            changed = (changed.double() * factor.to(value.device)).to(value.dtype)
        if self.wide:
            changed = changed.double()
        return changed.requires_grad_(value.requires_grad)


def enough_neighbours(elements: int) -> int:
    """How many neighbours to measure at, by the elements of the largest tensor."""
    return NEIGHBOURS if elements < MANY_ELEMENTS else FEW_NEIGHBOURS


@dataclass(frozen=True)
class Measured:
    """What the reference makes of one set of inputs, in the tested dtype and in float64."""

    reference: Results
    truth: Results


def measure_reference(
    run: Callable[[Change], Results], neighbours: int = NEIGHBOURS
) -> list[Measured]:
    """What the yardstick is made of: the reference at the inputs, and at neighbours of them.

    Args:
        run: computes by the reference from the inputs, every one of which it has changed.
        neighbours: how many.
    """
    return [
        Measured(run(Change(neighbour)), run(Change(neighbour, wide=True)))
        for neighbour in range(neighbours + 1)
    ]


@dataclass(frozen=True)
class Comparison:
    """One output or gradient of one sample beside what the rule allows.

    Errors are relative to the float64 result's own norm, the larger of the two norms of the rule
    measured by what it allows. `note` says why an error is infinite.
    """

    name: str
    error: float
    allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the rule holds; NaN never passes."""
        return self.error <= self.allowed


def compare_results(
    actual: Mapping[str, torch.Tensor | None], measured: Sequence[Measured]
) -> list[Comparison]:
    """Apply the rule to outputs and gradients, which are told from each other by their names."""
    return [
        compare_tensors(
            name,
            value,
            [(one.reference.get(name), one.truth[name]) for one in measured],
            GRADIENT_FACTOR if name.startswith("d") else OUTPUT_FACTOR,
        )
        for name, value in actual.items()
    ]


def compare_tensors(
    name: str,
    actual: torch.Tensor | None,
    measured: Sequence[tuple[torch.Tensor | None, torch.Tensor]],
    factor: float,
) -> Comparison:
    """Apply the rule to one tensor.

    Args:
        name: what it is.
        actual: what was computed; None counts as an infinite error.
        measured: pairs of the reference's result in the tested dtype and in float64: the first at
            the inputs that `actual` was computed from, the others at neighbours of them.
        factor: how many times the reference's error is allowed.
    """
    truth = measured[0][1].detach().cpu()
    if actual is None or any(reference is None for reference, _ in measured):
        return Comparison(name, math.inf, 0.0, "there is none")
    if actual.shape != truth.shape:
        return Comparison(name, math.inf, 0.0, "another shape")
    if truth.numel() == 0:
        return Comparison(name, 0.0, 0.0)
    own = actual.detach().cpu().to(torch.float64)
    if not torch.equal(own.isfinite(), truth.isfinite()):
        return Comparison(name, math.inf, 0.0, _overflow(own, measured[0][0], truth))
    # Infinities must be in the same places with the same sign; they have no error.
    finite = truth.isfinite()
    if not torch.equal(own[~finite], truth[~finite]):
        return Comparison(name, math.inf, 0.0, "other infinities")
    errors = [_errors_of_reference(*pair) for pair in measured]
    results = []
    for index, norm in enumerate((_root_mean_square, _largest)):
        scale = norm(truth[finite])
        yardstick = max(error[index] for error in errors)
        allowed = factor * yardstick + ROUNDING[actual.dtype] * scale + NOTHING
        error = norm((own - truth)[finite])
        results.append(Comparison(name, _ratio(error, scale), _ratio(allowed, scale)))
    return max(results, key=lambda result: result.error - result.allowed)


def _overflow(own: torch.Tensor, reference: torch.Tensor | None, truth: torch.Tensor) -> str:
    """Who is not finite where the truth is: where both are not, the sample asks too much."""
    assert reference is not None
    lost, lost_by_reference = (
        bool((truth.isfinite() & ~x.detach().cpu().isfinite()).any()) for x in (own, reference)
    )
    if lost and lost_by_reference:
        return "both overflow, the op and its reference"
    return "it overflows, and its reference does not" if lost else "finite where float64 is not"


def _errors_of_reference(
    reference: torch.Tensor | None, truth: torch.Tensor
) -> tuple[float, float]:
    """Both norms of the reference's error, where the truth is finite."""
    assert reference is not None
    truth = truth.detach().cpu()
    error = (reference.detach().cpu().to(torch.float64) - truth)[truth.isfinite()]
    return _root_mean_square(error), _largest(error)


def _root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _ratio(value: float, scale: float) -> float:
    return value / scale if scale > 0.0 else value


def check_sample(
    operation: Operation,
    sample: Sample,
    dtype: torch.dtype,
    device: str | torch.device,
    backend_name: str = "triton",
    seed: int = 0,
) -> list[Comparison]:
    """Compare every output and every gradient of an op with its reference on one sample."""
    with backend(backend_name):  # type: ignore[arg-type]
        actual = outputs_and_gradients(operation.function, sample, dtype, device, seed)
    elements = max(value.numel() for value in actual.values())

    def run(change: Change) -> Results:
        return outputs_and_gradients(operation.reference, sample, dtype, device, seed, change)

    return compare_results(actual, measure_reference(run, enough_neighbours(elements)))


def outputs_and_gradients(
    function: Any,
    sample: Sample,
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int = 0,
    change: Change | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs ("output 0", ...) and gradients ("dx", ...) of a call on a sample, backward included.

    Args:
        function: the op or its reference.
        sample: the arguments.
        dtype: the tested dtype.
        device: where it runs.
        seed: of the sample's random numbers.
        change: of the arguments; None leaves them as they are.
    """
    arguments = sample.make(dtype, device, seed)
    if change is not None:
        arguments = {name: change(value) for name, value in arguments.items()}
    outputs = function(**arguments)
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    differentiable = [output for output in outputs if output.requires_grad]
    incoming = list(_incoming(differentiable, dtype, change or Change()))
    torch.autograd.backward(differentiable, incoming)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            assert value.grad is not None, f"no gradient reached {name}"
            results["d" + name] = value.grad
    return results


def _incoming(
    outputs: list[torch.Tensor], dtype: torch.dtype, change: Change
) -> Iterator[torch.Tensor]:
    """The same incoming gradients for the same shapes, rounded to the tested dtype and changed."""
    generator = torch.Generator().manual_seed(1)
    for output in outputs:
        gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        yield change(gradient.to(dtype)).to(device=output.device, dtype=output.dtype)
