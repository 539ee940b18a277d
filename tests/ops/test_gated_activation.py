"""Gated activations: packing, clamping, extreme numbers, and agreement with other definitions."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import activation_values
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fastattn
from fastattn import reference
from fastattn.ops.core.backends import Backend
from support import DEVICE, WIDEST, same_bits

kernels = pytest.mark.kernels

GATED: dict[str, tuple[Callable, Callable]] = {
    "swiglu": (fastattn.swiglu, F.silu),
    "geglu": (fastattn.geglu, F.gelu),
    "geglu tanh": (
        partial(fastattn.geglu, approximate="tanh"),
        partial(F.gelu, approximate="tanh"),
    ),
    "reglu": (fastattn.reglu, F.relu),
    "glu": (fastattn.glu, torch.sigmoid),
}
ACTIVATIONS = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu tanh": "gelu_tanh",
    "reglu": "relu",
    "glu": "sigmoid",
}
every_activation = pytest.mark.parametrize(("gated", "activation"), GATED.values(), ids=GATED)

GPT_OSS = {"limit": 7.0, "alpha": 1.702, "up_offset": 1.0}


def leaf(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=DEVICE, requires_grad=True)


def outcome(
    function: Callable, gate: torch.Tensor, up: torch.Tensor | None, dy: torch.Tensor, **options
) -> list[torch.Tensor]:
    """The output and the gradients of every input."""
    inputs = [x.detach().clone().requires_grad_() for x in (gate, up) if x is not None]
    y = function(*inputs, **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


@kernels
@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cols", [1, 48, 131, 1500])
@pytest.mark.slow
def test_packed_forms_have_the_bits_of_the_separate_one(gated, activation, dtype, cols):
    gate, up, dy = torch.randn(3, 5, cols, device=DEVICE).to(dtype)
    y, dgate, dup = outcome(gated, gate, up, dy)
    halves = outcome(gated, torch.cat((gate, up), -1), None, dy)
    interleaved = outcome(
        gated, torch.stack((gate, up), -1).flatten(-2), None, dy, interleaved=True
    )
    assert same_bits(halves[0], y)
    assert same_bits(halves[1], torch.cat((dgate, dup), -1))
    assert same_bits(interleaved[0], y)
    assert same_bits(interleaved[1], torch.stack((dgate, dup), -1).flatten(-2))


@every_activation
def test_reference_is_the_formula_of_torch(gated, activation):
    gate, up = torch.randn(2, 7, 10, dtype=torch.float64)
    with fastattn.backend("reference"):
        torch.testing.assert_close(gated(gate, up), activation(gate) * up, rtol=0, atol=0)


def test_glu_is_that_of_torch_with_the_halves_exchanged():
    x = torch.randn(7, 10, dtype=torch.float64)
    first, second = x.chunk(2, -1)
    torch.testing.assert_close(fastattn.glu(x), F.glu(torch.cat((second, first), -1)))


def gpt_oss() -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation of Hugging Face's gpt-oss experts."""
    pytest.importorskip("transformers")
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=4, intermediate_size=4, num_local_experts=1)
    return GptOssExperts(config)._apply_gate


@kernels
def test_kernels_agree_with_gpt_oss():
    check_gpt_oss("triton")


def test_reference_agrees_with_gpt_oss():
    check_gpt_oss("reference")


def check_gpt_oss(backend: Backend) -> None:
    theirs = gpt_oss()
    packed = (8.0 * torch.randn(9, 62, device=DEVICE or "cpu")).to(WIDEST)
    # All three regions of a clamp are met.
    assert (packed > 7.0).any()
    assert (packed < -7.0).any()
    dy = torch.randn(9, 31, device=packed.device).to(WIDEST)
    with fastattn.backend(backend):
        ours = outcome(fastattn.swiglu, packed, None, dy, interleaved=True, **GPT_OSS)
    for a, b in zip(ours, outcome(theirs, packed, None, dy), strict=True):
        tolerance = 1e-13 if WIDEST is torch.float64 else 1e-5
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@kernels
def test_gradients_at_the_clamps_are_those_of_torch():
    points = (-8.0, -7.0, 0.0, 7.0, 8.0, math.nan, math.inf, -math.inf)
    gate, up = (x.flatten() for x in torch.meshgrid(leaf(*points), leaf(*points), indexing="ij"))
    compare_special_values("swiglu", gate, up, **GPT_OSS)


@kernels
@pytest.mark.parametrize("counts", [True, False])
def test_the_border_has_a_gradient_where_torch_gives_it_one(counts, monkeypatch):
    from fastattn.kernels import gated_activation

    monkeypatch.setattr(gated_activation, "border_has_gradient", lambda: counts)
    gated_activation.make_formula.cache_clear()
    try:
        gate, up = leaf(7.0, 7.0, 6.5, 7.5), leaf(7.0, -7.0, 6.5, 7.5)
        _, dgate, dup = outcome(partial(fastattn.swiglu, **GPT_OSS), gate, up, torch.ones_like(up))
    finally:
        gated_activation.make_formula.cache_clear()
    expected = torch.tensor([counts, counts, True, False], device=gate.device)
    assert torch.equal(dgate != 0.0, expected)
    assert torch.equal(dup != 0.0, expected)


