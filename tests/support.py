"""What tests of ops share. `DEVICE` is where kernels run in this process."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastattn.ops.core.backends import INTERPRETED, device_obstacle
from fastattn.ops.core.catalog import OPERATIONS, Operation, Sample


def _device() -> str | None:
    if INTERPRETED:
        return "cpu"
    if torch.cuda.is_available() and device_obstacle("cuda", 0) is None:
        return "cuda"
    return None


DEVICE = _device()
"""The device of tensors that kernels take: "cuda", "cpu" in the interpreter, or None."""


class Seed:
    """The seed that tests begin from: 0, or another by `--seed`."""

    value = 0


# Compiled kernels have no float64; there the properties are shown in float32.
WIDEST = torch.float64 if INTERPRETED else torch.float32


@contextlib.contextmanager
def count_launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched meanwhile, in their order: none on the reference.

    Triton tells of every launch, where it compiles as where it interprets.
    """
    names: list[str] = []
    if not INTERPRETED:
        if DEVICE is None:
            yield names
            return
        from triton.knobs import runtime

        def hook(metadata: Any) -> None:
            names.append(metadata.get()["name"])

        runtime.launch_enter_hook.add(hook)
        try:
            yield names
        finally:
            runtime.launch_enter_hook.remove(hook)
        return
    from triton.runtime.interpreter import GridExecutor

    executors: Any = GridExecutor
    launch = executors.__call__

    def counted(executor: Any, *args: Any, **options: Any) -> Any:
        names.append(executor.fn.__name__)
        return launch(executor, *args, **options)

    executors.__call__ = counted
    try:
        yield names
    finally:
        executors.__call__ = launch


def small_samples(limit: int) -> list[Any]:
    """(op, sample) parameters of all samples whose tensors have at most `limit` elements in all."""
    import pytest

    return [
        pytest.param(
            operation,
            sample,
            id=f"{operation.name}-{sample.name}",
            marks=[] if sample in operation.samples[:1] else [pytest.mark.slow],
        )
        for operation in OPERATIONS.values()
        for sample in operation.samples
        if 0 < size_of(sample) <= limit
    ]


def size_of(sample: Sample) -> int:
    """The elements of a sample's largest tensor."""
    return max(tensor.numel() for tensor in tensors_of(sample.make(torch.float32, "cpu")).values())


def tensors_of(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The arguments that gradients go to."""
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.requires_grad
    }


def outputs_of(function: Callable, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """The outputs of a call as a list."""
    outputs = function(**arguments)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def weighted_sum(outputs: list[torch.Tensor], seed: int = 1) -> torch.Tensor:
    """A scalar that depends on every output element with a weight of its own."""
    generator = torch.Generator().manual_seed(seed)
    total: Any = 0.0
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total + (output * weight.to(output)).sum()
    return total


def gradients_of(
    function: Callable, arguments: dict[str, Any], **options: Any
) -> dict[str, torch.Tensor]:
    """Gradients of `weighted_sum` of a call with respect to its tensors."""
    tensors = tensors_of(arguments)
    loss = weighted_sum(outputs_of(function, arguments))
    found = torch.autograd.grad(loss, list(tensors.values()), **options)
    return dict(zip(tensors, found, strict=True))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality bit for bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # A scalar has no last dimension to view as bytes.
    a, b = (x.detach().reshape(-1).contiguous().view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Agreement of two computations in `WIDEST`, relative to the largest element expected."""
    tolerance = 1e-11 if WIDEST is torch.float64 else 2e-5
    assert actual.dtype == expected.dtype, what
    scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    error = (actual - expected).abs().max().item() / scale if expected.numel() else 0.0
    assert error <= tolerance, f"{what}: error {error:.1e}"


def layouts(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The same numbers in other memory layouts: sliced, transposed, reversed in stride order."""
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
    wide[..., 1:-2] = tensor
    yield "slice of wider rows", wide[..., 1:-2]
    spread = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    spread[..., ::2] = tensor
    yield "last stride 2", spread[..., ::2]
    if tensor.dim() >= 2:
        yield "transposed", tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if tensor.dim() >= 3:
        yield "batch inside", tensor.transpose(0, 1).contiguous().transpose(0, 1)


def alike_pairs(arguments: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of tensor arguments of one shape and dtype, which could be the same tensor."""
    return [
        (a, b)
        for (a, x), (b, y) in itertools.combinations(tensors_of(arguments).items(), 2)
        if x.shape == y.shape and x.dtype == y.dtype
    ]


__all__ = [
    "DEVICE",
    "OPERATIONS",
    "WIDEST",
    "Operation",
    "Sample",
    "Seed",
    "alike_pairs",
    "assert_close",
    "count_launches",
    "gradients_of",
    "layouts",
    "outputs_of",
    "same_bits",
    "size_of",
    "small_samples",
    "tensors_of",
    "weighted_sum",
]
