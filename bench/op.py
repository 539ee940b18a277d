"""What is said once about an op so that every tool here can measure it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn.ops.core.backends import backend
from fastattn.ops.core.catalog import OPERATIONS, Sample

Shape = tuple[int, ...]

FORWARD, BACKWARD, BOTH = DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True)
class Traffic:
    """Bytes of one direction of a call.

    Attributes:
        least: Each input read once and each output written once: no way of computing it needs less.
        moved: What the kernels ask of memory by design: also saved statistics, partial sums, and
            second reads, which a cache may answer. A tensor of one number a row or a column counts
            once a launch, because programs find it in the cache.
    """

    least: int
    moved: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.least + other.least, self.moved + other.moved)


@dataclass(frozen=True, eq=False)
class Benchmark:
    """How an op is timed.

    Attributes:
        sizes: The shapes on a GPU, the most telling first, each with tensors far larger than L2.
        small_sizes: The shapes on a CPU.
        traffic: (shape, dtype, target) -> the bytes forward and backward, counted and not measured;
            tests/bench/test_traffic.py holds them against what kernels load and store in the
            interpreter.
        rivals: Functions that import a third-party package and return its op, called with the
            arguments of ours, by name. They raise ImportError where it is not installed.
        without_gradients: the names of rivals that have no backward.
        flops: Floating-point operations forward and backward at a shape; 0 where they never count.
        tokens: The tokens of a call at a shape, for what is told in tokens a second; 0 elsewhere.
        goal: (direction, shape) -> the share of the ceiling that the op is meant to reach on a GPU.
        random: Whether the op draws random numbers, which others cannot reproduce; it then takes a
            `seed`.
        by_kernels: Whether kernels alone move the bytes, which a test then counts; products by
            PyTorch and sums between launches are only counted by design.
        in_float64: Whether the reference fits into memory at a shape, in float64 too, so that
            errors can be told.
    """

    sizes: Sequence[Shape]
    small_sizes: Sequence[Shape]
    traffic: Callable[[Shape, torch.dtype, Any], Mapping[str, Traffic]]
    rivals: Mapping[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    without_gradients: frozenset[str] = frozenset()
    flops: Callable[[Shape], Mapping[str, float]] = lambda shape: {FORWARD: 0.0, BACKWARD: 0.0}
    tokens: Callable[[Shape], int] = lambda shape: 0
    goal: Callable[[str, Shape], float | None] = lambda direction, shape: None
    random: bool = False
    by_kernels: bool = True
    in_float64: Callable[[Shape], bool] = lambda shape: True


@dataclass(frozen=True, eq=False)
class Op:
    """One public op.

    Attributes:
        name: The op's name, unique in the list.
        call: The public function; everything that it returns with a gradient is differentiated.
        arguments: Its keyword arguments at a shape, as `Sample` takes them: a tuple stands for a
            tensor of that shape which needs a gradient.
        shapes: The shapes to compile at.
        quick_shapes: Those of them that the tests compile.
        small: A shape so small that the host's cost is all there is.
        dtypes: The dtypes to compile at, and to time at, the most telling first.
        torch: The same in PyTorch, called with the same arguments.
        benchmark: How it is timed; None for what is only compiled.
    """

    name: str
    call: Callable[..., Any]
    arguments: Callable[..., dict[str, Any]]
    shapes: Sequence[Shape]
    quick_shapes: Sequence[Shape]
    small: Shape
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
    torch: Callable[..., Any] | None = None
    benchmark: Benchmark | None = None

    @property
    def timing(self) -> Benchmark:
        """How it is timed, for ops that are."""
        if self.benchmark is None:
            raise ValueError(f"{self.name} has no benchmark")
        return self.benchmark

    def sample(self, shape: Shape) -> Sample:
        """The arguments at a shape."""
        return Sample(shape_name(shape), **self.arguments(*shape))

    @property
    def reference(self) -> Callable[..., Any]:
        """The function in plain PyTorch that defines the op."""
        name = self.call.__name__
        return OPERATIONS[name].reference if name in OPERATIONS else self._by_reference

    @property
    def own_gradients(self) -> bool:
        """Whether kernels compute the gradients; those of what is for inspection are PyTorch's."""
        name = self.call.__name__
        return name not in OPERATIONS or OPERATIONS[name].own_gradients

    def _by_reference(self, **arguments: Any) -> Any:
        """A call that is more than an op, on the reference backend."""
        with backend("reference"):
            return self.call(**arguments)


def shape_name(shape: Sequence[int]) -> str:
    """A shape as it stands in tables and names: 4096x1024."""
    return "x".join(map(str, shape))


def goal_either_way(share: float) -> Callable[[str, Shape], float | None]:
    """The goal of an op that is to reach the same share forward and backward, at every shape."""
    return lambda direction, shape: None if direction == BOTH else share
