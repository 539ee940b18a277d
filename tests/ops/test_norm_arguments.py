"""What the norms refuse: the error names the argument, what it got and what it wants."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from support import DEVICE

ROWS = torch.randn(3, 8)
WEIGHT = torch.ones(8)

NORMS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, w=None, b=None, **rest: fastattn.rms_norm(x, w, bias=b, **rest),
    "layer_norm": fastattn.layer_norm,
    "add_rms_norm": lambda x, w=None, b=None, **rest: fastattn.add_rms_norm(
        x, x, w, bias=b, **rest
    ),
    "add_layer_norm": lambda x, w=None, b=None, **rest: fastattn.add_layer_norm(x, x, w, b, **rest),
}
ADD_NORMS = {"add_rms_norm": fastattn.add_rms_norm, "add_layer_norm": fastattn.add_layer_norm}

every_norm = pytest.mark.parametrize("name", NORMS)
every_add_norm = pytest.mark.parametrize("name", ADD_NORMS)


def refused(error: type[Exception], *words: str) -> Any:
    """The error, whose message has these words in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(words))


@every_norm
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.tensor(1.0), ValueError, ["x must have at least one dimension", "scalar"]),
        (torch.ones(3, 8, dtype=torch.int64), TypeError, ["x must be float16", "torch.int64"]),
        (torch.ones(3, 8, dtype=torch.complex64), TypeError, ["x must be", "torch.complex64"]),
        ([[1.0, 2.0]], TypeError, ["x must be a tensor", "list"]),
        (None, TypeError, ["x must be a tensor", "NoneType"]),
    ],
    ids=["scalar", "integers", "complex", "list", "none"],
)
def test_x(name, x, error, words):
    with refused(error, name, *words):
        NORMS[name](x)


@every_norm
@pytest.mark.parametrize("argument", ["weight", "bias"])
@pytest.mark.parametrize(
    ("parameter", "error", "words"),
    [
        (torch.ones(7), ValueError, [r"shape \(8,\)", r"\(7,\)"]),
        (torch.ones(3, 8), ValueError, [r"shape \(8,\)", r"\(3, 8\)"]),
        (torch.ones(1), ValueError, [r"shape \(8,\)", r"\(1,\)"]),
        (torch.ones(8, dtype=torch.int32), TypeError, ["float16", "torch.int32"]),
        (torch.ones(8, dtype=torch.float64), TypeError, ["torch.float64 beside torch.float32"]),
        (torch.ones(8, device="meta"), ValueError, ["must be on cpu", "meta"]),
        (1.0, TypeError, ["must be a tensor", "float"]),
    ],
    ids=["width", "dimensions", "broadcast", "integers", "float64", "device", "number"],
)
def test_parameters(name, argument, parameter, error, words):
    given = (parameter,) if argument == "weight" else (WEIGHT, parameter)
    with refused(error, name, argument, *words):
        NORMS[name](ROWS, *given)


@every_norm
def test_float64_does_not_mix(name):
    with refused(TypeError, name, "weight", "torch.float32 beside torch.float64"):
        NORMS[name](ROWS.double(), WEIGHT)


@every_norm
@pytest.mark.parametrize("eps", [-1e-6, float("nan")])
def test_eps(name, eps):
    with refused(ValueError, name, "eps must be non-negative", str(eps)):
        NORMS[name](ROWS, WEIGHT, eps=eps)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_casting(name):
    with refused(ValueError, name, "casting must be one of float32, llama, gemma, t5", "'mistral'"):
        NORMS[name](ROWS, WEIGHT, casting="mistral")


@every_norm
def test_out_dtype(name):
    with refused(TypeError, name, "out_dtype", "float16", "torch.int32"):
        NORMS[name](ROWS, WEIGHT, out_dtype=torch.int32)
    with refused(TypeError, name, "out_dtype", "float64 beside torch.float32"):
        NORMS[name](ROWS, WEIGHT, out_dtype=torch.float64)


