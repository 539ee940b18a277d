"""Log-probabilities, entropies and hits: definitions, ignored rows, chunks, memory, bad input."""

import math
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn.ops import linear_log_prob_chunks as chunks
from fastattn.ops.core.backends import INTERPRETED
from support import DEVICE, WIDEST, assert_close, same_bits

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
both_backends = pytest.mark.parametrize("device", DEVICES)

ROWS, COLUMNS, CLASSES = 10, 6, 13

EVERYTHING: dict[str, Any] = {"return_entropy": True, "return_correct": True}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"temperature": 1.7, "softcap": 2.0, "logit_scale": 0.8},
]


def rows_of(device: Any, dtype: torch.dtype = WIDEST) -> dict[str, torch.Tensor]:
    """x, weight, bias and a target of which every fourth is ignored."""
    shapes = {"x": (ROWS, COLUMNS), "weight": (CLASSES, COLUMNS), "bias": (CLASSES,)}
    made = {
        name: torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    target = torch.randint(CLASSES, (ROWS,)).to(device)
    target[1::4] = -100
    return made | {"target": target}


def leaves(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors.values() if tensor.requires_grad]


def plain(
    logits: torch.Tensor,
    target: torch.Tensor,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> list[torch.Tensor]:
    """The definitions, in the order that the docstring gives."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    p = torch.softmax(z / temperature, -1)
    counts = target != -100
    log_prob = p.gather(-1, target.clamp(min=0)[:, None])[:, 0].log() * counts
    entropy = -(p * p.log()).sum(-1) * counts
    return [log_prob, entropy, counts & (logits.argmax(-1) == target)]


@both_backends
@pytest.mark.parametrize("options", OPTIONS, ids=len)
def test_the_definitions_hold_in_any_chunks(device, options):
    tensors = rows_of(device)
    logits = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
    # Some targets are what greedy decoding would take.
    tensors["target"][2::4] = logits.argmax(-1)[2::4]
    expected = plain(logits, tensors["target"], **options)
    gradients = torch.autograd.grad(
        expected[0].cos().sum() + expected[1].square().sum(), leaves(tensors)
    )
    calls = [fastattn.log_prob(logits.detach(), tensors["target"], **EVERYTHING, **options)]
    for chunk_rows in (1, 3, 64):
        found = fastattn.linear_log_prob(**tensors, chunk_rows=chunk_rows, **EVERYTHING, **options)
        calls.append(found)
        loss = found[0].cos().sum() + found[1].square().sum()
        for a, b in zip(torch.autograd.grad(loss, leaves(tensors)), gradients, strict=True):
            assert_close(a, b)
    for log_prob, entropy, correct in calls:
        assert_close(log_prob, expected[0], "log_prob")
        assert_close(entropy, expected[1], "entropy")
        assert torch.equal(correct, expected[2])
        assert not correct.requires_grad
        assert correct.any()


@both_backends
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_what_ignored_rows_hold_does_not_show(device, garbage, softcap):
    tensors = rows_of(device, torch.float32)
    ignored = tensors["target"] == -100
    logits = torch.randn(ROWS, CLASSES, device=device)
    options = {**EVERYTHING, "softcap": softcap, "temperature": 0.5}
    outcomes = []
    for value in (1.0, garbage):
        x = tensors["x"].detach().masked_fill(ignored[:, None], value)
        operands = {**tensors, "x": x.requires_grad_()}
        given = logits.masked_fill(ignored[:, None], value).requires_grad_()
        found = [fastattn.log_prob(given, tensors["target"], **options)]
        found += [
            fastattn.linear_log_prob(**operands, chunk_rows=size, **options) for size in (3, 64)
        ]
        # The gradients that come in for them reach nothing either.
        spoilt = torch.ones(ROWS, device=device).masked_fill(ignored, value)
        incoming = [spoilt] * 2 * len(found)
        outputs = [output for three in found for output in three[:2]]
        gradients = torch.autograd.grad(outputs, [given, *leaves(operands)], incoming)
        outcomes.append([*(output for three in found for output in three), *gradients])
    for a, b in zip(*outcomes, strict=True):
        assert same_bits(a, b)
        assert a.isfinite().all()
    for output in outcomes[0][:9]:
        assert not output[ignored].any()


@both_backends
def test_all_rows_ignored(device):
    tensors = rows_of(device)
    tensors["target"].fill_(-100)
    for chunk_rows in (3, 64):
        found = fastattn.linear_log_prob(**tensors, chunk_rows=chunk_rows, **EVERYTHING)
        assert not any(output.any() for output in found)
        for gradient in torch.autograd.grad(found[0].sum() + found[1].sum(), leaves(tensors)):
            assert not gradient.any()


@both_backends
def test_classes_that_are_ruled_out(device):
    # -inf among the logits is what a grammar or a mask of the vocabulary puts there.
    logits = torch.randn(3, 5, dtype=WIDEST, device=device)
    logits[:, 3] = -math.inf
    logits[1, :4] = -math.inf
    logits.requires_grad_()
    target = torch.tensor([0, 4, 2], device=device)
    log_prob, entropy, correct = fastattn.log_prob(logits, target, **EVERYTHING)
    kept = logits.detach()[::2, [0, 1, 2, 4]].requires_grad_()
    places = torch.tensor([0, 2], device=device)
    expected = plain(kept, places)
    assert_close(log_prob[::2], expected[0])
    assert_close(entropy[::2], expected[1])
    assert (log_prob[1].item(), entropy[1].item(), correct[1].item()) == (0.0, 0.0, True)
    (gradient,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), logits)
    (of_kept,) = torch.autograd.grad(expected[0].sum() + expected[1].sum(), kept)
    assert_close(gradient[::2][:, [0, 1, 2, 4]], of_kept)
    assert not gradient[1].any()
    assert not gradient[:, 3].any()


@both_backends
def test_of_equal_logits_the_first_is_taken_and_nan_is_never_right(device):
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]] * 3 + [[1.0, math.nan, 0.0, 0.0]] * 2)
    target = torch.tensor([1, 2, 0, 1, 0])
    # Under the cap and in 16 bits both are the largest still.
    for options in ({}, {"softcap": 1e-3}, {"temperature": 50.0}):
        found = fastattn.log_prob(
            logits.to(device, torch.bfloat16), target.to(device), return_correct=True, **options
        )
        assert found[1].tolist() == [True, False, False, False, False]


@both_backends
@pytest.mark.parametrize("classes", [4096, 20_001])
def test_wide_rows(device, classes):
    logits = torch.randn(2, classes, dtype=WIDEST, device=device).requires_grad_()
    target = torch.tensor([5, int(logits[1].argmax())], device=device)
    found = fastattn.log_prob(logits, target, **EVERYTHING)
    expected = plain(logits, target)
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert_close(a, b)
        assert_close(*(torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (a, b)))
    assert torch.equal(found[2], expected[2])


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_float32(device, dtype):
    tensors = rows_of(device, dtype)
    found = fastattn.linear_log_prob(**tensors, **EVERYTHING)
    target = torch.zeros(CLASSES, dtype=torch.int64, device=device)
    found += fastattn.log_prob(tensors["weight"], target, **EVERYTHING)
    assert [output.dtype for output in found] == [torch.float32, torch.float32, torch.bool] * 2
    for gradient in torch.autograd.grad(found[0].sum(), leaves(tensors)):
        assert gradient.dtype is dtype
    with torch.autocast(str(device).split(":")[0], torch.bfloat16):
        assert fastattn.linear_log_prob(**rows_of(device, torch.float32)).dtype is torch.float32


@both_backends
def test_temperature_scales_in_float32(device):
    # In float16 the tempered logits would overflow.
    logits = torch.full((2, 5), 40000.0, device=device, dtype=torch.float16)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    log_prob = fastattn.log_prob(logits, target, temperature=0.125)
    assert log_prob.tolist() == pytest.approx([-math.log(5.0)] * 2, rel=1e-6)


class LargestTensor(TorchDispatchMode):
    """The most bytes of any tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
        self.nbytes = max([self.nbytes, *(tensor.nbytes for tensor in tensors)])
        return outputs


@both_backends
def test_logits_never_exist_for_more_rows_than_a_chunk(device, monkeypatch):
    # The loops themselves are watched, not the ops that they are registered as.
    op = sys.modules["fastattn.ops.linear_log_prob"]
    monkeypatch.setattr(op, "linear_log_prob_chunks", chunks.log_prob_in_chunks)
    monkeypatch.setattr(op, "linear_log_prob_gradients", chunks.log_prob_gradients_in_chunks)
    x = torch.randn(40, 4, device=device, requires_grad=True)
    weight = torch.randn(30, 4, device=device, requires_grad=True)
    target = torch.arange(40, device=device) % 30
    with LargestTensor() as seen:
        found = fastattn.linear_log_prob(x, weight, target, chunk_rows=8, **EVERYTHING)
        torch.autograd.backward([found[0].sum(), found[1].sum()])
    assert seen.nbytes == 8 * 30 * 4


@both_backends
def test_a_target_that_is_no_class(device):
    tensors = rows_of(device)
    tensors["target"][2] = CLASSES
    if device == "cpu" and not INTERPRETED:
        with pytest.raises(ValueError, match=r"target must be in \[0, 13\)"):
            fastattn.linear_log_prob(**tensors)
        return
    for chunk_rows in (3, 64):
        log_prob, entropy, correct = fastattn.linear_log_prob(
            **tensors, chunk_rows=chunk_rows, **EVERYTHING
        )
        assert log_prob.isnan().nonzero().flatten().tolist() == [2]
        assert entropy.isfinite().all()
        assert not correct[2]


LOGITS = torch.zeros(4, 5)
TARGET = torch.zeros(4, dtype=torch.int64)
WEIGHT = torch.zeros(7, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": [0]}, TypeError, "target must be a tensor"),
        ({"target": TARGET.int()}, TypeError, "target must be int64"),
        ({"target": TARGET[:3]}, ValueError, r"target must have shape \(4,\), got \(3,\)"),
        ({"target": TARGET.to("meta")}, ValueError, "target must be on cpu"),
        ({"target": TARGET - 1}, ValueError, r"target must be in \[0, [57]\).*got -1"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number"),
        ({"temperature": -1.0}, ValueError, "temperature must be a positive number"),
        ({"temperature": math.nan}, ValueError, "temperature must be a positive number"),
        ({"temperature": math.inf}, ValueError, "temperature must be a positive number"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be a positive number"),
        (
            {"logit_scale": 1e30, "temperature": 1e-30},
            ValueError,
            "logit_scale / temperature must be a positive number",
        ),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(arguments, error, message):
    with fastattn.backend("reference"):
        with pytest.raises(error, match=message):
            fastattn.log_prob(**{"logits": LOGITS, "target": TARGET, **arguments})
        given = {"x": LOGITS, "weight": WEIGHT, "target": TARGET, **arguments}
        with pytest.raises(error, match=message):
            fastattn.linear_log_prob(**given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": LOGITS[0, 0]}, ValueError, "x must have at least one dimension"),
        ({"weight": WEIGHT[:, :4]}, ValueError, r"weight must have shape \(V, 5\)"),
        ({"weight": WEIGHT[:0]}, ValueError, "at least one class"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must have x's dtype"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(7,\)"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be positive"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_operands_are_named(arguments, error, message):
    given = {"x": LOGITS, "weight": WEIGHT, "target": TARGET, **arguments}
    with pytest.raises(error, match=message):
        fastattn.linear_log_prob(**given)


def test_logits_without_classes_are_refused():
    for logits in (torch.zeros(()), torch.zeros(4, 0)):
        with pytest.raises(ValueError, match="logits must have at least one class"):
            fastattn.log_prob(logits, TARGET)
