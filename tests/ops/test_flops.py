"""What torch's FlopCounterMode counts: the reference's products, and what kernels compute again."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fastattn
import fastattn.nn
from fastattn.ops.core.flops import pairs
from support import DEVICE, OPERATIONS, Sample, outputs_of, tensors_of, weighted_sum

pytestmark = pytest.mark.kernels

# Products of the forward that a backward by kernels computes again, where the reference has kept
# what they gave.
AGAIN: dict[str, Callable[..., int]] = {
    "attention": lambda q, k, **_: 2 * q.numel() * k.shape[-2],
    "attention_weights": lambda q, k, **_: 2 * q.numel() * k.shape[-2],
    "decode_attention": lambda q, k, **_: 4 * q.numel() * k.shape[-2],
    "gated_linear": lambda x, w_gate, **_: 4 * x.numel() * w_gate.shape[0],
    # What the bias adds to the gradients of routing weights is a product with each expert's.
    "mixture": lambda x, w_down, b_down=None, **_: (
        0 if b_down is None else 2 * x.numel() * w_down.shape[0]
    ),
    # A scalar's gradients are computed in the forward, on both backends.
    "linear_cross_entropy": lambda x, weight, reduction="mean", **_: (
        2 * x.numel() * weight.shape[0] if reduction == "none" else 0
    ),
    # Several chunks keep nothing, on either backend.
    "linear_jsd": lambda x, weight, teacher_x, chunk_rows=None, **_: (
        0 if chunk_rows else 2 * (x.numel() + teacher_x.numel()) * weight.shape[0]
    ),
    "linear_log_prob": lambda x, weight, chunk_rows=None, **_: (
        0 if chunk_rows else 2 * x.numel() * weight.shape[0]
    ),
    "linear_top_k_kl": lambda x, weight, chunk_rows=None, **_: (
        0 if chunk_rows else 2 * x.numel() * weight.shape[0]
    ),
}


def counted(call: Callable[[], Any]) -> tuple[int, Any]:
    counter = FlopCounterMode(display=False)
    with counter:
        result = call()
    return counter.get_total_flops(), result


def counts(operation: Any, sample: Sample, backend: Any) -> tuple[int, int]:
    """What a call and its backward count."""
    arguments = sample.make(torch.float32, str(DEVICE))
    with fastattn.backend(backend):
        forward, outputs = counted(lambda: outputs_of(operation.function, arguments))
        loss = weighted_sum(outputs)
        tensors = list(tensors_of(arguments).values())
        backward, _ = counted(lambda: torch.autograd.grad(loss, tensors))
    return forward, backward


@pytest.mark.parametrize("place", [0, 1], ids=["smallest", "ordinary"])
# The reference of packed sequences computes with padded ones.
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "attention_varlen"])
def test_kernels_count_what_the_reference_counts(name, place):
    operation = OPERATIONS[name]
    sample = operation.samples[place]
    forward, backward = counts(operation, sample, "reference")
    again = AGAIN[name](**sample.make(torch.float32, "cpu")) if name in AGAIN else 0
    assert counts(operation, sample, "triton") == (forward, backward + again)


def heads(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, requires_grad=True)


def test_attention_counts_what_torch_counts_of_its_own():
    q, k, v = heads(2, 4, 5, 8), heads(2, 2, 7, 8), heads(2, 2, 7, 6)
    forward, o = counted(lambda: fastattn.attention(q, k, v, causal=True))
    backward, _ = counted(lambda: o.sum().backward())
    # As if every head of q had keys of its own, which is all that older versions count.
    shapes = q.shape, (2, 4, 7, 8), (2, 4, 7, 6)
    assert forward == sdpa_flop_count(*shapes)
    assert backward == sdpa_backward_flop_count(o.shape, *shapes)


@pytest.mark.parametrize(
    ("wanted", "columns"), [((), 0), (("q",), 22), (("v",), 28), (("q", "k"), 36), (("bias",), 14)]
)
def test_attention_counts_the_gradients_that_are_wanted(wanted, columns):
    given = {"q": heads(2, 4, 5, 8), "k": heads(2, 4, 7, 8), "v": heads(2, 4, 7, 6)}
    given["bias"] = heads(1, 4, 5, 7)
    sinks = heads(4)
    for name, tensor in given.items():
        tensor.requires_grad_(name in wanted)
    _, o = counted(lambda: fastattn.attention(**given, sinks=sinks))
    backward, _ = counted(lambda: o.sum().backward())
    # Gradients of k and v come from one kernel.
    assert backward == 2 * (2 * 4 * 5 * 7) * columns


def packed(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def test_packed_sequences_count_their_own_pairs():
    q, k, v = heads(9, 4, 8), heads(11, 2, 8), heads(11, 2, 6)
    cu = packed([2, 0, 7]), packed([5, 4, 2])
    forward, o = counted(lambda: fastattn.attention_varlen(q, k, v, *cu, 7, 5))
    backward, _ = counted(lambda: o.sum().backward())
    pairs = 4 * (2 * 5 + 7 * 2)
    assert forward == 2 * pairs * (8 + 6)
    assert backward == 2 * pairs * (3 * 8 + 2 * 6)


def test_packed_sequences_of_unknown_lengths_are_taken_for_equal():
    with FakeTensorMode():
        q, k = torch.empty(1, 4, 12, 8), torch.empty(1, 2, 15, 8)
        cu = torch.empty(4, dtype=torch.int32)
        assert pairs(q, k, cu, cu) == 4 * (3 * 4 * 5)


def test_modules_count_as_their_own():
    layer = fastattn.nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).to(DEVICE)
    x = torch.randn(2, 5, 8, device=DEVICE)
    counter = FlopCounterMode(display=False)
    with counter:
        layer(x)
    found = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    rows, kind = 2 * 5, "TransformerEncoderLayer"
    attention = 2 * rows * 8 * (3 * 8 + 8) + sdpa_flop_count(*[(2, 2, 5, 4)] * 3)
    assert found[f"{kind}.self_attn"] == attention
    assert found[f"{kind}.linear1"] == found[f"{kind}.linear2"] == 2 * rows * 8 * 12
    assert found["Global"] == attention + 4 * rows * 8 * 12


def test_a_counter_from_before_the_first_call_counts():
    # In a process of its own, where nothing has been registered yet.
    code = """
import torch, fastattn, sys
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
first, second = (FlopCounterMode(display=False) for _ in range(2))
a = torch.randn(3, 4, device=sys.argv[1])
for counter in (first, second):
    with counter, fastattn.backend("triton"):
        fastattn.matmul(a, a.mT)
    print(counter.get_total_flops())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(DEVICE)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["72", "72"]
