"""linear: activations and their gradients, what is kept for them, dtypes, and who multiplies."""

import importlib
import math
from collections.abc import Iterator
from typing import Any

import activation_values
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fastattn
from fastattn import reference
from fastattn.ops.linear import ACTIVATIONS, SLOPE_FROM_OUTPUT
from fastattn.reference.linear import ACTIVATIONS as REFERENCE_ACTIVATIONS
from support import DEVICE, WIDEST, assert_close, same_bits

kernels = pytest.mark.kernels

# The module; its name in the package is the function's.
linear_module = importlib.import_module("fastattn.ops.linear")

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)

TOLERANCE = 1e-12 if WIDEST is torch.float64 else 1e-5


def arguments(
    rows: int = 5,
    k: int = 12,
    n: int = 20,
    dtype: torch.dtype = WIDEST,
    **shapes: Any,
) -> dict[str, torch.Tensor]:
    every = {"x": (rows, k), "weight": (n, k), "bias": (n,), "residual": (rows, n)} | shapes
    return {
        name: torch.randn(shape, device=DEVICE, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in every.items()
    }


def outcome(function: Any, given: dict[str, torch.Tensor], **options: Any) -> list[torch.Tensor]:
    y = function(**given, **options)
    dy = torch.linspace(-1.0, 2.0, y.numel(), device=y.device, dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad(y, list(given.values()), dy)]


@kernels
@every_activation
@pytest.mark.parametrize("with_residual", [False, True])
def test_activations_and_gradients(activation, with_residual):
    given = arguments()
    if not with_residual:
        del given["residual"]
    found = outcome(fastattn.linear, given, activation=activation)
    for a, b in zip(found, outcome(reference.linear, given, activation=activation), strict=True):
        assert_close(a, b, activation)


@kernels
@every_activation
@pytest.mark.parametrize("with_residual", [False, True])
def test_special_values_are_limits(activation, with_residual):
    points = [0.0, 0.5, -0.5, 3.0, -3.0, 30.0, -30.0, 300.0, -300.0, math.nan, math.inf, -math.inf]
    x = torch.tensor(points, device=DEVICE).to(WIDEST)[:, None].requires_grad_()
    given = {"x": x, "weight": torch.ones(1, 1, device=DEVICE, dtype=WIDEST, requires_grad=True)}
    if with_residual:
        given["residual"] = torch.ones_like(x).requires_grad_()
    y, dx, *_ = outcome(fastattn.linear, given, activation=activation)
    value, slope = activation_values.value_and_slope(activation, x)
    dy = torch.linspace(-1.0, 2.0, len(points), dtype=torch.float64, device=DEVICE)[:, None]
    for a, b in ((y, value + with_residual), (dx, dy * slope)):
        torch.testing.assert_close(a, b.to(WIDEST), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


@kernels
@every_activation
@pytest.mark.parametrize("with_residual", [False, True])
def test_what_is_kept_for_the_backward(activation, with_residual):
    given = arguments(dtype=torch.float32)
    if not with_residual:
        del given["residual"]
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = fastattn.linear(**given, activation=activation)
    extra = [s for s in saved if s.shape == y.shape and s.data_ptr() != y.data_ptr()]
    output = [s for s in saved if s.data_ptr() == y.data_ptr()]
    from_output = activation in SLOPE_FROM_OUTPUT and not with_residual
    assert len(output) == from_output
    assert len(extra) == (not from_output)


@kernels
def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch):
    kept = []
    launch = linear_module.linear_forward

    def recorded(*given: Any) -> Any:
        kept.append(given[5])
        return launch(*given)

    monkeypatch.setattr(linear_module, "linear_forward", recorded)
    given = arguments()
    with torch.no_grad():
        fastattn.linear(**given, activation="gelu")
    fastattn.linear(**{name: t.detach() for name, t in given.items()}, activation="gelu")
    fastattn.linear(**given, activation="gelu")
    assert kept == [0, 0, 1]


@kernels
def test_a_pre_activation_that_was_not_kept_is_computed_again(monkeypatch):
    given = arguments()
    expected = outcome(fastattn.linear, given, activation="gelu")
    monkeypatch.setattr(linear_module, "_wants_gradients", lambda *tensors: False)
    for a, b in zip(outcome(fastattn.linear, given, activation="gelu"), expected, strict=True):
        assert same_bits(a, b)


@kernels
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_the_bias_gradient_sums_rows_in_any_number(rows):
    given = arguments(rows, 3, 5)
    found = outcome(fastattn.linear, given, activation="tanh")
    for a, b in zip(found, outcome(reference.linear, given, activation="tanh"), strict=True):
        assert_close(a, b)


@kernels
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16])
def test_the_result_has_the_dtype_that_torch_promotes_to(residual_dtype):
    given = arguments(dtype=torch.bfloat16)
    given["residual"] = given["residual"].detach().to(residual_dtype).requires_grad_()
    y, *gradients = outcome(fastattn.linear, given, activation="silu")
    assert y.dtype is torch.float32
    assert [g.dtype for g in gradients] == [t.dtype for t in given.values()]
    wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    exact = outcome(reference.linear, wide, activation="silu")
    # Nothing but dpre is rounded to 16 bits before the result.
    assert (y - exact[0]).abs().max() <= 1e-5
    for a, b in zip(gradients, exact[1:], strict=True):
        assert (a - b).abs().max() <= 2.0**-6 * b.abs().max()


@kernels
def test_autocast_leaves_the_residual_alone():
    given: dict[str, Any] = arguments(dtype=torch.float32)
    with torch.autocast(str(DEVICE), dtype=torch.bfloat16):
        assert fastattn.linear(**given).dtype is torch.float32
        del given["residual"]
        assert fastattn.linear(**given, activation="relu").dtype is torch.bfloat16


