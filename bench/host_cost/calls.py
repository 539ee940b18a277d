"""What is timed: calls whose kernels are not launched, alone and with their backward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastattn.machine.driver import TARGETS, stub_driver
from fastattn.ops.core.backends import assume_gpu, backend

from ..inputs import has_gradient
from ..op import Op

CALLS = 8
"""How many calls one backward pass goes over."""


@dataclass(frozen=True)
class Timed:
    """What is timed, and how many calls of the op are in it."""

    run: Callable[[], Any]
    calls: int = 1


@triton.jit
def nothing_kernel(x_ptr, y_ptr, rows, BLOCK: tl.constexpr):
    pass


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *dy: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(dy[0])


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Run Triton's kernels on CPU tensors, without their launch."""
    with stub_driver(TARGETS["sm_90"]), assume_gpu(), backend("triton"):
        yield


def modes(call: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Timed]:
    """The ways in which a call is timed."""

    def forward() -> Any:
        return call(**arguments)

    def no_grad() -> Any:
        with torch.no_grad():
            return call(**arguments)

    return {
        "no_grad": Timed(no_grad),
        "forward": Timed(forward),
        "forward+backward": Timed(with_backward(call, arguments), CALLS),
    }


def with_backward(call: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[], Any]:
    """Several calls, one after another, and one backward pass through all of them."""
    own = [{name: _own(value) for name, value in arguments.items()} for _ in range(CALLS)]
    calls = [functools.partial(call, **given) for given in own]
    outputs = _outputs(calls[0]())
    fed = _fed(outputs, arguments)
    gradients = [torch.empty_like(output) for output in outputs] * (1 if fed else CALLS)
    leaves = [
        value
        for place, given in enumerate(own)
        for name, value in given.items()
        if has_gradient(value) and not (place and name in fed)
    ]

    def chained() -> Any:
        outputs = _outputs(calls[0]())
        for following in calls[1:]:
            outputs = _outputs(following(**dict(zip(fed, outputs, strict=False))))
        return torch.autograd.grad(outputs, leaves, gradients)

    def side_by_side() -> Any:
        outputs = [output for call in calls for output in _outputs(call())]
        return torch.autograd.grad(outputs, leaves, gradients)

    return chained if fed else side_by_side


def _own(value: Any) -> Any:
    return value.detach().clone().requires_grad_() if has_gradient(value) else value


def _fed(outputs: Sequence[torch.Tensor], arguments: dict[str, Any]) -> list[str]:
    """The arguments, from the first that wants a gradient on, whose place the outputs can take."""
    fed = []
    wanting = [(name, value) for name, value in arguments.items() if has_gradient(value)]
    for output, (name, value) in zip(outputs, wanting, strict=False):
        if output.shape != value.shape or output.dtype is not value.dtype:
            break
        fed.append(name)
    return fed


def _outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def contenders(op: Op) -> dict[tuple[str, str], Timed]:
    """Everything that is timed for an op, by (who, mode), beside what tells the machine's speed."""
    dtype = torch.float32 if torch.float32 in op.dtypes else op.dtypes[0]
    arguments = op.sample(op.small).make(dtype, "cpu")
    found = {("fastattn", mode): call for mode, call in modes(op.call, arguments).items()}
    if op.torch is not None:
        found |= {("torch", mode): call for mode, call in modes(op.torch, arguments).items()}
    return found | {RMS_NORM: references()[RMS_NORM]}


RMS_NORM = ("F.rms_norm", "forward")
"""Timed in turns with each op, for a shared machine is fast now and slow then."""


def references() -> dict[tuple[str, str], Timed]:
    """What tells how fast this machine is, and what the pieces that no op can do without cost."""
    x, weight = torch.randn(8, 256, requires_grad=True), torch.randn(256, requires_grad=True)
    block: Any = 16

    def nothing(x: torch.Tensor) -> torch.Tensor:
        return Nothing.apply(x)

    return {
        RMS_NORM: Timed(lambda: F.rms_norm(x, (256,), weight)),
        ("an autograd.Function", "forward"): Timed(lambda: nothing(x)),
        ("an autograd.Function", "forward+backward"): Timed(
            with_backward(nothing, {"x": x}), CALLS
        ),
        ("a Triton launch", "forward"): Timed(
            lambda: nothing_kernel[(1,)](x_ptr=x, y_ptr=weight, rows=8, BLOCK=block)
        ),
        ("torch.empty_like", "forward"): Timed(lambda: torch.empty_like(x)),
    }
