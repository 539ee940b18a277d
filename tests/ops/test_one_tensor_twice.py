"""One tensor as several arguments of a compiled op: outputs and gradients are those of eager calls.

Dynamo refuses a Function that gets one tensor twice, and before it did, one of the two gradients
was lost.
"""

import itertools
from typing import Any

import pytest
import torch

import fastattn
from support import (
    DEVICE,
    OPERATIONS,
    WIDEST,
    Operation,
    Sample,
    assert_close,
    outputs_of,
    tensors_of,
    weighted_sum,
)

pytestmark = pytest.mark.kernels


def table(device: Any) -> torch.Tensor:
    """Cosines and sines alike, of 3 tokens and 2 angles."""
    return torch.linspace(-1.0, 1.0, 6, device=device, dtype=WIDEST).view(3, 2)


# Sizes at which arguments can be one tensor that are not alike in the op's own samples.
SQUARE = {
    "attention_weights": Sample("square", q=(1, 2, 3, 4), k=(1, 2, 3, 4), lse=(1, 2, 3)),
    "linear": Sample("square", x=(4, 4), weight=(4, 4), bias=(4,), residual=(4, 4)),
    "linear_cross_entropy": Sample(
        "square", x=(4, 4), weight=(4, 4), target=lambda device: torch.arange(4, device=device)
    ),
    "linear_jsd": Sample(
        "square",
        x=(4, 4),
        weight=(4, 4),
        teacher_x=lambda device: torch.eye(4, device=device),
        teacher_weight=lambda device: torch.eye(4, device=device),
    ),
    "linear_log_prob": Sample(
        "square", x=(4, 4), weight=(4, 4), target=lambda device: torch.arange(4, device=device)
    ),
    "linear_top_k_kl": Sample(
        "square",
        x=(4, 4),
        weight=(4, 4),
        teacher_ids=lambda device: torch.arange(8, device=device).view(4, 2) % 4,
        teacher_log_probs=lambda device: torch.full((4, 2), -1.0, device=device),
    ),
    "matmul": Sample("square", a=(4, 4), b=(4, 4)),
    "apply_rotary_qk": Sample("square", q=(1, 2, 3, 4), k=(1, 2, 3, 4), cos=table, sin=table),
}


def alike_groups(arguments: dict[str, Any]) -> list[tuple[str, ...]]:
    """Names of two or more tensor arguments of one shape and dtype, constant ones too."""
    kinds: dict[Any, list[str]] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            kinds.setdefault((value.shape, value.dtype, value.requires_grad), []).append(name)
    return [
        group
        for names in kinds.values()
        for size in range(2, len(names) + 1)
        for group in itertools.combinations(names, size)
    ]


def samples_with_alike_tensors() -> list[Any]:
    found = []
    for operation in OPERATIONS.values():
        own = [operation.samples[1], operation.samples[0]]
        for sample in [SQUARE[operation.name]] if operation.name in SQUARE else own:
            if alike_groups(sample.make(WIDEST, "cpu")):
                found.append(pytest.param(operation, sample, id=operation.name))
                break
    return found


def shared(arguments: dict[str, Any], group: tuple[str, ...]) -> dict[str, Any]:
    return {**arguments, **dict.fromkeys(group, arguments[group[0]])}


def views(arguments: dict[str, Any], group: tuple[str, ...]) -> dict[str, Any]:
    """The same with tensors of their own, all in the memory of the first."""
    given = shared(arguments, group)
    return {**given, **{name: given[name].view_as(given[name]) for name in group[1:]}}


def every_result(compiled: Any, calls: list[dict[str, Any]], leaves: list[torch.Tensor]) -> Any:
    """The outputs of all calls, and the gradients of their sum."""
    outputs = compiled(calls)
    loss = weighted_sum(outputs)
    return outputs, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("backend", ["triton", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("operation", "sample"), samples_with_alike_tensors())
def test_compiled_calls_with_one_tensor_twice(operation, sample, backend):
    check(operation, sample, backend, "aot_eager")


@pytest.mark.parametrize("name", ["attention_varlen", "gated_linear"])
@pytest.mark.slow
def test_compiled_by_inductor(name):
    operation = OPERATIONS[name]
    check(operation, operation.samples[1], "triton", "inductor", ("given", "shared inside"))


def check(
    operation: Operation,
    sample: Sample,
    backend: Any,
    compiler: str,
    chosen: tuple[str, ...] = (),
) -> None:
    """Some of the cases, or all."""
    arguments = sample.make(WIDEST, str(DEVICE))
    groups = alike_groups(arguments)
    leaves = list(tensors_of(arguments).values())

    def called(calls: list[dict[str, Any]]) -> list[torch.Tensor]:
        return [output for call in calls for output in outputs_of(operation.function, call)]

    def shared_inside(given: list[dict[str, Any]]) -> list[torch.Tensor]:
        # They become one tensor within the graph alone.
        return called([shared(given[0], group) for group in groups])

    def views_inside(given: list[dict[str, Any]]) -> list[torch.Tensor]:
        return called([views(given[0], group) for group in groups])

    calls = [shared(arguments, group) for group in groups]
    cases = {
        "given": (called, calls),
        "given as views": (called, [views(arguments, group) for group in groups]),
        "shared inside": (shared_inside, [arguments]),
        "views inside": (views_inside, [arguments]),
    }
    with fastattn.backend(backend):
        expected, expected_gradients = every_result(called, calls, leaves)
        for case in chosen or cases:
            function, given = cases[case]
            torch.compiler.reset()
            compiled = torch.compile(function, fullgraph=True, backend=compiler)
            found, gradients = every_result(compiled, given, leaves)
            for a, b in zip(found, expected, strict=True):
                assert_close(a, b, f"{case}: an output")
            for name, a, b in zip(
                tensors_of(arguments), gradients, expected_gradients, strict=True
            ):
                assert_close(a, b, f"{case}: d{name}")
