"""Cross entropy: torch's values in every corner, no harm from bad targets, gradients in place."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastattn
import fastattn.functional
from support import DEVICE, WIDEST, same_bits

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
both_backends = pytest.mark.parametrize("device", DEVICES)

ROWS, CLASSES = 7, 19


def logits_and_target(device: Any, shape: tuple = (ROWS, CLASSES)) -> tuple:
    logits = torch.randn(shape, dtype=WIDEST, device=device, requires_grad=True)
    return logits, torch.randint(shape[-1], shape[:-1], device=device)


def assert_as_torch(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_every_combination_is_torchs(device, reduction, label_smoothing, weighted, ignore_index):
    logits, target = logits_and_target(device)
    target[::3] = ignore_index
    weight = torch.rand(CLASSES, dtype=WIDEST, device=device) if weighted else None
    functions: list[Any] = [F.cross_entropy, fastattn.cross_entropy]
    results = []
    for function in functions:
        loss = function(
            logits,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        results.append((loss, *torch.autograd.grad(loss.cos().sum(), logits)))
    for theirs, ours in zip(*results, strict=True):
        assert_as_torch(ours, theirs)


@both_backends
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_all_rows_ignored(device, label_smoothing, z_loss):
    logits, _ = logits_and_target(device)
    target = torch.full((ROWS,), -100, device=device)
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        loss = fastattn.cross_entropy(
            logits, target, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss
        )
        assert loss.item() == pytest.approx(expected, nan_ok=True)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(gradient, torch.zeros_like(gradient))


@both_backends
def test_no_rows(device):
    logits, target = logits_and_target(device, (0, CLASSES))
    for reduction in ("mean", "sum", "none"):
        ours = fastattn.cross_entropy(logits, target, reduction=reduction)
        theirs = F.cross_entropy(logits, target, reduction=reduction)
        assert_as_torch(ours, theirs)
        assert torch.autograd.grad(ours.sum(), logits)[0].shape == (0, CLASSES)


@pytest.mark.kernels
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=str)
def test_logits_of_ignored_rows_do_not_show(garbage, options):
    logits, target = logits_and_target(DEVICE)
    target[2] = -100
    expected = fastattn.cross_entropy(logits, target, **options)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    with torch.no_grad():
        logits[2] = garbage
    found = fastattn.cross_entropy(logits, target, **options)
    assert same_bits(found, expected)
    assert same_bits(torch.autograd.grad(found, logits)[0], expected_gradient)


@both_backends
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_infinite_logits_are_torchs(device, label_smoothing):
    logits, target = logits_and_target(device)
    with torch.no_grad():
        logits[0, :] = -math.inf
        logits[1, target[1]] = -math.inf
        logits[2, (target[2] + 1) % CLASSES] = -math.inf
        logits[3, target[3]] = math.inf
    options: Any = {"reduction": "none", "label_smoothing": label_smoothing}
    ours = fastattn.cross_entropy(logits, target, **options)
    theirs = F.cross_entropy(logits, target, **options)
    assert_as_torch(ours, theirs)
    (our_gradient,) = torch.autograd.grad(ours.sum(), logits)
    (their_gradient,) = torch.autograd.grad(theirs.sum(), logits)
    assert_as_torch(our_gradient, their_gradient)


@pytest.mark.kernels
@pytest.mark.parametrize("wrong", [-1, CLASSES, 2**40, -(2**62)])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_target_out_of_range_makes_its_own_row_nan(wrong, weighted):
    logits, target = logits_and_target(DEVICE)
    target[4] = wrong
    weight = torch.rand(CLASSES, device=DEVICE) if weighted else None
    loss = fastattn.cross_entropy(logits, target, weight=weight, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    other = torch.arange(ROWS, device=DEVICE) != 4
    assert loss[4].isnan()
    assert loss[other].isfinite().all()
    assert gradient[4].isnan().all()
    assert gradient[other].isfinite().all()
    assert fastattn.cross_entropy(logits, target, weight=weight).isnan()


def test_a_target_out_of_range_raises_on_the_reference():
    logits, target = logits_and_target("cpu")
    for wrong in (-1, CLASSES):
        target[4] = wrong
        with (
            fastattn.backend("reference"),
            pytest.raises(ValueError, match=rf"target must be in \[0, 19\).*got {wrong}"),
        ):
            fastattn.cross_entropy(logits, target)


@both_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_probabilities(device, reduction):
    logits, _ = logits_and_target(device)
    target = torch.rand_like(logits).softmax(-1).requires_grad_()
    weight = torch.rand(CLASSES, dtype=WIDEST, device=device)
    options: Any = {"weight": weight, "reduction": reduction, "label_smoothing": 0.1}
    ours = fastattn.cross_entropy(logits, target, **options)
    theirs = F.cross_entropy(logits, target, **options)
    assert_as_torch(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (logits, target)),
        torch.autograd.grad(theirs.sum(), (logits, target)),
        strict=True,
    ):
        assert_as_torch(a, b)


@both_backends
def test_z_loss_softcap_and_lse_by_their_definitions(device):
    logits, target = logits_and_target(device)
    target[1] = -100
    weight = torch.rand(CLASSES, dtype=WIDEST, device=device)
    capped = 2.0 * torch.tanh(logits / 2.0)
    lse = capped.logsumexp(-1)
    row_weight = weight[target.clamp(min=0)] * (target != -100)
    z_term = (row_weight * 0.3 * lse.square()).sum() / row_weight.sum()
    expected = F.cross_entropy(capped, target, weight) + z_term
    loss, found_lse = fastattn.cross_entropy(
        logits, target, weight=weight, z_loss=0.3, softcap=2.0, return_lse=True
    )
    assert_as_torch(loss, expected)
    assert_as_torch(found_lse, lse)
    assert_as_torch(
        torch.autograd.grad(loss + found_lse.sum(), logits)[0],
        torch.autograd.grad(expected + lse.sum(), logits)[0],
    )


@both_backends
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [0.0625, 1.7])
def test_logits_are_scaled_before_they_are_capped(device, softcap, scale):
    logits, target = logits_and_target(device)
    target[1] = -100
    weight = torch.rand(CLASSES, dtype=WIDEST, device=device)
    options: Any = {"weight": weight, "label_smoothing": 0.1, "z_loss": 0.3, "return_lse": True}
    results = []
    for given, more in (
        (logits * scale, {"softcap": softcap}),
        (logits, {"softcap": softcap, "logit_scale": scale}),
    ):
        loss, lse = fastattn.cross_entropy(given, target, **options, **more)
        results.append((loss, lse, *torch.autograd.grad(loss + lse.cos().sum(), logits)))
    for expected, found in zip(*results, strict=True):
        assert_as_torch(found, expected)


@both_backends
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_ignored_rows_do_not_show_in_scaled_logits(garbage, device):
    logits, target = logits_and_target(device)
    target[2] = -100
    results = []
    for value in (0.0, garbage):
        with torch.no_grad():
            logits[2] = value
        loss = fastattn.cross_entropy(logits, target, logit_scale=0.3, label_smoothing=0.1)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    for expected, found in zip(*results, strict=True):
        assert same_bits(found, expected)


@both_backends
def test_a_scale_of_one_changes_no_bit(device):
    logits, target = (x.float() if x.is_floating_point() else x for x in logits_and_target(device))
    plain, scaled = (
        fastattn.cross_entropy(logits, target, z_loss=0.1, return_lse=True, **more)
        for more in ({}, {"logit_scale": 1})
    )
    for a, b in zip(plain, scaled, strict=True):
        assert same_bits(a, b)


@both_backends
def test_half_precision_logits_are_scaled_in_float32(device):
    # In float16 the scaled logits would overflow.
    logits = torch.full((2, 5), 40000.0, device=device, dtype=torch.float16)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    loss, lse = fastattn.cross_entropy(logits, target, logit_scale=8.0, return_lse=True)
    assert loss.item() == pytest.approx(math.log(5.0), abs=0.05)
    assert lse.tolist() == pytest.approx([320000.0 + math.log(5.0)] * 2, rel=1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lse_is_float32_and_the_loss_of_the_logits_dtype(dtype):
    logits = torch.randn(3, 50, device=DEVICE, dtype=dtype)
    target = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    loss, lse = fastattn.cross_entropy(logits, target, return_lse=True)
    assert (loss.dtype, loss.shape) == (dtype, ())
    assert (lse.dtype, lse.shape) == (torch.float32, (3,))


@pytest.mark.kernels
@pytest.mark.parametrize("classes", [4095, 4096, 4097, 262_144, 262_147])
def test_wide_vocabularies(classes):
    logits, target = logits_and_target(DEVICE, (2, classes))
    ours, theirs = (
        function(logits, target) for function in (fastattn.cross_entropy, F.cross_entropy)
    )
    assert_as_torch(ours, theirs)
    assert_as_torch(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


@pytest.mark.kernels
def test_inplace_backward_takes_the_memory_of_the_logits():
    leaf, target = logits_and_target(DEVICE)
    target[1] = -100
    (expected,) = torch.autograd.grad(fastattn.cross_entropy(leaf * 2.0, target), leaf)
    logits = leaf * 2.0
    kept: list[torch.Tensor] = []
    logits.register_hook(lambda gradient: kept.append(gradient))
    version = logits._version
    loss = fastattn.cross_entropy(logits, target, inplace_backward=True)
    assert logits._version == version
    (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert same_bits(found, expected)
    assert kept[0].data_ptr() == logits.data_ptr()
    assert logits._version > version
    with pytest.raises(RuntimeError, match="there can be no second backward"):
        torch.autograd.grad(loss, leaf)


@pytest.mark.kernels
def test_others_who_saved_the_logits_notice_an_inplace_backward():
    leaf, target = logits_and_target(DEVICE)
    logits = leaf * 2.0
    squares = logits.square().sum()
    fastattn.cross_entropy(logits, target, inplace_backward=True).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@pytest.mark.kernels
def test_inplace_backward_is_refused_where_it_would_do_harm():
    leaf, target = logits_and_target(DEVICE)
    with pytest.raises(ValueError, match="leaf"):
        fastattn.cross_entropy(leaf, target, inplace_backward=True)
    turned = (leaf * 2.0).t().contiguous().t()
    with pytest.raises(ValueError, match="contiguous"):
        fastattn.cross_entropy(turned, target, inplace_backward=True)
    loss = fastattn.cross_entropy(leaf * 2.0, target, inplace_backward=True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.kernels
def test_inplace_backward_compiles():
    leaf, target = logits_and_target(DEVICE)

    def loss(leaf: torch.Tensor) -> torch.Tensor:
        return fastattn.cross_entropy(leaf * 2.0, target, inplace_backward=True)

    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(leaf), leaf)
    assert same_bits(found, expected)


@both_backends
@pytest.mark.parametrize("shape", [(CLASSES,), (4, CLASSES), (4, CLASSES, 3), (2, CLASSES, 3, 5)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_functional_has_the_classes_where_torch_has_them(device, shape, probabilities):
    logits = torch.randn(shape, dtype=WIDEST, device=device, requires_grad=True)
    if probabilities:
        target = torch.rand_like(logits)
    else:
        target = torch.randint(CLASSES, shape[:-1][:1] + shape[2:], device=device)
    every: list[dict[str, Any]] = [
        {},
        {"reduction": "none"},
        {"size_average": False},
        {"reduce": False},
    ]
    for options in every:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="size_average and reduce args")
            ours = fastattn.functional.cross_entropy(logits, target, **options)
            theirs = F.cross_entropy(logits, target, **options)
        assert_as_torch(ours, theirs)
        assert_as_torch(*(torch.autograd.grad(x.sum(), logits)[0] for x in (ours, theirs)))


LOGITS = torch.zeros(4, 5)
TARGET = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": TARGET}, TypeError, "logits must be float16"),
        ({"logits": torch.zeros(())}, ValueError, "logits must have at least one class"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "logits must have at least one class"),
        ({"target": [0]}, TypeError, "target must be a tensor"),
        ({"target": TARGET.int()}, TypeError, "target must be int64"),
        ({"target": TARGET[:3]}, ValueError, r"target must have shape \(4,\), got \(3,\)"),
        ({"target": torch.zeros(4, 4)}, ValueError, r"target must have shape \(4, 5\)"),
        ({"target": TARGET.to("meta")}, ValueError, "target must be on cpu"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(5,\)"),
        ({"weight": torch.ones(5, requires_grad=True)}, ValueError, "weight must not require"),
        ({"reduction": "average"}, ValueError, "reduction must be one of"),
        ({"label_smoothing": 1.1}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be non-negative"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be a positive number"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale must be a positive number"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale must be a positive number"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be a positive number"),
        ({"logit_scale": 1e-60}, ValueError, "logit_scale must be a positive number"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"softcap": -3.0}, ValueError, "softcap must be positive"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        fastattn.cross_entropy(**{"logits": LOGITS, "target": TARGET, **arguments})
