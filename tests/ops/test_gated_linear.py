"""The fused gated linear layer: what it saves, layouts of weights, special numbers, sharding."""

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import activation_values
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fastattn
from fastattn.kernels.config import Target
from fastattn.ops.core.backends import Backend
from fastattn.ops.gated_linear import ACTIVATIONS
from support import DEVICE, WIDEST, assert_close, count_launches, same_bits

kernels = pytest.mark.kernels

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)

# What numpy, under Triton's interpreter, has to say of products of infinity and zero.
special_values = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

NAMES = ("x", "w_gate", "w_up", "b_gate", "b_up")


def inputs(*leading: int, k: int = 24, n: int = 20) -> dict[str, Any]:
    """x (*leading, k), weights (n, k) and biases, all with gradients."""
    shapes = {"x": (*leading, k), "w_gate": (n, k), "w_up": (n, k), "b_gate": (n,), "b_up": (n,)}
    device = DEVICE or "cpu"
    return {
        name: (torch.randn(shape, dtype=WIDEST, device=device) * 0.5).requires_grad_()
        for name, shape in shapes.items()
    }


def unfused(x, w_gate, w_up, b_gate=None, b_up=None, activation="silu"):
    """The same by two linear layers of PyTorch."""
    return FUNCTIONS[activation](F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up)


def outcome(
    function: Callable, tensors: dict[str, torch.Tensor], **options: Any
) -> list[torch.Tensor]:
    """The output, and the gradients of all tensors for an incoming one that no symmetry hides."""
    y = function(**tensors, **options)
    dy = torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, list(tensors.values()), dy)]


@kernels
@every_activation
def test_kernels_agree_with_two_linear_layers(activation):
    check_against_two_linear_layers("triton", activation)


@every_activation
def test_reference_agrees_with_two_linear_layers(activation):
    check_against_two_linear_layers("reference", activation)


def check_against_two_linear_layers(backend: Backend, activation: str) -> None:
    tensors = inputs(3, 14)
    with fastattn.backend(backend):
        found = outcome(fastattn.gated_linear, tensors, activation=activation)
    expected = outcome(unfused, tensors, activation=activation)
    for name, a, b in zip(("y", *NAMES), found, expected, strict=True):
        assert_close(a, b, name)


class SavedBytes(AbstractContextManager):
    """The bytes that autograd keeps for the backward, beside the tensors that are there anyway."""

    def __init__(self, *given: torch.Tensor) -> None:
        self._seen = {tensor.data_ptr() for tensor in given}
        self.total = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in self._seen:
            self._seen.add(tensor.data_ptr())
            self.total += tensor.nbytes
        return tensor

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


@kernels
def test_nothing_is_saved_but_the_inputs():
    tensors = inputs(64, k=32, n=48)
    with SavedBytes(*tensors.values()) as saved:
        y = fastattn.gated_linear(**tensors)
    assert saved.total == 0
    with SavedBytes(*tensors.values()) as saved:
        unfused(**tensors)
    # gate, silu(gate) and up.
    assert saved.total == 3 * y.nbytes


@kernels
@every_activation
@pytest.mark.parametrize("biased", [False, True])
def test_kept_gate_and_up_are_all_that_is_saved_and_give_the_same(activation, biased):
    tensors = inputs(64, k=32, n=48)
    tensors = {name: t for name, t in tensors.items() if biased or not name.startswith("b_")}
    with SavedBytes(*tensors.values()) as saved:
        y = fastattn.gated_linear(**tensors, activation=activation, recompute=False)
    assert saved.total == 2 * y.nbytes
    found = outcome(fastattn.gated_linear, tensors, activation=activation, recompute=False)
    expected = outcome(unfused, tensors, activation=activation)
    for name, a, b in zip(("y", *tensors), found, expected, strict=True):
        assert_close(a, b, name)


@kernels
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frozen", ["", "x", "w_gate", "w_up"])
def test_pytorch_multiplies_where_that_is_predicted_to_be_faster(monkeypatch, recompute, frozen):
    # As on a GPU, with the products of the CPU in the place of cuBLAS's.
    op = importlib.import_module("fastattn.ops.gated_linear")
    monkeypatch.setattr(op, "choose_engine", lambda x: "auto")
    monkeypatch.setattr("fastattn.ops.core.products.GATED_COLUMNS", 24)
    tensors = inputs(2, 7)
    if frozen:
        tensors[frozen].requires_grad_(False)
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    dy = torch.randn(2, 7, 20, dtype=WIDEST, device=DEVICE)
    with count_launches() as launched:
        y = fastattn.gated_linear(**tensors, recompute=recompute)
        found = torch.autograd.grad(y, wanted, dy)
    expected = unfused(**tensors)
    assert_close(y, expected)
    for a, b in zip(found, torch.autograd.grad(expected, wanted, dy), strict=True):
        assert_close(a, b)
    fused = [name for name in launched if "gated_linear" in name]
    assert fused == (["gated_linear_forward_kernel"] if recompute else [])


