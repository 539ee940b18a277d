"""How a function indexes captured tensors while it is called: by scalars, which may be tensors."""

import inspect
import os
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import traceback
from torch.overrides import TorchFunctionMode

from .learning import Read


class IndexByTensors(TorchFunctionMode):
    """Index by scalars of which some are tensors without asking these for their values.

    Attributes:
        reads: Where the function read a number of a tensor that learns, if `reads_of` was given.
    """

    def __init__(
        self,
        *,
        traces: bool = False,
        refuses_learned: bool = False,
        reads_of: Sequence[torch.Tensor] = (),
        replaced: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> None:
        """Begin.

        Args:
            traces: whether the nodes of a graph shall have the line of the function.
            refuses_learned: whether an operation of a captured tensor that requires a gradient is
                an error.
            reads_of: the inputs of the function, for `reads`. All else that requires a gradient
                and that it did not compute learns.
            replaced: captured tensors, each with what stands for it.
        """
        super().__init__()
        self.traces = traces
        self.refuses_learned = refuses_learned
        self.replaced = replaced
        self.reads: list[Read] = []
        # By their ids: what is no captured tensor, and captured ones that are indexed in part.
        self.known: dict[int, torch.Tensor] = {id(x): x for x in reads_of}
        self.parts: dict[int, Read] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.traces:
            traceback.set_stack_trace([_line_of(inspect.currentframe())])
        if self.refuses_learned and any(map(_learns, args)):
            raise ValueError("it captures a tensor that requires a gradient")
        if func is torch.Tensor.__getitem__:
            x, place = args
            places = place if isinstance(place, tuple) else (place,)
            if all(map(_is_scalar_index, places)) and len(places) <= x.dim():
                return self.index(x, places)
        args = [self.take(x, func) for x in args]
        kwargs = {name: self.take(x, func) for name, x in (kwargs or {}).items()}
        result = func(*args, **kwargs)
        if self.known and isinstance(result, torch.Tensor):
            self.known[id(result)] = result
        return result

    def index(self, x: torch.Tensor, places: Sequence[Any]) -> torch.Tensor:
        """A tensor at some indices of its first dimensions."""
        part = self.parts.get(id(x), Read(x, (), x))
        for tensor, other in self.replaced:
            x = other if x is tensor else x
        for one in places:
            by_number = isinstance(one, int)
            x = x.select(0, one) if by_number else torch.ops.aten.index.Tensor(x, [one])
        if not (self.known and part.tensor.requires_grad):
            return x
        read = part._replace(indices=(*part.indices, *places), value=x)
        if x.dim() > 0:
            self.parts[id(x)] = read
            return x
        return self.note(read)

    def take(self, x: Any, func: Any) -> Any:
        """An argument of an operation, or what stands for it."""
        if not isinstance(x, torch.Tensor):
            return x
        for tensor, other in self.replaced:
            x = other if x is tensor else x
        if not (self.known and x.requires_grad) or id(x) in self.known:
            return x
        if x.dim() > 0 or id(x) in self.parts:
            # What is asked of a tensor that learns, as of its shape, computes nothing.
            if getattr(func, "__name__", "") == "__get__":
                return x
            raise ValueError(
                f"{getattr(func, '__name__', func)} of a captured tensor that requires a gradient: "
                "index it by all its dimensions first, or compute that before"
            )
        return self.note(Read(x, (), x))

    def note(self, read: Read) -> torch.Tensor:
        """What a function is given for a number that learns."""
        # As wide as what is computed, so that no gradient is rounded before it is summed.
        value = read.value.to(torch.float64)
        # One for each read, which has a gradient of its own.
        value = value.view(()) if value is read.value else value
        self.known[id(value)] = value
        self.reads.append(read._replace(value=value))
        return value


def _line_of(frame: types.FrameType | None) -> str:
    """Where a user's function is, from within what it called of PyTorch."""
    own = (__file__, os.path.dirname(torch.__file__))
    while frame is not None and frame.f_code.co_filename.startswith(own):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _learns(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def _is_scalar_index(place: Any) -> bool:
    if isinstance(place, torch.Tensor):
        return place.dim() == 0 and not (place.is_floating_point() or place.dtype is torch.bool)
    return isinstance(place, int) and not isinstance(place, bool)
