"""The divergence from a teacher's top k: definition, missing mass, repeated ids, masks, memory."""

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn.ops import linear_top_k_kl_chunks as chunks
from support import DEVICE, WIDEST, assert_close, same_bits

DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
both_backends = pytest.mark.parametrize("device", DEVICES)

ROWS, CLASSES, KEPT = 10, 13, 4


def head(device: Any, dtype: torch.dtype = WIDEST) -> dict[str, torch.Tensor]:
    """Operands of the student, the four likeliest classes of a teacher, and a mask."""
    shapes = {"x": (ROWS, 6), "weight": (CLASSES, 6), "bias": (CLASSES,)}
    made = {
        name: torch.randn(shape).to(device, dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    log_probs, ids = torch.randn(ROWS, CLASSES, dtype=WIDEST).log_softmax(-1).topk(KEPT)
    made |= {"teacher_ids": ids.to(device), "teacher_log_probs": log_probs.to(device, dtype)}
    return made | {"target_mask": torch.arange(ROWS, device=device) % 4 != 1}


def learners(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors[name] for name in ("x", "weight", "bias")]


def results(tensors: dict[str, torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """The divergences, and gradients of a sum in which every row counts differently."""
    found = fastattn.linear_top_k_kl(**tensors, **options)
    return [found.detach(), *torch.autograd.grad(found.cos().sum(), learners(tensors))]


@both_backends
def test_the_definition_holds_in_any_chunks(device):
    tensors = head(device)
    x, weight, bias = learners(tensors)
    q = torch.zeros(ROWS, CLASSES, dtype=WIDEST, device=device)
    q.scatter_(1, tensors["teacher_ids"], tensors["teacher_log_probs"].exp())
    log_p = (F.linear(x, weight, bias) / 0.7).log_softmax(-1)
    expected = (torch.xlogy(q, q) - q * log_p).sum(-1) * tensors["target_mask"]
    gradients = torch.autograd.grad(expected.cos().sum(), learners(tensors))
    for chunk_rows in (1, 3, 64):
        found = results(tensors, temperature=0.7, chunk_rows=chunk_rows)
        for a, b in zip(found, [expected, *gradients], strict=True):
            assert_close(a, b)


@both_backends
def test_all_classes_are_the_forward_divergence_of_two_heads(device):
    tensors = head(device)
    teacher_x, teacher_weight = (
        torch.randn(n, 4, dtype=WIDEST, device=device) for n in (ROWS, CLASSES)
    )
    given = [*learners(tensors)[:2], teacher_x, teacher_weight, tensors["target_mask"]]
    expected = fastattn.linear_jsd(*given, bias=tensors["bias"], beta=0.0, chunk_rows=3)
    log_q, ids = F.linear(teacher_x, teacher_weight).log_softmax(-1).sort()
    tensors |= {"teacher_ids": ids, "teacher_log_probs": log_q}
    gradients = torch.autograd.grad(expected.cos().sum(), learners(tensors))
    for a, b in zip(results(tensors, chunk_rows=3), [expected, *gradients], strict=True):
        assert_close(a, b)


@both_backends
def test_missing_mass_leaves_a_least_value_below_zero(device):
    """Q log Q, where the student is the teacher normalised again, and without a gradient."""
    q = torch.tensor([0.5, 0.2, 0.1], dtype=WIDEST, device=device)
    x = torch.ones(2, 1, dtype=WIDEST, device=device, requires_grad=True)
    logits = torch.cat([q.log(), q.new_full((4,), -200.0)])
    weight = logits[:, None].clone().requires_grad_()
    ids = torch.arange(3, device=device).expand(2, 3)
    found = fastattn.linear_top_k_kl(x, weight, ids, q.log().expand(2, 3), chunk_rows=1)
    assert_close(found, torch.full_like(found, 0.8 * math.log(0.8)))
    for gradient in torch.autograd.grad(found.sum(), (x, weight)):
        assert_close(gradient, torch.zeros_like(gradient))


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_of_one_class_add_up(device, dtype):
    """By halves that float32 adds exactly; what is absent may stand beside them under any id."""
    tensors = head(device, dtype)
    ids, log_q = tensors["teacher_ids"], tensors["teacher_log_probs"].float()
    twice = dict(tensors)
    twice["teacher_ids"] = torch.cat([ids.flip(1), ids, ids - 99], 1).int()
    halves = log_q - math.log(2.0)
    absent = torch.full_like(log_q, -math.inf)
    twice["teacher_log_probs"] = torch.cat([halves.flip(1), halves, absent], 1)
    once = fastattn.linear_top_k_kl(**tensors, chunk_rows=3)
    # Each half is log 2 less in its logarithm.
    less = (log_q.exp().sum(-1) * math.log(2.0)).masked_fill(~tensors["target_mask"], 0.0)
    found = fastattn.linear_top_k_kl(**twice, chunk_rows=3)
    torch.testing.assert_close(found, once - less)
    gradients = [torch.autograd.grad(y.sum(), learners(tensors)) for y in (found, once)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@both_backends
@pytest.mark.parametrize("kept", [0, KEPT])
def test_a_teacher_of_nothing_gives_zeros(device, kept):
    tensors = head(device, torch.float32)
    tensors["teacher_ids"] = tensors["teacher_ids"][:, :kept]
    tensors["teacher_log_probs"] = torch.full((ROWS, kept), -math.inf, device=device)
    for chunk_rows in (3, 64):
        found = fastattn.linear_top_k_kl(**tensors, chunk_rows=chunk_rows)
        for tensor in (found, *torch.autograd.grad(found.sum(), learners(tensors))):
            assert (tensor == 0.0).all()


@both_backends
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("chunk_rows", [3, 64])
def test_what_masked_rows_hold_does_not_show(device, garbage, chunk_rows):
    outcomes = []
    tensors = head(device, torch.float32)
    left_out = ~tensors["target_mask"]
    for value, class_id in ((1.0, 1), (garbage, -100)):
        given = dict(tensors)
        for name in ("x", "teacher_log_probs"):
            given[name] = tensors[name].detach().masked_fill(left_out[:, None], value)
        given["teacher_ids"] = tensors["teacher_ids"].masked_fill(left_out[:, None], class_id)
        given["x"].requires_grad_()
        found = fastattn.linear_top_k_kl(**given, chunk_rows=chunk_rows)
        incoming = torch.ones_like(found).masked_fill(left_out, value)
        outcomes.append([found, *torch.autograd.grad(found, learners(given), incoming)])
    for a, b in zip(*outcomes, strict=True):
        assert same_bits(a, b)
        assert a.isfinite().all()


@both_backends
def test_the_teacher_has_a_dtype_of_its_own_and_no_gradient(device):
    tensors = head(device, torch.bfloat16)
    teacher = tensors["teacher_log_probs"].double().requires_grad_()
    tensors["teacher_log_probs"] = teacher
    found = fastattn.linear_top_k_kl(**tensors, chunk_rows=3)
    assert found.dtype is torch.float32
    found.sum().backward()
    assert teacher.grad is None


@pytest.mark.kernels
def test_an_unknown_class_makes_its_row_and_the_gradients_nan_by_kernels():
    tensors = head(DEVICE, torch.float32)
    del tensors["target_mask"]
    tensors["teacher_ids"][2, 1] = CLASSES
    tensors["teacher_ids"][3, 0] = -1
    found = fastattn.linear_top_k_kl(**tensors)
    assert found.isnan().nonzero().flatten().tolist() == [2, 3]
    (dx,) = torch.autograd.grad(found.sum(), tensors["x"])
    assert dx.isnan().all(1).nonzero().flatten().tolist() == [2, 3]


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
    op = sys.modules["fastattn.ops.linear_top_k_kl"]
    monkeypatch.setattr(op, "linear_top_k_kl_chunks", chunks.top_k_kl_in_chunks)
    monkeypatch.setattr(op, "linear_top_k_kl_gradients", chunks.top_k_kl_gradients_in_chunks)
    x = torch.randn(40, 4, device=device, requires_grad=True)
    weight = torch.randn(30, 4, device=device, requires_grad=True)
    ids = torch.arange(80, device=device).view(40, 2) % 30
    with LargestTensor() as seen:
        log_q = torch.full((40, 2), -1.0, device=device)
        fastattn.linear_top_k_kl(x, weight, ids, log_q, chunk_rows=8).sum().backward()
    assert seen.nbytes == 8 * 30 * 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be positive"),
        ({"target_mask": torch.ones(ROWS)}, TypeError, "target_mask must be a tensor of bools"),
        ({"target_mask": torch.ones(3) > 0}, ValueError, "target_mask must have shape"),
        ({"teacher_ids": torch.ones(ROWS, 4)}, TypeError, "teacher_ids must be int32 or int64"),
        ({"teacher_ids": torch.ones(ROWS).long()}, ValueError, "teacher_ids must have shape"),
        ({"teacher_ids": torch.ones(3, 4).long()}, ValueError, "teacher_ids must have shape"),
        ({"teacher_ids": torch.full((ROWS, 4), 13)}, ValueError, r"must be in \[0, 13\), got 13"),
        ({"teacher_ids": [[1]]}, TypeError, "teacher_ids must be a tensor"),
        ({"teacher_log_probs": torch.ones(ROWS, 3)}, ValueError, "log_probs must have shape"),
        ({"teacher_log_probs": torch.ones(ROWS, 4).int()}, TypeError, "log_probs must be float16"),
        ({"weight": torch.ones(13, 6).half()}, TypeError, "weight must have x's dtype"),
        ({"bias": torch.ones(3)}, ValueError, "bias must have shape"),
        ({"x": torch.ones(())}, ValueError, "x must have at least one dimension"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        fastattn.linear_top_k_kl(**{**head("cpu", torch.float32), **arguments})