@every_add_norm
@pytest.mark.parametrize(
    ("residual", "error", "words"),
    [
        (torch.ones(3, 7), ValueError, [r"shape \(3, 8\)", r"\(3, 7\)"]),
        (torch.ones(8), ValueError, [r"shape \(3, 8\)", r"\(8,\)"]),
        (torch.ones(1, 8), ValueError, [r"shape \(3, 8\)", r"\(1, 8\)"]),
        (torch.ones(3, 8, dtype=torch.bool), TypeError, ["float16", "torch.bool"]),
        (torch.ones(3, 8, dtype=torch.float64), TypeError, ["float64 beside torch.float32"]),
        (torch.ones(3, 8, device="meta"), ValueError, ["must be on cpu", "meta"]),
        (None, TypeError, ["must be a tensor", "NoneType"]),
    ],
    ids=["width", "dimensions", "broadcast", "booleans", "float64", "device", "none"],
)
def test_residual(name, residual, error, words):
    with refused(error, name, "residual", *words):
        ADD_NORMS[name](ROWS, residual, WEIGHT)


@every_add_norm
@pytest.mark.parametrize(
    ("option", "value", "error", "words"),
    [
        ("dropout_p", 1.0, ValueError, [r"in \[0, 1\)", "1.0"]),
        ("dropout_p", -0.1, ValueError, [r"in \[0, 1\)", "-0.1"]),
        ("dropout_p", float("nan"), ValueError, [r"in \[0, 1\)", "nan"]),
        ("seed", torch.ones(1), TypeError, ["int64", "tensor"]),
        ("seed", torch.ones(2, dtype=torch.int64), TypeError, ["one element", "tensor"]),
        ("seed", torch.ones(1, dtype=torch.int32), TypeError, ["int64", "torch.int32"]),
        ("seed", 7, TypeError, ["int64 tensor", "7"]),
        ("seed", torch.ones(1, dtype=torch.int64, device="meta"), ValueError, ["cpu", "meta"]),
        ("residual_dtype", torch.int32, TypeError, ["float16", "torch.int32"]),
        ("residual_dtype", torch.float64, TypeError, ["float64 beside torch.float32"]),
    ],
)
def test_options_of_the_addition(name, option, value, error, words):
    options = {"dropout_p": 0.5, option: value}
    with refused(error, name, option, *words):
        ADD_NORMS[name](ROWS, ROWS, WEIGHT, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": torch.ones(3, dtype=torch.int64)}, TypeError, ["x must be float16", "torch.int64"]),
        ({"x": ROWS, "p": 1.0}, ValueError, [r"p must be in \[0, 1\)", "1.0"]),
        ({"x": ROWS, "p": -0.5}, ValueError, [r"p must be in \[0, 1\)", "-0.5"]),
        ({"x": ROWS, "seed": 3}, TypeError, ["seed must be an int64 tensor", "3"]),
    ],
    ids=["integers", "one", "negative", "number as seed"],
)
def test_dropout(arguments, error, words):
    with refused(error, "dropout", *words):
        fastattn.dropout(**arguments)


FUNCTIONAL: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "width": (
        lambda F, x, w: F.layer_norm(x, (7,)),
        ["layer_norm", r"\(7,\)", r"\(3, 8\)"],
    ),
    "no dimension": (
        lambda F, x, w: F.rms_norm(x, ()),
        ["rms_norm", "normalized_shape", r"\(\)"],
    ),
    "too many": (
        lambda F, x, w: F.rms_norm(x, (2, 3, 8)),
        ["rms_norm", r"\(2, 3, 8\)", r"\(3, 8\)"],
    ),
    "weight": (
        lambda F, x, w: F.layer_norm(x, (3, 8), w),
        ["weight", r"\(3, 8\)", r"\(8,\)"],
    ),
    "bias": (
        lambda F, x, w: F.layer_norm(x, (8,), w, x),
        ["bias", r"\(8,\)", r"\(3, 8\)"],
    ),
    "p": (lambda F, x, w: F.dropout(x, 1.5), ["dropout", r"\[0, 1\]", "1.5"]),
}


@pytest.mark.kernels
@pytest.mark.parametrize(("call", "words"), FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_functional(call, words):
    with refused(ValueError, *words):
        call(fastattn.functional, ROWS.to(DEVICE), WEIGHT.to(DEVICE))


@pytest.mark.parametrize("call", [call for call, _ in FUNCTIONAL.values()], ids=FUNCTIONAL)
def test_functional_without_kernels(call):
    """There it is torch's own function, whose errors are torch's."""
    with pytest.raises(
        (ValueError, RuntimeError), match=r"has to|normalized_|dimensions"
    ) as expected:
        call(torch.nn.functional, ROWS, WEIGHT)
    with (
        fastattn.backend("reference"),
        pytest.raises(expected.type, match=re.escape(str(expected.value))),
    ):
        call(fastattn.functional, ROWS, WEIGHT)
