"""softmax and log_softmax: torch's values at any width, causal and boolean masks, empty rows."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastattn
import fastattn.functional
import fastattn.nn
from support import DEVICE, WIDEST

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
both_backends = pytest.mark.parametrize("device", DEVICES)
both_ops = pytest.mark.parametrize("name", ["softmax", "log_softmax"])


def assert_as_torch(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


def random(*shape: int, device: Any, dtype: torch.dtype = WIDEST) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)


@pytest.mark.kernels
@both_ops
@pytest.mark.parametrize("cols", [1, 15, 16, 17, 8192, 8193, 16384, 16385, 70_001])
def test_every_width(name, cols):
    x = random(3, cols, device=DEVICE)
    ours, theirs = getattr(fastattn, name)(x), getattr(F, name)(x, -1)
    assert_as_torch(ours, theirs)
    dy = torch.randn_like(ours)
    assert_as_torch(*(torch.autograd.grad(y, x, dy)[0] for y in (ours, theirs)))


@both_backends
@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (2, 3, 4, 6), (2, 20_000)], ids=str)
def test_causal_is_aligned_to_the_last_row_and_column(device, shape):
    x = random(*shape, device=device)
    y = fastattn.softmax(x, causal=True, scale=0.5)
    rows, cols = shape[-2:]
    for row in range(rows):
        seen = max(0, row + cols - rows + 1)
        assert_as_torch(y[..., row, :seen], torch.softmax(x[..., row, :seen] * 0.5, -1))
        assert not y[..., row, seen:].any()
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.isfinite().all()
    assert not gradient.masked_fill(y != 0.0, 0.0).any()


@both_backends
@pytest.mark.parametrize(
    "mask_shape",
    [(6,), (4, 6), (4, 1), (1, 1), (3, 4, 6), (1, 4, 6), (2, 1, 1, 6), (2, 3, 4, 6), (2, 3, 1, 1)],
    ids=str,
)
@pytest.mark.parametrize("causal", [False, True])
def test_masks_broadcast(device, mask_shape, causal):
    x = random(2, 3, 4, 6, device=device)
    mask = torch.rand(mask_shape, device=device) > 0.4
    kept = mask.expand(x.shape)
    if causal:
        kept = kept & torch.ones(4, 6, dtype=torch.bool, device=device).tril(2)
    y = fastattn.softmax(x, mask=mask, causal=causal)
    some = kept.any(-1)
    assert_as_torch(y[some], torch.softmax(x.masked_fill(~kept, -math.inf), -1)[some])
    assert not y[~some].any()
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert not gradient[~some].any()
    assert not gradient[~kept].any()


@pytest.mark.kernels
def test_a_mask_is_read_by_strides():
    x = random(2, 3, 4, 6, device=DEVICE)
    wide = torch.rand(6, 8, device=DEVICE) > 0.4
    mask = wide.t()[::2]
    assert_as_torch(fastattn.softmax(x, mask=mask), fastattn.softmax(x, mask=mask.contiguous()))


@both_backends
def test_what_is_masked_does_not_show(device):
    x = random(4, 6, device=device)
    mask = torch.ones(4, 6, dtype=torch.bool, device=device)
    mask[1, 2:] = False
    expected = fastattn.softmax(x, mask=mask)
    with torch.no_grad():
        x[1, 2], x[1, 3], x[1, 4] = math.nan, math.inf, -math.inf
    found = fastattn.softmax(x, mask=mask)
    assert_as_torch(found, expected)
    assert torch.autograd.grad(found.square().sum(), x)[0].isfinite().all()


@both_backends
def test_rows_of_nothing_but_minus_infinity(device):
    x = torch.full((3, 6), -math.inf, device=device)
    assert fastattn.softmax(x).isnan().all()
    assert fastattn.log_softmax(x).isnan().all()
    assert not fastattn.softmax(x, mask=torch.ones_like(x, dtype=torch.bool)).any()


@both_backends
@both_ops
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        (shape, dim)
        for shape in ((5,), (4, 6), (3, 4, 6))
        for dim in (0, 1, -1, None)
        if dim is None or dim < len(shape)
    ],
    ids=str,
)
def test_functional_and_modules_along_any_dimension(device, name, shape, dim):
    x = random(*shape, device=device)
    module = {"softmax": "Softmax", "log_softmax": "LogSoftmax"}[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Implicit dimension choice")
        theirs = getattr(F, name)(x, dim)
        results = getattr(fastattn.functional, name)(x, dim), getattr(fastattn.nn, module)(dim)(x)
    (expected,) = torch.autograd.grad(theirs.cos().sum(), x)
    for ours in results:
        assert_as_torch(ours, theirs)
        assert_as_torch(torch.autograd.grad(ours.cos().sum(), x)[0], expected)


@both_backends
@both_ops
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float64])
def test_functional_dtype_is_that_of_torch(device, name, given, wanted):
    x = (torch.randn(4, 6, device=device) * 3).to(given)
    ours = getattr(fastattn.functional, name)(x, -1, dtype=wanted)
    theirs = getattr(F, name)(x, -1, dtype=wanted)
    assert ours.dtype is wanted
    # torch's own log_softmax of bfloat16 is no better than that on a CPU.
    tolerance = 2.0**-6 if wanted is torch.bfloat16 else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@both_backends
@both_ops
def test_a_scalar(device, name):
    x = torch.tensor(3.0, device=device)
    assert_as_torch(getattr(fastattn.functional, name)(x, 0), getattr(F, name)(x, 0))


@both_ops
def test_modules_stand_in_for_torchs(name):
    module = {"softmax": "Softmax", "log_softmax": "LogSoftmax"}[name]
    ours, theirs = getattr(fastattn.nn, module)(dim=1), getattr(torch.nn, module)(dim=1)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)


X = torch.zeros(4, 5)
MASK = torch.ones(4, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": MASK}, TypeError, "x must be float16"),
        ({"x": torch.zeros(())}, ValueError, "x must have at least one dimension"),
        ({"x": X[0], "causal": True}, ValueError, "x must have at least two dimensions"),
        ({"mask": X}, TypeError, "mask must be a tensor of booleans, got torch.float32"),
        ({"mask": True}, TypeError, "mask must be a tensor of booleans, got bool"),
        ({"mask": MASK[:3]}, ValueError, r"mask must broadcast to \(4, 5\), got \(3, 5\)"),
        ({"mask": MASK[None]}, ValueError, "mask must broadcast"),
        ({"mask": MASK.to("meta")}, ValueError, "mask must be on cpu"),
        ({"dtype": torch.int64}, TypeError, "dtype must be float16"),
        ({"dtype": torch.float64}, TypeError, "float64 mixes with no other dtype"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        fastattn.softmax(**{"x": X, **arguments})
