"""The counted bytes are those that the kernels load and store, as the interpreter sees them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy
import pytest
import torch

import fastattn
from bench.inputs import incoming_like, outputs_of, random_arguments, seeded, tensors_of
from bench.op import BACKWARD, FORWARD, Op, shape_name
from bench.registry import OPS
from fastattn.kernels.config import INTERPRETER
from fastattn.ops.core.backends import INTERPRETED

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETED, reason="only the interpreter shows every load and store"),
]

CPU = torch.device("cpu")

# Several rows a tile and more tiles than programs; a wide backward; a wide forward too.
SHAPES = [(50, 96), (5, 9000), (2, 20000)]
# Several tiles of a product; one tile of a sum long enough to be split.
PRODUCT_SHAPES = [(24, 40, 48), (16, 300, 20)]
# Several blocks of queries and keys, with heads that share keys; short ones of unequal dimensions.
ATTENTION_SHAPES = [(1, 2, 1, 172, 32, 32), (2, 4, 2, 40, 24, 16)]

MEASURED = [op for op in OPS if op.benchmark]


def shapes_of(op: Op) -> list[tuple[int, ...]]:
    """Shapes of as many numbers as the op's: rows and columns, a product's three, attention's.

    Of others, as models, those of a small one will do.
    """
    of_length = {2: SHAPES, 3: PRODUCT_SHAPES, 6: ATTENTION_SHAPES}
    return of_length.get(len(op.small), [op.small])


def tensors_in(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among the arguments of a kernel, and within its tuples."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors_in(argument)


class CountedBytes:
    """The bytes of all loads and stores of the launches since `take` was last called.

    A tensor of one number a row or a column counts once a launch: see `bench.op.Traffic`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        self._one_number_each = max(shape)
        self._accesses: Counter[tuple[str, int]] = Counter()
        self._tensors: list[torch.Tensor] = []
        self._total = 0
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        launch = GridExecutor.__call__

        def counted_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._count("load", ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def counted_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._count("store", ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        def counted_launch(kernel: Any, *given: Any, **named: Any) -> None:
            self._tensors = list(tensors_in([*given, *named.values()]))
            self._accesses.clear()
            launch(kernel, *given, **named)
            self._add_launch()

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        monkeypatch.setattr(GridExecutor, "__call__", counted_launch)

    def take(self) -> int:
        total, self._total = self._total, 0
        return total

    def _count(self, kind: str, ptrs: Any, mask: Any) -> None:
        addresses = ptrs.data[numpy.broadcast_to(mask.data, ptrs.data.shape)]
        if addresses.size:
            self._accesses[kind, self._tensor_at(int(addresses.flat[0]))] += addresses.size

    def _tensor_at(self, address: int) -> int:
        for index, tensor in enumerate(self._tensors):
            if 0 <= address - tensor.data_ptr() < tensor.nbytes:
                return index
        raise AssertionError(f"an access outside of all tensors, at {address:#x}")

    def _add_launch(self) -> None:
        for (_, index), elements in self._accesses.items():
            tensor = self._tensors[index]
            if tensor.numel() <= self._one_number_each:
                elements = min(elements, tensor.numel())
            self._total += elements * tensor.element_size()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        pytest.param(op, shape, id=f"{op.name}-{shape_name(shape)}")
        for op in MEASURED
        if op.timing.by_kernels
        for shape in shapes_of(op)
    ],
)
def test_counted_bytes_are_those_of_the_kernels(monkeypatch, op, shape):
    counted = CountedBytes(monkeypatch, shape)
    arguments = seeded(op, random_arguments(op, shape, torch.bfloat16, CPU))
    traffic = op.timing.traffic(shape, torch.bfloat16, INTERPRETER)
    outputs = outputs_of(op.call, arguments)
    assert counted.take() == traffic[FORWARD].moved
    torch.autograd.grad(outputs, tensors_of(arguments), incoming_like(outputs))
    assert counted.take() == traffic[BACKWARD].moved


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in MEASURED])
def test_the_least_is_the_size_of_inputs_and_outputs(op):
    shape = shapes_of(op)[0]
    arguments = seeded(op, random_arguments(op, shape, torch.bfloat16, CPU))
    # Outputs are of one size on all backends.
    with fastattn.backend("reference"):
        outputs = outputs_of(op.call, arguments)
    given = sum(v.nbytes for v in arguments.values() if isinstance(v, torch.Tensor))
    traffic = op.timing.traffic(shape, torch.bfloat16, INTERPRETER)
    assert traffic[FORWARD].least == given + sum(output.nbytes for output in outputs)
