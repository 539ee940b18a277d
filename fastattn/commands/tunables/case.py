"""What the tuner has to be told of a kernel."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...checking import Measured

Launch = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One shape of one kernel, with its inputs.

    Attributes:
        features: What `choose` is asked with at this shape.
        launch: config -> the result.
        reference: The same by PyTorch, called to be timed beside it.
        result: The result's name by the accuracy rule, a gradient's beginning with "d".
        measured: What the rule holds it against.
    """

    features: Mapping[str, Any]
    launch: Launch
    reference: Callable[[], torch.Tensor]
    result: str
    measured: Sequence[Measured]


@dataclass(frozen=True)
class Tunable:
    """A kernel with configurations to choose from.

    Attributes:
        kernel: The name that `choose` knows it by, also that of its jitted function, `..._kernel`.
        shapes: What `case` is called with, the most telling first.
        tiny_shapes: The same for a dry run.
        case: (*shape, device) -> the case.
        candidates: (target, **features) -> configurations.
        rule: The analytic rule: (target, **features) -> the configuration without a table.
    """

    kernel: str
    shapes: Sequence[tuple]
    tiny_shapes: Sequence[tuple]
    case: Callable[..., Case]
    candidates: Callable[..., Sequence[Any]]
    rule: Callable[..., Any]
