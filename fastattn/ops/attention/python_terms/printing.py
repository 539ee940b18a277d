"""A traced function as the source of Triton functions.

Each operation of the graph is a line. What is computed with floats is computed in the dtype of the
score, in masks in float32, whatever dtype captured tensors have. A captured tensor is read where it
is indexed by all its dimensions, by strides, and only at indices that it has.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .operations import COMPARISONS, CONSTANTS, OF_ANY, OF_FLOATS, OF_TRUTHS, SAME, SUPPORTED, VIEWS
from .term_arguments import TermArguments
from .trace import Traced


@dataclass
class Value:
    """What a node of the graph is: an expression, or a captured tensor indexed in part.

    Attributes:
        text: The expression.
        dtype: What PyTorch computes it in.
        uses: Which inputs it depends on.
        tensor: The captured tensor, while it has dimensions left.
        indices: The indices of its first dimensions.
    """

    text: str
    dtype: torch.dtype
    uses: frozenset[str] = frozenset()
    tensor: torch.Tensor | None = None
    indices: tuple["Value", ...] = ()


INPUTS = {"b": "place.batch", "h": "place.head", "q_idx": "m", "kv_idx": "n"}
"""What the indices of a function are to a Triton function of a term."""

BOUNDS = {"q_idx": "(m < place.queries)", "kv_idx": "(n < place.keys)"}
"""Where they are indices of queries and keys that there are."""


class Function:
    """A traced function, printed.

    Attributes:
        lines: Of the Triton function's body, the last of which returns the result.
        loads_tiles: Whether it reads a captured number for each score.
        numbers_used: Which of "b" and "h" it depends on.
    """

    def __init__(
        self, traced: Traced, inputs: Sequence[str], arguments: TermArguments, kind: str
    ) -> None:
        """Print a graph.

        Args:
            traced: the graph, whose first inputs are these.
            inputs: their names; what is no index, a score or a gradient, has its own.
            arguments: what the kernels get, to which captured tensors are added.
            kind: of the result, "score", "truth" or "index".
        """
        self.arguments = arguments
        self.kind = kind
        self.lines: list[str] = []
        self.loads_tiles = False
        self.numbers_used: set[str] = set()
        self.values: dict[Any, Value] = {}
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        for node, name in zip(placeholders, inputs, strict=False):
            dtype = torch.int32 if name in INPUTS else torch.float64
            self.values[node] = Value(INPUTS.get(name, name), dtype, frozenset({name}))
            if name in ("b", "h") and node.users:
                self.numbers_used.add(name)
        lifted = placeholders[len(inputs) :]
        for node, texts in zip(lifted, arguments.numbers, strict=True):
            if len(texts) == 1:
                self.values[node] = Value(texts[0], torch.int64)
            else:
                text = " + ".join(map(self.cast, texts))
                self.values[node] = Value(f"({text})", torch.float64)
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                tensor = traced.constants[node.target]
                self.values[node] = self.read(Value("", tensor.dtype, tensor=tensor))
            elif node.op == "call_function":
                try:
                    self.values[node] = self.print_node(node)
                except ValueError as error:
                    raise ValueError(f"{error}{_line_of(node)}") from error
            elif node.op == "output":
                self.finish(self.values[node.args[0]])

    def finish(self, result: Value) -> None:
        """Return the result, of a score in the score's dtype and of the tile's shape."""
        if self.kind == "truth":
            self.lines.append(f"return {result.text} != 0")
            return
        if self.kind == "index":
            self.lines.append(f"return tl.zeros_like(m) + {result.text}")
            return
        text = self.cast(result.text)
        if not result.uses & {"score", "dscore"}:
            # A sum with zeros, not a broadcast: a number has no shape to begin with.
            text = f"tl.zeros_like(score) + {text}"
        self.lines.append(f"return {text}")

    @property
    def floats(self) -> str:
        """The dtype that floats are computed in."""
        return "score.dtype" if self.kind == "score" else "tl.float32"

    def cast(self, text: str) -> str:
        """An expression in that dtype."""
        return f"tl.cast({text}, {self.floats})"

    def keep(self, text: str, dtype: torch.dtype, *parts: Value) -> Value:
        """An expression of some values under a name of its own."""
        name = f"x{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return Value(name, dtype, frozenset().union(*(part.uses for part in parts)))

    def print_node(self, node: torch.fx.Node) -> Value:
        """An operation of the graph."""
        # What is done in place, as some derivatives do, goes by the result here.
        name = node.target.overloadpacket.__name__.removesuffix("_")  # type: ignore[union-attr]
        if "tensor_meta" not in node.meta:
            raise ValueError(f"{name} gives several tensors")
        dtype = node.meta["tensor_meta"].dtype
        given = [self.values[x] for x in node.all_input_nodes]
        if name == "index" or (given and given[0].tensor is not None):
            return self.print_view(node, name)
        if any(value.tensor is not None for value in given):
            raise ValueError(f"{name} of a captured tensor of several dimensions")

        def text(place: int | str, floating: bool) -> str:
            x = node.args[place] if isinstance(place, int) else node.kwargs[place]
            return self.operand(x, floating)

        floating = dtype.is_floating_point
        count = len(node.args)
        if name in SAME:
            return given[0]
        if name == "pow" and not isinstance(node.args[1], torch.fx.Node):
            return self.keep(self.power(text(0, floating), node.args[1]), dtype, *given)
        if name in ("_to_copy", "to"):
            return self.keep(self.convert(given[0], dtype), dtype, *given)
        if name in OF_FLOATS and (name, node.kwargs.get("rounding_mode")) != ("div", "floor"):
            if node.kwargs.get("rounding_mode") is not None:
                raise ValueError(f"{name} with rounding_mode={node.kwargs['rounding_mode']!r}")
            printed = OF_FLOATS[name](*(text(i, True) for i in range(count)))
        elif name in ("floor_divide", "div", "remainder"):
            quotient = f"tl.floor({text(0, True)} / {text(1, True)})" if floating else ""
            if floating and name == "remainder":
                printed = f"({text(0, True)} - {quotient} * {text(1, True)})"
            else:
                function = "floor_remainder" if name == "remainder" else "floor_divide"
                printed = quotient or f"{function}({text(0, False)}, {text(1, False)})"
        elif name in COMPARISONS:
            floating = any(map(self.is_float, node.args))
            printed = f"({text(0, floating)} {COMPARISONS[name]} {text(1, floating)})"
        elif name in OF_TRUTHS:
            printed = OF_TRUTHS[name](*(f"({text(i, False)} != 0)" for i in range(count)))
        elif name == "bitwise_not":
            printed = f"({text(0, False)} == 0)" if dtype is torch.bool else f"(~{text(0, False)})"
        elif name == "clamp" or name in ("clamp_min", "clamp_max"):
            printed = self.clamp(node, name, floating)
        elif name == "where":
            chosen = (text(1, floating), text(2, floating))
            printed = f"tl.where({text(0, False)} != 0, {', '.join(chosen)})"
        elif name == "masked_fill":
            printed = f"tl.where({text(1, False)} != 0, {text(2, floating)}, {text(0, floating)})"
        elif name in CONSTANTS:
            place = CONSTANTS[name]
            number: Any = int(name.startswith("ones")) if place is None else node.args[place]
            return Value(self.literal(number, floating), dtype)
        elif name in OF_ANY and node.kwargs.get("alpha", 1) == 1:
            printed = OF_ANY[name](*(text(i, floating) for i in range(count)))
        else:
            raise ValueError(f"{name} is not one of the operations {', '.join(SUPPORTED)}")
        return self.keep(printed, dtype, *given)

    def power(self, x: str, exponent: Any) -> str:
        """A power whose exponent is known, which may be of a negative number."""
        if not float(exponent).is_integer():
            return OF_FLOATS["pow"](x, self.literal(exponent, True))
        whole = abs(int(exponent))
        if whole <= 4:
            product = " * ".join([x] * whole) or "1"
        else:
            product = f"tl.exp2({float(whole)} * tl.log2(tl.abs({x})))"
            product += f" * sign({x})" if whole % 2 else ""
        return f"({product})" if exponent >= 0 else f"(1.0 / ({product}))"

    def clamp(self, node: torch.fx.Node, name: str, floating: bool) -> str:
        """A value between bounds, of which either may be missing."""
        bounds = [*node.args[1:], None][:2]
        low, high = (bounds[0], None) if name == "clamp_min" else bounds
        if name == "clamp_max":
            low, high = None, bounds[0]
        printed = self.operand(node.args[0], floating)
        if low is not None:
            printed = f"tl.maximum({printed}, {self.operand(low, floating)})"
        if high is not None:
            printed = f"tl.minimum({printed}, {self.operand(high, floating)})"
        return printed

    def is_float(self, x: Any) -> bool:
        """Whether an operand is a float."""
        if isinstance(x, torch.fx.Node):
            return self.values[x].dtype.is_floating_point
        return isinstance(x, float)

    def operand(self, x: Any, floating: bool) -> str:
        """An operand of an operation in floats, or in what it is."""
        if not isinstance(x, torch.fx.Node):
            return self.literal(x, floating)
        value = self.values[x]
        if floating and not value.dtype.is_floating_point:
            return self.cast(value.text)
        return value.text

    def literal(self, x: Any, floating: bool) -> str:
        """A number."""
        if not floating and not isinstance(x, float):
            return repr(int(x))
        if math.isnan(x) or math.isinf(x):
            return f'float("{x}")'
        # Triton takes a float for one of 32 bits.
        return repr(float(x)) if float(x).is_integer() else f"tl.full((), {x!r}, {self.floats})"

    def convert(self, value: Value, dtype: torch.dtype) -> str:
        """A value in another dtype; to 16 bits and back rounds."""
        if dtype is torch.bool:
            return f"({value.text} != 0)"
        if not dtype.is_floating_point:
            return f"tl.cast({value.text}, tl.{str(dtype).removeprefix('torch.')})"
        if dtype in (torch.float16, torch.bfloat16):
            return self.cast(f"tl.cast({value.text}, tl.{str(dtype).removeprefix('torch.')})")
        return self.cast(value.text)

    def print_view(self, node: torch.fx.Node, name: str) -> Value:
        """A captured tensor that is indexed, or another view of it."""
        value = self.values[node.args[0]]
        assert value.tensor is not None
        if name == "index" and len(node.args[1]) == 1:  # type: ignore[arg-type]
            index = self.values[node.args[1][0]]  # type: ignore[index]
        elif name == "select" and node.args[1] == 0:
            size = value.tensor.shape[len(value.indices)]
            index = Value(repr(node.args[2] % size), torch.int64)  # type: ignore[operator]
        elif name in SAME[:4]:
            return value
        elif name in VIEWS and not value.indices:
            view = node.target(value.tensor, *node.args[1:], **node.kwargs)  # type: ignore[operator]
            return self.read(Value("", view.dtype, tensor=view))
        else:
            raise ValueError(
                f"{name} of a captured tensor: index it by all its dimensions, or compute that "
                "before"
            )
        return self.read(Value("", value.dtype, frozenset(), value.tensor, (*value.indices, index)))

    def read(self, value: Value) -> Value:
        """The number of a captured tensor once all its dimensions are indexed."""
        tensor, indices = value.tensor, value.indices
        assert tensor is not None
        if len(indices) < tensor.dim():
            return value
        pointer, sizes, strides = self.arguments.add_tensor(tensor)
        uses = frozenset().union(*(index.uses for index in indices))
        self.loads_tiles |= {"q_idx", "kv_idx"} <= uses
        far = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) >= 2**31
        # Beyond a sequence's end an index may be anything.
        inside = [bound for name, bound in BOUNDS.items() if name in uses]
        for index, size, stride in zip(indices, sizes, strides, strict=True):
            text = index.text
            if not text.isdecimal():
                cast = f"tl.cast({text}, tl.int64)" if far else text
                text = self.keep(f"wrap_index({cast}, {size})", torch.int64, index).text
                inside.append(f"({text} >= 0) & ({text} < {size})")
            elif far:
                text = f"tl.cast({text}, tl.int64)"
            pointer += f" + {text} * {stride}"
        mask = f", {' & '.join(inside)}, 0" if inside else ""
        loaded = f"tl.load({pointer}{mask})"
        if tensor.dtype is torch.bool:
            loaded = f"({loaded} != 0)"
        elif tensor.is_floating_point():
            loaded = self.cast(loaded)
        return self.keep(loaded, value.dtype, *indices)


def _line_of(node: torch.fx.Node) -> str:
    """Where in a user's function an operation is, for an error."""
    return f", in {node.stack_trace}" if node.stack_trace else ""
