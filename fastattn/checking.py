"""The accuracy rule: when an op agrees with its reference, and the comparison that applies it.

Every output and gradient is compared with the reference in float64, on the same numbers. The
yardstick is the error that the reference itself makes when it computes in the tested dtype:

    error <= factor * error of the reference + rounding,  factor = 2 (outputs) or 3 (gradients)

for the root mean square over all elements and for the largest element alike, where `rounding` is
`ROUNDING[dtype]` of the same norm of the float64 result. It covers what the yardstick may lack by
luck: the last rounding of the result, and in float64, its own yardstick, the order of sums.
Samples are of order one; `NOTHING` is added so that an exact zero may be compared with rounding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .ops.backends import INTERPRETED, backend
from .ops.catalog import Operation, Sample

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0

ROUNDING = {
    torch.float64: 2.0**-43,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    # Triton's interpreter truncates to bfloat16, which costs one more half unit in the last place.
    torch.bfloat16: 2.0**-8 if not INTERPRETED else 2.0**-7,
}
"""Half a unit in the last place, relative. In float64 the truth has the same rounding errors as
what is compared with it, which a sample may magnify a thousandfold."""

NOTHING = 2.0**-40
"""What counts as zero, absolutely: gradients that cancel exactly leave rounding errors only."""


@dataclass(frozen=True)
class Comparison:
    """One output or gradient of one sample beside what the rule allows.

    Errors are relative to the float64 result's own norm, the larger of the two norms of the rule
    measured by what it allows.
    """

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the rule holds; NaN never passes."""
        return self.error <= self.allowed


def compare_tensors(
    name: str,
    actual: torch.Tensor | None,
    reference: torch.Tensor | None,
    truth: torch.Tensor,
    factor: float,
) -> Comparison:
    """Apply the rule to one tensor.

    Args:
        name: what it is.
        actual: what was computed; None counts as an infinite error.
        reference: the reference's result in the tested dtype.
        truth: the reference's result in float64.
        factor: how many times the reference's error is allowed.
    """
    if actual is None or reference is None or actual.shape != truth.shape:
        return Comparison(name, math.inf, 0.0)
    if truth.numel() == 0:
        return Comparison(name, 0.0, 0.0)
    rounding = ROUNDING[actual.dtype]
    truth = truth.detach().cpu()
    own = actual.detach().cpu().to(torch.float64)
    yardstick = reference.detach().cpu().to(torch.float64)
    if not torch.equal(own.isfinite(), truth.isfinite()):
        return Comparison(name, math.inf, 0.0)
    # Infinities must be in the same places with the same sign; they have no error.
    finite = truth.isfinite()
    if not torch.equal(own[~finite], truth[~finite]):
        return Comparison(name, math.inf, 0.0)
    own, yardstick, truth = own[finite], yardstick[finite], truth[finite]
    results = []
    for norm in (_root_mean_square, _largest):
        scale = norm(truth)
        allowed = factor * norm(yardstick - truth) + rounding * scale + NOTHING
        results.append(Comparison(name, _ratio(norm(own - truth), scale), _ratio(allowed, scale)))
    return max(results, key=lambda result: result.error - result.allowed)


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
) -> list[Comparison]:
    """Compare every output and every gradient of an op with its reference on one sample."""
    with backend(backend_name):  # type: ignore[arg-type]
        actual = outputs_and_gradients(operation.function, sample, dtype, device)
    yardstick = outputs_and_gradients(operation.reference, sample, dtype, device)
    # The truth starts from the rounded numbers that the op was given.
    truth = outputs_and_gradients(operation.reference, sample, dtype, device, wide=True)
    return [
        compare_tensors(
            name,
            value,
            yardstick[name],
            truth[name],
            GRADIENT_FACTOR if name.startswith("d") else OUTPUT_FACTOR,
        )
        for name, value in actual.items()
    ]


def outputs_and_gradients(
    function: Any,
    sample: Sample,
    dtype: torch.dtype,
    device: str | torch.device,
    *,
    wide: bool = False,
) -> dict[str, torch.Tensor]:
    """Outputs ("output 0", ...) and gradients ("dx", ...) of a call on a sample, backward included.

    Args:
        function: the op or its reference.
        sample: the arguments.
        dtype: the tested dtype.
        device: where it runs.
        wide: compute in float64 on the rounded arguments, on the CPU.
    """
    arguments = sample.make(dtype, device)
    if wide:
        arguments = {name: _widened(value) for name, value in arguments.items()}
    outputs = function(**arguments)
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    differentiable = [output for output in outputs if output.requires_grad]
    incoming = list(_incoming(differentiable, dtype))
    torch.autograd.backward(differentiable, incoming)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            assert value.grad is not None, f"no gradient reached {name}"
            results["d" + name] = value.grad
    return results


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    if not isinstance(value, torch.Tensor):
        return value
    wide = value.detach().cpu()
    return wide.double().requires_grad_(value.requires_grad) if wide.is_floating_point() else wide


def _incoming(outputs: list[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The same incoming gradients for the same shapes, rounded to the tested dtype first."""
    generator = torch.Generator().manual_seed(1)
    for output in outputs:
        gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        yield gradient.to(dtype).to(device=output.device, dtype=output.dtype)