@kernels
def test_any_transposition_of_x_and_weight_is_read_in_place(monkeypatch):
    given = arguments(40, 70, 33)
    turned = {**given, **{name: given[name].t().contiguous().t() for name in ("x", "weight")}}
    expected = fastattn.linear(**given, activation="gelu")

    def refuse(*_: torch.Tensor) -> None:
        raise AssertionError("an operand was copied")

    with monkeypatch.context() as patched, torch.no_grad():
        turned["bias"] = given["bias"].detach()
        patched.setattr(torch.Tensor, "clone", refuse)
        found = fastattn.linear(**turned, activation="gelu")
    assert same_bits(found, expected)


@kernels
def test_products_go_to_cublas_unless_something_is_fused(monkeypatch):
    launched = []
    forward = linear_module.linear_forward
    monkeypatch.setattr(
        linear_module, "linear_forward", lambda *given: (launched.append(1), forward(*given))[1]
    )
    monkeypatch.setattr(linear_module, "choose_engine", lambda tensor: "auto")
    given = arguments()
    expected = outcome(reference.linear, given, activation="gelu")
    for a, b in zip(outcome(fastattn.linear, given, activation="gelu"), expected, strict=True):
        assert_close(a, b)
    # The forward alone: the products of the backward have nothing fused.
    assert len(launched) == 1
    assert_close(
        fastattn.linear(given["x"], given["weight"], given["bias"]),
        F.linear(given["x"], given["weight"], given["bias"]),
    )
    assert len(launched) == 1


@kernels
def test_compiles_without_graph_breaks_with_every_argument_absent():
    given = arguments()
    for names in (["x", "weight"], ["x", "weight", "bias"], ["x", "weight", "residual"]):
        chosen = {name: given[name] for name in names}
        torch.compiler.reset()
        compiled = torch.compile(fastattn.linear, fullgraph=True, backend="aot_eager")
        for activation in (None, "relu", "gelu"):
            found = outcome(compiled, chosen, activation=activation)
            expected = outcome(fastattn.linear, chosen, activation=activation)
            for a, b in zip(found, expected, strict=True):
                assert same_bits(a, b)


@pytest.fixture
def two_ranks() -> Iterator[DeviceMesh]:
    """A mesh of two of which this process is the first; nothing can be communicated."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu" if DEVICE is None else DEVICE, (2,))
    torch.distributed.destroy_process_group()


@kernels
@pytest.mark.parametrize("dim", [0, 1, "features"])
def test_shards_stay_where_they_are(two_ranks, dim):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    given = arguments(k=6, n=8, x=(3, 4, 6), residual=(3, 4, 8))
    expected = outcome(fastattn.linear, given, activation="gelu")
    by_rows = dim != "features"
    parameter = Replicate() if by_rows else Shard(0)
    placements: dict[str, Any] = {
        "x": Shard(dim) if by_rows else Replicate(),
        "weight": parameter,
        "bias": parameter,
        "residual": Shard(dim) if by_rows else Shard(2),
    }
    shards = {
        name: DTensor.from_local(tensor.detach(), two_ranks, [placements[name]]).requires_grad_()
        for name, tensor in given.items()
    }
    y: Any = fastattn.linear(**shards, activation="gelu")
    assert y.placements == (Shard(dim if by_rows else 2),)
    local = y.to_local()
    dy = torch.linspace(-1.0, 2.0, local.numel(), device=DEVICE, dtype=WIDEST).reshape(local.shape)
    with CommDebugMode() as communication:
        found: Any = torch.autograd.grad(
            y, list(shards.values()), DTensor.from_local(dy, two_ranks, y.placements)
        )
    assert communication.get_total_counts() == 0
    assert_close(y.to_local(), expected[0])
    summed = Partial() if by_rows else Shard(0)
    wanted = (Shard(dim) if by_rows else Partial(), summed, summed, y.placements[0])
    for a, b, placement in zip(found, expected[1:], wanted, strict=True):
        assert a.placements == (placement,)
        assert_close(a.to_local(), b)


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"x": 1.0}, TypeError, "x must be a tensor"),
        ({"x": torch.tensor(1.0)}, ValueError, "x must have at least one dimension"),
        (
            {"weight": torch.ones(5, 4)},
            ValueError,
            r"weight must have the shape \(N, 3\) for an x of shape \(2, 3\), got \(5, 4\)",
        ),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have the shape \(N, 3\)"),
        ({"weight": torch.ones(5, 3).half()}, TypeError, "weight must have x's dtype"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(5,\), got \(4,\)"),
        ({"bias": torch.ones(5).half()}, TypeError, "bias must have x's dtype"),
        ({"residual": torch.ones(5)}, ValueError, r"residual must have shape \(2, 5\)"),
        ({"residual": torch.ones(2, 5).long()}, TypeError, "residual must be float16"),
        ({"activation": "swish"}, ValueError, "activation must be one of relu, .*got 'swish'"),
    ],
)
def test_bad_arguments_are_named(changed, error, text):
    given: dict[str, Any] = {"x": torch.ones(2, 3), "weight": torch.ones(5, 3)} | changed
    with pytest.raises(error, match=f"linear: {text}"):
        fastattn.linear(**given)


@pytest.mark.parametrize("bias", [True, False])
def test_the_reference_is_torchs_linear(bias):
    x, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    offset = torch.randn(5) if bias else None
    with fastattn.backend("reference"):
        assert same_bits(fastattn.linear(x, weight, offset), F.linear(x, weight, offset))


def test_activations_are_those_of_the_reference():
    assert set(ACTIVATIONS) == set(REFERENCE_ACTIVATIONS)