@kernels
@pytest.mark.parametrize("name", GATED)
def test_nan_and_infinity_give_the_limits(name):
    points = (0.0, 1.5, -1.5, math.nan, math.inf, -math.inf, 1e30, -1e30, 1e4, -1e4)
    gate, up = (x.flatten() for x in torch.meshgrid(leaf(*points), leaf(*points), indexing="ij"))
    compare_special_values(name, gate, up)


def compare_special_values(
    name: str, gate: torch.Tensor, up: torch.Tensor, **options: float
) -> None:
    dy = torch.linspace(0.5, 2.0, gate.numel(), device=gate.device)
    found = outcome(partial(GATED[name][0], **options), gate, up, dy)
    expected = activation_values.gated(ACTIVATIONS[name], gate, up, dy, **options)
    for part, a, b in zip(("y", "dgate", "dup"), found, expected, strict=True):
        activation_values.assert_values(part, a, b)


@kernels
def test_tails_of_the_sigmoid_keep_their_digits():
    gate = leaf(-80.0, -30.0, 30.0, 80.0)
    dy = torch.ones_like(gate)
    found = outcome(fastattn.glu, gate, torch.ones_like(gate), dy)[1]
    expected = torch.exp(-gate.detach().abs().double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0.0)


@kernels
@every_activation
def test_halves_of_one_product_are_read_in_place(gated, activation, monkeypatch):
    from fastattn.kernels import gated_activation

    seen = []

    def flatten_rows(x: torch.Tensor, cols: int) -> tuple[torch.Tensor, int]:
        rows, stride = original(x, cols)
        seen.append(rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr())
        return rows, stride

    original = gated_activation.flatten_rows
    monkeypatch.setattr(gated_activation, "flatten_rows", flatten_rows)
    product = torch.randn(3, 5, 64, device=DEVICE, requires_grad=True)
    gated(*product.chunk(2, -1)).sum().backward()
    # gate and up forward; backward also dy, which is expanded from one number and copied.
    assert len(seen) == 5
    assert seen.count(False) == 1


@kernels
@pytest.mark.parametrize("interleaved", [False, True])
def test_packed_form_compiles_without_graph_breaks(interleaved):
    torch.compiler.reset()
    gated = partial(fastattn.swiglu, interleaved=interleaved, **GPT_OSS)
    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    packed, dy = torch.randn(3, 40, device=DEVICE), torch.randn(3, 20, device=DEVICE)
    for a, b in zip(
        outcome(compiled, packed, None, dy), outcome(gated, packed, None, dy), strict=True
    ):
        assert same_bits(a, b)


@pytest.fixture
def two_ranks() -> Iterator[DeviceMesh]:
    """A mesh of two of which this process is the first; nothing can be communicated."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu" if DEVICE is None else DEVICE, (2,))
    torch.distributed.destroy_process_group()


@kernels
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_shards_of_any_dimension_stay_where_they_are(two_ranks, dim):
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    gate, up, dy = torch.randn(3, 4, 6, 8, device=DEVICE)
    expected = outcome(fastattn.swiglu, gate, up, dy)
    shards = [DTensor.from_local(x, two_ranks, [Shard(dim)]) for x in (gate, up, dy)]
    with CommDebugMode() as communication:
        found = outcome(fastattn.swiglu, *shards)
    assert communication.get_total_counts() == 0
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a, DTensor)
        assert a.placements == (Shard(dim),)
        assert same_bits(a.to_local(), b)


@every_activation
def test_bad_arguments_are_named(gated, activation):
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match="gate must be a tensor"):
        gated([1.0, 2.0])
    with pytest.raises(TypeError, match=r"gate must be float16.*int64"):
        gated(torch.arange(4))
    with pytest.raises(ValueError, match="gate must have at least one dimension"):
        gated(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"last dimension must be even, got shape \(3, 5\)"):
        gated(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"up must have shape \(3, 4\), got \(4,\)"):
        gated(x, torch.randn(4))
    with pytest.raises(TypeError, match=r"up must have gate's dtype torch\.float32"):
        gated(x, x.half())
    with pytest.raises(ValueError, match=r"interleaved .* but up is given"):
        gated(x, x, interleaved=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("limit", 0.0),
        ("limit", -1.0),
        ("limit", math.nan),
        ("alpha", math.inf),
        ("up_offset", math.nan),
    ],
)
def test_bad_numbers_are_named(option, value):
    with pytest.raises(ValueError, match=f"swiglu: {option} must be"):
        fastattn.swiglu(torch.randn(3, 4), **{option: value})


def test_bad_approximation_is_named():
    with pytest.raises(ValueError, match="approximate must be one of none, tanh, got 'erf'"):
        fastattn.geglu(torch.randn(3, 4), approximate="erf")  # type: ignore[arg-type]


def test_sixteen_bits_are_rounded_once():
    gate, up = torch.randn(2, 1000).to(torch.bfloat16)
    exact = F.silu(gate.double()) * up.double()
    assert torch.equal(reference.swiglu(gate, up), exact.to(torch.bfloat16))