@kernels
@pytest.mark.parametrize("k", [1, 24, 40])
@pytest.mark.parametrize("n", [1, 20, 48])
def test_weights_stored_as_k_by_n_give_the_same_bits(k, n):
    tensors = inputs(5, k=k, n=n)
    expected = outcome(fastattn.gated_linear, tensors)
    for names in (("w_gate", "w_up"), ("w_gate",), ("w_up",)):
        changed = dict(tensors)
        for name in names:
            changed[name] = tensors[name].detach().t().contiguous().t().requires_grad_()
        for a, b in zip(outcome(fastattn.gated_linear, changed), expected, strict=True):
            assert same_bits(a, b), names


@kernels
def test_halves_of_one_packed_weight_are_read_in_place(monkeypatch):
    from fastattn.kernels.matmul import gated_linear as launchers

    tensors = inputs(5)
    packed = torch.cat((tensors["w_gate"], tensors["w_up"]), 1).detach()
    halves = packed.chunk(2, 1)
    given = {}
    kernel = launchers.gated_linear_forward_kernel
    launch = kernel.launch
    monkeypatch.setattr(
        kernel, "launch", lambda *args, **named: given.update(named) or launch(*args, **named)
    )
    changed: dict[str, Any] = {**tensors, "w_gate": halves[0], "w_up": halves[1]}
    y = fastattn.gated_linear(**changed)
    assert [given["w_gate_view"].pointer.data_ptr(), given["w_up_view"].pointer.data_ptr()] == [
        half.data_ptr() for half in halves
    ]
    assert same_bits(y, fastattn.gated_linear(**tensors))


@kernels
def test_strides_that_32_bits_cannot_hold_give_the_same_bits(monkeypatch):
    from fastattn.kernels.matmul import gated_linear as launchers

    tensors = inputs(37, k=40)
    transposed: dict[str, Any] = {
        name: tensors[name].detach().t().contiguous().t().requires_grad_()
        for name in ("w_gate", "w_up")
    }
    cases: tuple[dict[str, Any], ...] = (tensors, {**tensors, **transposed})
    for case in cases:
        expected = outcome(fastattn.gated_linear, case)
        with monkeypatch.context() as patch:
            patch.setattr(launchers, "FAR", 1)
            found = outcome(fastattn.gated_linear, case)
        for a, b in zip(found, expected, strict=True):
            assert same_bits(a, b)


@kernels
@special_values
@every_activation
def test_nan_and_infinity_give_the_limits(activation):
    check_special_values(1.5, -1.5, 1e4, -1e4, 1e30, -1e30, activation=activation)


@kernels
@special_values
def test_gradients_at_the_clamps_are_those_of_torch():
    options = {"limit": 7.0, "alpha": 1.702, "up_offset": 1.0}
    check_special_values(8.0, -8.0, 7.0, -7.0, activation="silu", **options)


def check_special_values(*numbers: float, activation: str, **options: float) -> None:
    """With x one number, so that gate and up can be anything."""
    points = torch.tensor((0.0, math.nan, math.inf, -math.inf, *numbers), device=DEVICE)
    gate, up = (
        p.flatten()[:, None].to(WIDEST) for p in torch.meshgrid(points, points, indexing="ij")
    )
    x = torch.ones(1, 1, dtype=WIDEST, device=DEVICE)
    tensors = {"w_gate": gate.requires_grad_(), "w_up": up.requires_grad_()}
    function = partial(fastattn.gated_linear, x, activation=activation, **options)
    found = outcome(function, tensors)
    dy = torch.linspace(-1.0, 2.0, gate.numel(), dtype=WIDEST, device=DEVICE)[None]
    # y is a row of what the weights have as a column.
    expected = activation_values.gated(activation, gate.t(), up.t(), dy, **options)
    for name, a, b in zip(("y", "w_gate", "w_up"), found, expected, strict=True):
        activation_values.assert_values(name, a if name == "y" else a.t(), b)


@kernels
def test_only_wanted_gradients_cost_products(monkeypatch):
    module = importlib.import_module("fastattn.ops.gated_linear_function")
    calls = []

    def counted(function: Callable) -> Callable:
        return lambda *args, **total: calls.append(args) or function(*args, **total)

    for name in ("multiply_weight", "sum_over_rows", "_sum_of_rows"):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    for wanted, products in (("x", 2), ("w_gate", 1), ("w_up", 1), ("b_gate", 1), ("b_up", 1)):
        calls.clear()
        tensors = inputs(5)
        for name, tensor in tensors.items():
            tensor.requires_grad_(name == wanted)
        fastattn.gated_linear(**tensors).sum().backward()
        assert len(calls) == products, wanted


@kernels
def test_row_counts_share_a_configuration():
    from fastattn.kernels.matmul.gated_linear_config import gated_linear_config

    target = Target("cuda", 90, 32, multiprocessors=132, shared_memory=232448)
    for backward in (False, True):
        configs = {
            gated_linear_config(m, 11008, 4096, "bfloat16", "ieee", backward, target)
            for m in (1, 2, 3, 16, 17, 1000, 4096, 65_537, 1_000_000)
        }
        # Up to sixteen rows, and more.
        assert len(configs) == 2


