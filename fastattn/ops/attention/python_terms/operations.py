"""PyTorch's operations as Triton writes them, for scalars that are tiles there."""

from collections.abc import Callable

Printer = Callable[..., str]


def _binary(symbol: str) -> Printer:
    return lambda a, b: f"({a} {symbol} {b})"


def _call(name: str) -> Printer:
    return lambda *x: f"{name}({', '.join(x)})"


OF_FLOATS: dict[str, Printer] = {
    "ceil": _call("tl.ceil"),
    "cos": _call("tl.cos"),
    "div": _binary("/"),
    "erf": _call("tl.erf"),
    "exp": _call("tl.exp"),
    "exp2": _call("tl.exp2"),
    "expm1": lambda x: f"(tl.exp({x}) - 1.0)",
    "floor": _call("tl.floor"),
    "log": _call("tl.log"),
    "log1p": lambda x: f"tl.log(1.0 + {x})",
    "log2": _call("tl.log2"),
    "pow": lambda a, b: f"tl.exp2({b} * tl.log2({a}))",
    "reciprocal": lambda x: f"(1.0 / {x})",
    "rsqrt": lambda x: f"(1.0 / tl.sqrt({x}))",
    "sigmoid": _call("sigmoid"),
    "sigmoid_backward": lambda d, y: f"({d} * {y} * (1.0 - {y}))",
    "sin": _call("tl.sin"),
    "sqrt": _call("tl.sqrt"),
    "tanh": _call("tanh_of"),
    "tanh_backward": lambda d, y: f"({d} * (1.0 - {y} * {y}))",
    "trunc": _call("truncate"),
}
"""Operations whose operands are floats, whatever they were."""

OF_ANY: dict[str, Printer] = {
    "abs": _call("tl.abs"),
    "add": _binary("+"),
    "bitwise_and": _binary("&"),
    "bitwise_left_shift": _binary("<<"),
    "bitwise_or": _binary("|"),
    "bitwise_right_shift": _binary(">>"),
    "bitwise_xor": _binary("^"),
    "maximum": lambda a, b: f"tl.maximum({a}, {b})",
    "minimum": lambda a, b: f"tl.minimum({a}, {b})",
    "mul": _binary("*"),
    "neg": lambda x: f"(-{x})",
    "relu": lambda x: f"tl.maximum({x}, 0)",
    "rsub": lambda a, b: f"({b} - {a})",
    "sgn": _call("sign"),
    "sign": _call("sign"),
    "sub": _binary("-"),
    "where": _call("tl.where"),
}
"""Operations in the dtype of their result."""

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

OF_TRUTHS: dict[str, Printer] = {
    "logical_and": _binary("&"),
    "logical_not": lambda x: f"({x} == 0)",
    "logical_or": _binary("|"),
    "logical_xor": _binary("^"),
}

CONSTANTS = {
    "full": 1,
    "full_like": 1,
    "ones": None,
    "ones_like": None,
    "scalar_tensor": 0,
    "zeros": None,
    "zeros_like": None,
}
"""What makes a number, and which argument that is."""

SAME = ("alias", "clone", "detach", "lift_fresh_copy", "expand", "view")
"""What gives a scalar itself."""

VIEWS = ("expand", "permute", "select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view")
"""What shows the numbers of a captured tensor in another way."""


SUPPORTED = sorted(
    {*OF_FLOATS, *OF_ANY, *COMPARISONS, *OF_TRUTHS, "clamp", "remainder", "floor_divide"}
    | {"bitwise_not", "full_like", "index", "masked_fill", "scalar_tensor", "select", "to"}
)
