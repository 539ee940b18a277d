"""The divergence of two heads: definitions, limits, masks, memory, bad input."""

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn.ops import linear_jsd_chunks as chunks
from support import DEVICE, WIDEST, assert_close, same_bits

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
both_backends = pytest.mark.parametrize("device", DEVICES)

ROWS, CLASSES = 10, 13


def heads(device: Any, dtype: torch.dtype = WIDEST) -> dict[str, torch.Tensor]:
    """Operands of student and teacher, of other widths, and a mask."""
    shapes = {
        "x": (ROWS, 6),
        "weight": (CLASSES, 6),
        "bias": (CLASSES,),
        "teacher_x": (ROWS, 4),
        "teacher_weight": (CLASSES, 4),
        "teacher_bias": (CLASSES,),
    }
    made = {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
    for name in ("x", "weight", "bias"):
        made[name].requires_grad_()
    return made | {"target_mask": torch.arange(ROWS, device=device) % 4 != 1}


def learners(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors[name] for name in ("x", "weight", "bias")]


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a / b).log()).sum(-1)


@both_backends
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_definitions_hold_in_any_chunks(device, beta):
    tensors = heads(device)
    p, q = (
        torch.softmax(F.linear(*(tensors[prefix + name] for name in names)) / 0.7, -1)
        for prefix in ("", "teacher_")
        for names in [("x", "weight", "bias")]
    )
    m = beta * q + (1.0 - beta) * p
    between = beta * kl(q, m) + (1.0 - beta) * kl(p, m)
    expected = {0.0: kl(q, p), 1.0: kl(p, q), 0.3: between}[beta] * tensors["target_mask"]
    gradients = torch.autograd.grad(expected.cos().sum(), learners(tensors))
    for chunk_rows in (1, 3, 64):
        found = fastattn.linear_jsd(**tensors, beta=beta, temperature=0.7, chunk_rows=chunk_rows)
        assert_close(found, expected)
        for a, b in zip(
            torch.autograd.grad(found.cos().sum(), learners(tensors)), gradients, strict=True
        ):
            assert_close(a, b)


@both_backends
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equal_heads_do_not_diverge(device, beta):
    tensors = heads(device, torch.float32)
    for name in ("x", "weight", "bias"):
        tensors["teacher_" + name] = tensors[name]
    found = fastattn.linear_jsd(**tensors, beta=beta)
    assert found.abs().max() < 1e-6
    gradients = torch.autograd.grad(found.sum(), learners(tensors))
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


@both_backends
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("chunk_rows", [3, 64])
def test_what_masked_rows_hold_does_not_show(device, garbage, chunk_rows):
    outcomes = []
    tensors = heads(device, torch.float32)
    left_out = ~tensors["target_mask"]
    for value in (1.0, garbage):
        given = dict(tensors)
        for name in ("x", "teacher_x"):
            given[name] = tensors[name].detach().masked_fill(left_out[:, None], value)
        given["x"].requires_grad_()
        found = fastattn.linear_jsd(**given, chunk_rows=chunk_rows)
        incoming = torch.ones_like(found).masked_fill(left_out, value)
        outcomes.append([found, *torch.autograd.grad(found, learners(given), incoming)])
    for a, b in zip(*outcomes, strict=True):
        assert same_bits(a, b)
        assert a.isfinite().all()


@both_backends
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_classes_that_the_teacher_rules_out(device, beta):
    tensors = heads(device)
    del tensors["target_mask"]
    tensors["teacher_bias"][5] = -math.inf
    for chunk_rows in (3, 64):
        found = fastattn.linear_jsd(**tensors, beta=beta, chunk_rows=chunk_rows)
        gradients = torch.autograd.grad(found.sum(), learners(tensors))
        assert all(tensor.isfinite().all() for tensor in (found, *gradients))
    if beta:
        assert (found <= math.log(2.0)).all()


@both_backends
def test_the_teacher_has_a_dtype_of_its_own_and_no_gradient(device):
    tensors = heads(device, torch.bfloat16)
    for name in ("teacher_x", "teacher_weight", "teacher_bias"):
        tensors[name] = tensors[name].float().requires_grad_()
    found = fastattn.linear_jsd(**tensors)
    assert found.dtype is torch.float32
    found.sum().backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name not in ("x", "weight", "bias")), name


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
    op = sys.modules["fastattn.ops.linear_jsd"]
    monkeypatch.setattr(op, "linear_jsd_chunks", chunks.jsd_in_chunks)
    monkeypatch.setattr(op, "linear_jsd_gradients", chunks.jsd_gradients_in_chunks)
    x = torch.randn(40, 4, device=device, requires_grad=True)
    weight = torch.randn(30, 4, device=device, requires_grad=True)
    with LargestTensor() as seen:
        fastattn.linear_jsd(x, weight, x, weight, chunk_rows=8).sum().backward()
    assert seen.nbytes == 8 * 30 * 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": -0.1}, ValueError, r"beta must be in \[0, 1\]"),
        ({"beta": math.nan}, ValueError, r"beta must be in \[0, 1\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be positive"),
        ({"target_mask": torch.ones(ROWS)}, TypeError, "target_mask must be a tensor of bools"),
        ({"target_mask": torch.ones(3) > 0}, ValueError, "target_mask must have shape"),
        ({"teacher_x": torch.ones(3, 4)}, ValueError, "teacher_x must have shape"),
        ({"teacher_weight": torch.ones(9, 4)}, ValueError, "teacher_weight must have shape"),
        ({"teacher_weight": torch.ones(13, 4).half()}, TypeError, "must have one dtype"),
        ({"weight": torch.ones(13, 6).half()}, TypeError, "weight must have x's dtype"),
        ({"bias": torch.ones(3)}, ValueError, "bias must have shape"),
        ({"teacher_bias": torch.ones(3)}, ValueError, "teacher_bias must have shape"),
        ({"x": torch.ones(())}, ValueError, "x must have at least one dimension"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        fastattn.linear_jsd(**{**heads("cpu", torch.float32), **arguments})
