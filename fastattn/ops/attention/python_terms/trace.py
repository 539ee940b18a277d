"""What a plain Python function of a score computes, as a graph of PyTorch's operations.

The function is called once, with scalars for the score and the indices, by `make_fx`. Tensors that
it captures become constants of the graph. Numbers that it captures, in its closure, its defaults,
or as globals that it or a function that it calls names, are lifted: they become inputs, so that
other values need no other graph. Where a number must be known, as in `range(n)`, none is lifted.
"""

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx

from .indexing import IndexByTensors
from .learning import Layout, Read, entry_of, find_layouts

Number = int | float

Inputs = tuple[torch.Tensor, ...]

Run = Callable[..., torch.Tensor]
"""What is traced: it is called with what lifts a number, and then with the inputs."""

INDICES = ("b", "h", "q_idx", "kv_idx")


@dataclass(frozen=True)
class Traced:
    """What a function computes.

    Attributes:
        graph: With an input for the score, where the function takes one, one for each index, one
            for the gradient of the new score in `backward`, and one for each number.
        constants: The tensors that the graph names.
        numbers: What was lifted.
    """

    graph: torch.fx.Graph
    constants: dict[str, torch.Tensor]
    numbers: tuple[Number, ...]


class TracedRead(NamedTuple):
    """What a function computes of a number that learns."""

    layout: int
    """The place of its tensor among the `layouts`."""
    backward: Traced
    """Its gradient."""
    index: Traced | None
    """Which entry of a table it is."""


class TracedScore(NamedTuple):
    """What a function of a score computes."""

    forward: Traced
    backward: Traced
    layouts: list[Layout]
    """The tensors that learn."""
    learned: list[TracedRead]


def trace_mask(function: Callable[..., Any]) -> Traced:
    """The graph of f(b, h, q_idx, kv_idx)."""

    def run(lift: Callable[[Number], Any], *inputs: torch.Tensor) -> torch.Tensor:
        with IndexByTensors(traces=True, refuses_learned=True):
            return torch.as_tensor(_lifted(function, lift)(*inputs))

    (traced,) = _trace(function, (run, _index_scalars()))
    return traced


