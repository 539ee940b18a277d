"""Logits that do not exist until somebody asks for their numbers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

from ...kernels.private import version_of
from ...ops.core.precision import is_autocast_on

Step = tuple[str, float]
"""What a model does to its logits before the loss: "multiply" or "divide" by a number, or
"tanh" and "float", which need none."""


class DeferredLogits:
    """What a head would return for hidden states, (B, S, vocabulary), remembered as what it takes.

    Multiplied or divided by a number, under tanh and in float32 they stay deferred, for that is
    what models do between head and loss. Everything else computes them, once, and is done to the
    tensor: `logits.argmax(-1)`, `logits[0]`, `torch.softmax(logits, -1)`.

    Args:
        hidden: (B, S, D).
        weight: (vocabulary, D), the head's.
        bias: (vocabulary,), or None.
        steps: what was done to them.

    Raises:
        RuntimeError: where they are computed, that the head's weights have changed since.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        steps: tuple[Step, ...] = (),
    ) -> None:
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.steps = steps
        self.product_dtype = product_dtype(hidden)
        self.version = None if is_compiling() else version_of(weight)
        self.computed: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(B, S, vocabulary)."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        """That of the product, or float32 once that was asked for."""
        return torch.float32 if ("float", 0.0) in self.steps else self.product_dtype

    @property
    def device(self) -> torch.device:
        """Where they would be."""
        return self.hidden.device

    def compute(self) -> torch.Tensor:
        """The logits as a tensor."""
        if self.computed is None:
            if self.version is not None and self.version != version_of(self.weight):
                raise RuntimeError(
                    "these logits were never computed, for the loss did not need them, and the "
                    "weights of the head have changed since: read them before the optimizer's step"
                )
            tensors = (self.hidden, self.weight, self.bias)
            cast = (None if x is None else x.to(self.product_dtype) for x in tensors)
            with torch.autocast(self.device.type, enabled=False):
                logits = F.linear(*cast)  # type: ignore[arg-type]
                for step, number in self.steps:
                    logits = STEPS[step](logits, number)
            self.computed = logits
        return self.computed

    def after(self, step: str, number: float = 0.0) -> "DeferredLogits":
        """The same logits after one more step."""
        return DeferredLogits(self.hidden, self.weight, self.bias, (*self.steps, (step, number)))

    def float(self) -> "DeferredLogits":
        """The logits in float32."""
        return self.after("float")

    def tanh(self) -> "DeferredLogits":
        """Their hyperbolic tangent."""
        return self.after("tanh")

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, int | float):
            return self.after("multiply", other)
        return self.compute() * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, int | float):
            return self.after("divide", other)
        return self.compute() / other

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.compute(), name)

    def __getitem__(self, place: Any) -> torch.Tensor:
        return self.compute()[place]

    def __len__(self) -> int:
        return len(self.hidden)

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Remember tanh, and call anything else with the tensor."""
        kwargs = kwargs or {}
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].after("tanh")
        return func(*map(_computed, args), **{name: _computed(x) for name, x in kwargs.items()})


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer called now would compute."""
    if is_autocast_on(x.device.type) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


STEPS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "multiply": lambda logits, number: logits * number,
    "divide": lambda logits, number: logits / number,
    "tanh": lambda logits, _: torch.tanh(logits),
    "float": lambda logits, _: logits.float(),
}


def _computed(x: Any) -> Any:
    if isinstance(x, DeferredLogits):
        return x.compute()
    if type(x) in (list, tuple):
        return type(x)(_computed(item) for item in x)
    return x


def _computing(name: str) -> Callable[..., Any]:
    def operate(self: DeferredLogits, *others: Any) -> Any:
        return getattr(self.compute(), name)(*map(_computed, others))

    return operate


# Python looks operators up in the class.
for _name in [
    "add",
    "radd",
    "sub",
    "rsub",
    "rtruediv",
    "pow",
    "neg",
    "matmul",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
]:
    setattr(DeferredLogits, f"__{_name}__", _computing(f"__{_name}__"))