@pytest.fixture
def two_ranks() -> Iterator[DeviceMesh]:
    """A mesh of two of which this process is the first; nothing can be communicated."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu" if DEVICE is None else DEVICE, (2,))
    torch.distributed.destroy_process_group()


def sharded_outcome(
    mesh: DeviceMesh, tensors: dict[str, Any], *, x: Any, rest: Any, dy: Any
) -> Any:
    """`outcome` with x, the parameters and dy in these placements; nothing may be communicated."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode

    placed: dict[str, Any] = {
        name: DTensor.from_local(tensor.detach(), mesh, [x if name == "x" else rest])
        for name, tensor in tensors.items()
    }
    for tensor in placed.values():
        tensor.requires_grad_()
    with CommDebugMode() as communication:
        y: Any = fastattn.gated_linear(**placed)
        shape = y.to_local().shape
        local = torch.linspace(-1.0, 2.0, shape.numel(), dtype=y.dtype, device=y.device)
        incoming = DTensor.from_local(local.reshape(shape), mesh, [dy])
        found = [y, *torch.autograd.grad(y, list(placed.values()), incoming)]
    assert communication.get_total_counts() == 0
    return found


@kernels
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_of_rows_stay_where_they_are(two_ranks, dim):
    from torch.distributed.tensor import Replicate, Shard

    tensors = inputs(4, 6)
    rows = Shard(dim)
    found = sharded_outcome(two_ranks, tensors, x=rows, rest=Replicate(), dy=rows)
    assert [tensor.placements for tensor in found[:2]] == [(rows,), (rows,)]
    assert all(tensor.placements[0].is_partial() for tensor in found[2:])
    for a, b in zip(found, outcome(fastattn.gated_linear, tensors), strict=True):
        assert same_bits(a.to_local(), b)


@kernels
def test_weights_sharded_over_features_give_shards_of_the_output(two_ranks, monkeypatch):
    from torch.distributed.tensor import Replicate, Shard

    # As on a GPU: the products of the backward are torch's, which know how to sum over shards.
    module = importlib.import_module("fastattn.ops.gated_linear")
    monkeypatch.setattr(module, "choose_engine", lambda x: "auto")
    tensors = inputs(4, 6)
    found = sharded_outcome(two_ranks, tensors, x=Replicate(), rest=Shard(0), dy=Shard(2))
    assert found[0].placements == (Shard(2),)
    assert found[1].placements[0].is_partial()
    assert all(tensor.placements == (Shard(0),) for tensor in found[2:])
    expected = outcome(fastattn.gated_linear, tensors)
    for name, a, b in zip(("y", *NAMES), found, expected, strict=True):
        assert_close(a.to_local(), b, name)


def test_bad_arguments_are_named():
    x, w, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    gated: Any = fastattn.gated_linear
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        gated([1.0], w, w)
    with pytest.raises(TypeError, match=r"x must be float16.*int64"):
        gated(torch.arange(4), w, w)
    with pytest.raises(ValueError, match="x must have at least one dimension"):
        gated(torch.tensor(1.0), w, w)
    with pytest.raises(ValueError, match=r"w_gate must have shape \(N, 4\).*got \(4, 5\)"):
        gated(x, w.t(), w)
    with pytest.raises(ValueError, match=r"w_gate must have shape \(N, 4\).*got \(4,\)"):
        gated(x, w[0], w)
    with pytest.raises(ValueError, match=r"w_up must have shape \(5, 4\), got \(4, 4\)"):
        gated(x, w, w[:4])
    with pytest.raises(TypeError, match=r"w_up must have x's dtype torch\.float32, got.*float16"):
        gated(x, w, w.half())
    with pytest.raises(TypeError, match=r"w_gate is torch\.float64 beside torch\.float32"):
        gated(x, w.double(), w)
    with pytest.raises(ValueError, match=r"b_gate must have shape \(5,\), got \(4,\)"):
        gated(x, w, w, b[:4])
    with pytest.raises(TypeError, match="b_up must be a tensor, got bool"):
        gated(x, w, w, b, True)
    with pytest.raises(ValueError, match="w_gate must be on cpu, got meta"):
        gated(x, w.to("meta"), w)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "swish"}, "activation must be one of silu, gelu, .* got 'swish'"),
        ({"activation": "relu", "limit": 1.0}, "belong to the activation 'silu', got 'relu'"),
        ({"activation": "gelu", "alpha": 2.0}, "belong to the activation 'silu', got 'gelu'"),
        ({"limit": 0.0}, "limit must be positive, got 0.0"),
        ({"limit": math.nan}, "limit must be positive, got nan"),
        ({"alpha": math.inf}, "alpha must be finite, got inf"),
        ({"up_offset": math.nan}, "up_offset must be finite, got nan"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=f"gated_linear: .*{message}"):
        fastattn.gated_linear(torch.randn(3, 4), torch.randn(5, 4), torch.randn(5, 4), **options)


def test_autocast_casts_what_is_multiplied():
    tensors = {name: tensor.float() for name, tensor in inputs(5).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16), fastattn.backend("reference"):
        y = fastattn.gated_linear(**{name: tensor.cpu() for name, tensor in tensors.items()})
    assert y.dtype is torch.bfloat16
