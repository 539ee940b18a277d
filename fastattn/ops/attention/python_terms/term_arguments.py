"""What the kernels get for a term that is printed, and where in its `args` that stands."""

import math
from collections.abc import Sequence

import torch

from .trace import Number


class TermArguments:
    """What the kernels get for a term: tensors, floats, then sizes with strides, and integers.

    Args:
        numbers: what was lifted.
        learned: how many tensors follow those that are read.
    """

    def __init__(self, numbers: Sequence[Number], learned: int = 0) -> None:
        self.learned = learned
        self.tensors: list[torch.Tensor] = []
        self.floats: list[float] = []
        self.integers: list[int] = []
        self.numbers: list[list[str]] = []
        for number in numbers:
            if isinstance(number, float):
                # Kernels get floats of 32 bits: what these do not hold is another.
                first = torch.tensor(number, dtype=torch.float32).item()
                rest = number - first if math.isfinite(first) else 0.0
                self.numbers.append([f"@float{len(self.floats) + i}@" for i in (0, 1)])
                self.floats += (first, rest)
            else:
                self.numbers.append([f"@integer{len(self.integers)}@"])
                self.integers.append(number)

    def add_tensor(self, tensor: torch.Tensor) -> tuple[str, list[str], list[str]]:
        """A tensor's pointer, its sizes and its strides."""
        known = [_is_same(tensor, other) for other in self.tensors]
        place = known.index(True) if any(known) else len(known)
        if place == len(known):
            self.tensors.append(tensor)
        first = sum(2 * other.dim() for other in self.tensors[:place])
        fields = [f"@size{first + i}@" for i in range(2 * tensor.dim())]
        return f"@tensor{place}@", fields[: tensor.dim()], fields[tensor.dim() :]

    def resolve(self, source: str) -> str:
        """A source with the places of all arguments, once no more come."""
        sizes = sum(2 * tensor.dim() for tensor in self.tensors)
        tensors = len(self.tensors) + self.learned
        counts = {"tensor": tensors, "float": len(self.floats), "size": sizes}
        parts = source.split("@")
        for place in range(1, len(parts), 2):
            kind = parts[place].rstrip("0123456789")
            before = list(counts.values())[: [*counts, "integer"].index(kind)]
            parts[place] = f"args[{sum(before) + int(parts[place][len(kind) :])}]"
        return "".join(parts)


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype, a.device) == (
        b.data_ptr(),
        b.shape,
        b.stride(),
        b.dtype,
        b.device,
    )