def trace_score(function: Callable[..., Any]) -> TracedScore:
    """The graphs of f(score, b, h, q_idx, kv_idx), and of its derivatives."""
    # The widest, so that no input widens what is computed.
    score, gradient = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def run(lift: Callable[[Number], Any], *inputs: torch.Tensor) -> torch.Tensor:
        with IndexByTensors(traces=True):
            return torch.as_tensor(_lifted(function, lift)(*inputs))

    def run_backward(
        place: int, lift: Callable[[Number], Any], gradient: torch.Tensor, *inputs: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of the score that is given, or of what is read at a place."""
        with torch.enable_grad():
            leaf = inputs[0].detach().requires_grad_()
            with IndexByTensors(reads_of=(leaf, *inputs[1:])) as mode:
                new = torch.as_tensor(_lifted(function, lift)(leaf, *inputs[1:]))
            if not new.requires_grad:
                return torch.zeros_like(gradient)
            variable = leaf if place < 0 else mode.reads[place].value
            (found,) = torch.autograd.grad(new, variable, gradient.to(new.dtype), allow_unused=True)
        return torch.zeros_like(gradient) if found is None else found

    def run_index(place: int, lift: Callable[[Number], Any], *inputs: torch.Tensor) -> torch.Tensor:
        """Which entry of its table is read at a place."""
        with IndexByTensors(reads_of=(score, *inputs)) as mode:
            _lifted(function, lift)(score, *inputs)
        read = mode.reads[place]
        return entry_of(read, layouts[_layout_of(read, layouts)])

    scalars = _index_scalars()
    with IndexByTensors(reads_of=(score, *scalars)) as mode, torch.no_grad():
        function(score, *scalars)
    layouts = find_layouts(mode.reads, dict(zip(INDICES, scalars, strict=True)))
    given = (score, *scalars)
    runs: list[tuple[Run, Inputs]] = [(run, given)]
    places = range(-1, len(mode.reads))
    runs += [(functools.partial(run_backward, place), (gradient, *given)) for place in places]
    own = [_layout_of(read, layouts) for read in mode.reads]
    tables = [i for i, place in enumerate(own) if layouts[place].entries]
    runs += [(functools.partial(run_index, place), scalars) for place in tables]
    forward, backward, *others = _trace(function, *runs)
    indices = dict(zip(tables, others[len(mode.reads) :], strict=True))
    learned = [TracedRead(place, others[i], indices.get(i)) for i, place in enumerate(own)]
    return TracedScore(forward, backward, layouts, learned)


def _layout_of(read: Read, layouts: Sequence[Layout]) -> int:
    """The place of the layout of the tensor that is read."""
    return next(i for i, layout in enumerate(layouts) if layout.tensor is read.tensor)


def captured_values(function: Any) -> Iterator[Any]:
    """All that a function captures and that a trace depends on, in a fixed order."""
    found: list[Any] = []

    def collect(value: Any) -> Any:
        found.append(value)
        return value

    _rebuild(function, collect, everything=True, done={})
    return iter(found)


def _index_scalars() -> Inputs:
    return tuple(torch.zeros((), dtype=torch.int32) for _ in INDICES)


def _trace(function: Callable[..., Any], *runs: tuple[Run, Inputs]) -> list[Traced]:
    """The graphs of several computations by a function, with its numbers lifted where possible."""
    numbers: list[Number] = []

    def collect(number: Number) -> Number:
        numbers.append(number)
        return number

    _lifted(function, collect)
    if numbers:
        try:
            return [_traced(run, inputs, tuple(numbers)) for run, inputs in runs]
        except Exception:
            # Whatever it is: without lifting it is either gone, or told.
            pass
    return [_traced(run, inputs, ()) for run, inputs in runs]


def _traced(run: Run, inputs: Inputs, numbers: tuple[Number, ...]) -> Traced:
    def call(*given: torch.Tensor) -> torch.Tensor:
        own, lifted = given[: len(inputs)], iter(given[len(inputs) :])
        lift = (lambda _: next(lifted)) if numbers else (lambda number: number)
        result = run(lift, *own)
        if result.dim() != 0:
            raise ValueError(f"it gives a tensor of shape {tuple(result.shape)}, not one number")
        return result

    scalars = tuple(
        torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else torch.int64)
        for x in numbers
    )
    # Each operation of the graph then has the line that it was on.
    with traceback.preserve_node_meta(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        module = make_fx(call)(*inputs, *scalars)
    module.graph.eliminate_dead_code()
    constants = {
        node.target: getattr(module, node.target)
        for node in module.graph.nodes
        if node.op == "get_attr"
    }
    return Traced(module.graph, constants, numbers)


def _lifted(function: Any, lift: Callable[[Number], Any]) -> Any:
    """The same function, of what `lift` makes of each number that it captures."""
    return _rebuild(function, lift, everything=False, done={})


def _rebuild(
    function: Any, lift: Callable[[Any], Any], everything: bool, done: dict[int, Any]
) -> Any:
    """A function with other captured values; what is no plain function of a user's is left alone.

    Args:
        function: the function.
        lift: what is called with each number, or with each value, that it captures.
        everything: whether all values are meant, and not numbers alone.
        done: by their ids, functions that have been rebuilt already.
    """
    if not isinstance(function, types.FunctionType):
        return lift(function) if everything else function
    if id(function) in done:
        return done[id(function)]
    done[id(function)] = function

    def change(value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return _rebuild(value, lift, everything, done)
        if type(value) in (tuple, list):
            return type(value)(map(change, value))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number or (everything and not isinstance(value, types.ModuleType)):
            return lift(value)
        return value

    cells = [types.CellType(*map(change, _contents(cell))) for cell in function.__closure__ or ()]
    # Of functions that it calls those of its own file: who imports one captures nothing by that.
    named = {
        name: change(value)
        for name in _names(function.__code__)
        if (value := function.__globals__.get(name)) is not None
        and getattr(value, "__module__", function.__module__) == function.__module__
    }
    defaults = tuple(map(change, function.__defaults__ or ()))
    other = types.FunctionType(
        function.__code__,
        {**function.__globals__, **named},
        function.__name__,
        defaults or None,
        tuple(cells) or None,
    )
    other.__kwdefaults__ = {
        name: change(value) for name, value in (function.__kwdefaults__ or {}).items()
    }
    done[id(function)] = other
    return other


def _contents(cell: types.CellType) -> tuple[Any, ...]:
    """What a cell holds; nothing where a function is not defined yet."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


def _names(code: types.CodeType) -> Iterator[str]:
    """The globals that code may read, that of functions defined in it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
