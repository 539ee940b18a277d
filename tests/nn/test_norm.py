"""fastattn.nn.LayerNorm and RMSNorm in the places of torch's own."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastattn.nn
from fastattn.ops.core.backends import use_triton
from support import DEVICE, same_bits

CONSTRUCTORS = [
    ("LayerNorm", (16,), {}),
    ("LayerNorm", ((4, 6),), {"eps": 1e-3}),
    ("LayerNorm", ([16],), {"bias": False}),
    ("LayerNorm", (16,), {"elementwise_affine": False}),
    ("LayerNorm", (16, 1e-6, True, False), {}),
    ("RMSNorm", (16,), {}),
    ("RMSNorm", ((4, 6),), {"eps": 1e-3}),
    ("RMSNorm", (torch.Size([16]),), {"elementwise_affine": False}),
    ("RMSNorm", (16, 1e-6, True), {"dtype": torch.float64}),
]
every_constructor = pytest.mark.parametrize(
    ("name", "positional", "named"), CONSTRUCTORS, ids=lambda value: str(value)
)
both_names = pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
both_backends = pytest.mark.parametrize("device", DEVICES)


def pair(name: str, *positional: Any, **named: Any) -> tuple[Any, Any]:
    """Our module and torch's, with the same random parameters."""
    ours = getattr(fastattn.nn, name)(*positional, **named)
    theirs = getattr(nn, name)(*positional, **named)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@every_constructor
def test_constructor_repr_and_state_dict(name, positional, named):
    ours, theirs = pair(name, *positional, **named)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()}


@both_backends
@every_constructor
def test_outputs_and_gradients_are_those_of_torch(name, positional, named, device):
    ours, theirs = (module.to(device) for module in pair(name, *positional, **named))
    dtype = named.get("dtype", torch.float32)
    x = torch.randn(3, 5, *ours.normalized_shape, dtype=dtype, device=device)
    dy = torch.randn_like(x)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], dy)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@both_backends
@both_names
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_move_between_dtypes(name, dtype, device):
    ours, theirs = (module.to(device=device, dtype=dtype) for module in pair(name, 64))
    x = torch.randn(40, 64, device=device).to(dtype)
    y = ours(x)
    assert y.dtype is dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y, theirs(x), rtol=2 * unit, atol=2 * unit)
    # Parameters may stay in float32, which torch takes on some devices only.
    assert ours.float()(x).dtype is dtype


@both_names
def test_deepcopy_and_pickle(name):
    ours, _ = pair(name, (4, 6), eps=1e-3)
    x = torch.randn(3, 4, 6)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours)
        assert repr(copied) == repr(ours)
        assert same_bits(copied(x), ours(x))
        with torch.no_grad():
            copied.weight.zero_()
        assert ours.weight.all()


@both_names
def test_train_and_eval_are_alike(name):
    ours, _ = pair(name, 8)
    x = torch.randn(3, 8)
    assert same_bits(ours.train()(x), ours.eval()(x))


@both_backends
@both_names
def test_a_wrong_width_is_refused(name, device):
    x = torch.randn(3, 7, device=device)
    by_kernels: Any = (ValueError, r"normalized_shape .*\(8,\).*\(3, 7\)")
    error, message = by_kernels if use_triton(x) else (RuntimeError, r"\[8\].*\[3, 7\]")
    with pytest.raises(error, match=message):
        getattr(fastattn.nn, name)(8, device=device)(x)


@both_backends
@both_names
def test_autocast_keeps_the_dtype_of_the_input(name, device):
    ours, _ = pair(name, 16)
    ours.to(device)
    x = torch.randn(4, 16, device=device)
    plain = ours(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert same_bits(ours(x), plain)
        assert ours(x.bfloat16()).dtype is torch.bfloat16


@pytest.mark.kernels
@both_names
def test_fullgraph_compile(name):
    ours, theirs = (module.to(DEVICE) for module in pair(name, (4, 6)))
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 4, 6, device=DEVICE, requires_grad=True)
    y = compiled(x)
    assert same_bits(y, ours(x))
    gradients = torch.autograd.grad(y.square().sum(), [x, *ours.parameters()])
    expected = torch.autograd.grad(theirs(x).square().sum(), [x, *theirs.parameters()])
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
def test_activation_checkpoint():
    model = small_model(fastattn.nn).to(DEVICE)
    x = torch.randn(6, 12, device=DEVICE, requires_grad=True)
    wanted = [x, *model.parameters()]
    plain = torch.autograd.grad(model(x).square().sum(), wanted)
    y = checkpoint(model, x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(y.square().sum(), wanted), plain, strict=True):
        assert same_bits(a, b)


def small_model(modules: Any) -> nn.Module:
    """A network with both norms, of `modules`' classes; the same parameters every time."""
    torch.manual_seed(4)
    return nn.Sequential(
        modules.LayerNorm(12),
        modules.Linear(12, 32),
        modules.GELU(),
        modules.RMSNorm(32, eps=1e-6),
        modules.Linear(32, 3),
    )


def losses(model: nn.Module, batches: list[torch.Tensor], steps: Callable) -> list[float]:
    """The loss of each batch while the model trains on them; `steps` does the backward."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    found = []
    for batch in batches:
        optimizer.zero_grad()
        found.append(steps(model, batch))
        optimizer.step()
    return found


def one_step(model: nn.Module, batch: torch.Tensor) -> float:
    loss = (model(batch) - batch[:, :3].sin()).square().mean()
    loss.backward()
    return loss.item()


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(16, 12, generator=generator).to(DEVICE or "cpu") for _ in range(count)]


@pytest.mark.kernels
def test_training_follows_torch():
    ours = losses(small_model(fastattn.nn).to(DEVICE), batches(10), one_step)
    theirs = losses(small_model(nn).to(DEVICE), batches(10), one_step)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < 0.7 * ours[0]


@pytest.mark.kernels
def test_accumulated_gradients_are_those_of_one_batch():
    model = small_model(fastattn.nn).to(DEVICE)
    (batch,) = batches(1)
    one_step(model, batch)
    whole = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    for half in batch.chunk(2):
        ((model(half) - half[:, :3].sin()).square().mean() / 2).backward()
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.kernels
def test_gradient_scaler_skips_a_step_that_overflows():
    norm = fastattn.nn.LayerNorm(16, device=DEVICE)
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    # The second scale still fits the gradients into float16, the first does not.
    scaler = torch.amp.GradScaler(str(DEVICE), init_scale=2.0**16, backoff_factor=2.0**-10)
    x = torch.randn(32, 16, device=DEVICE).half()
    before = norm.weight.detach().clone()
    for scale, changes in ((2.0**16, False), (2.0**6, True)):
        assert scaler.get_scale() == scale
        optimizer.zero_grad()
        loss = (norm(x) * 8.0).sum()
        assert loss.dtype is torch.float16
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert norm.weight.isfinite().all()
        assert (not torch.equal(norm.weight, before)) is changes


@both_names
def test_names_that_fastattn_has_not_are_those_of_torch(name):
    assert fastattn.nn.Conv1d is nn.Conv1d
    assert fastattn.nn.functional is nn.functional
    assert fastattn.nn.Module is nn.Module
    assert hasattr(fastattn.nn, name)
    assert getattr(fastattn.nn, name) is not getattr(nn, name)
    assert {"LayerNorm", "RMSNorm", "Dropout"} <= set(dir(fastattn.nn))
    assert not hasattr(fastattn.nn, "NoSuchModule")
    with pytest.raises(AttributeError, match="NoSuchModule"):
        _ = fastattn.nn.NoSuchModule
