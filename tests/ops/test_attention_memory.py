"""What attention reads and where: strides, keys that nobody may see, and offsets beyond 2^31."""

from typing import Any

import pytest
import torch
from attention_support import Results, assert_results_close, qkv, random_mask, results

import fastattn
from fastattn.functional import scaled_dot_product_attention
from support import DEVICE, same_bits

pytestmark = pytest.mark.kernels


@pytest.fixture
def copies(monkeypatch) -> list[torch.Size]:
    """The shapes of tensors that get copied, by the methods that the library uses to copy."""
    seen: list[torch.Size] = []

    def watched(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def method(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            result = original(self, *args, **options)
            if result.data_ptr() != self.data_ptr():
                seen.append(self.shape)
            return result

        monkeypatch.setattr(torch.Tensor, name, method)

    for name in ("contiguous", "clone", "to", "reshape", "flatten"):
        watched(name)
    return seen


def laid_out(layout: str) -> list[torch.Tensor]:
    """q, k and v (2, 2, 20, 16) in memory as named."""
    if layout == "(B, M, H, D)":
        tensors = [torch.randn(2, 20, 2, 16, device=DEVICE).transpose(1, 2) for _ in range(3)]
    elif layout == "slices of a packed projection":
        packed = torch.randn(2, 20, 3, 2, 16, device=DEVICE)
        tensors = list(packed.permute(2, 0, 3, 1, 4))
    elif layout == "an expanded batch":
        tensors = [torch.randn(1, 2, 20, 16, device=DEVICE).expand(2, 2, 20, 16) for _ in range(3)]
    elif layout == "expanded heads":
        tensors = [torch.randn(2, 1, 20, 16, device=DEVICE).expand(2, 2, 20, 16) for _ in range(3)]
    else:
        # Rows of 25 elements, from the second on: addresses that only 4 bytes divide.
        tensors = [torch.randn(2, 2, 20, 25, device=DEVICE)[..., 1:17] for _ in range(3)]
    return [x.requires_grad_() for x in tensors]


@pytest.mark.parametrize(
    "layout",
    [
        "(B, M, H, D)",
        "slices of a packed projection",
        "an expanded batch",
        "expanded heads",
        "slices of longer rows",
    ],
)
def test_strides_are_read_in_place(layout, copies):
    tensors = laid_out(layout)
    options = {"causal": True, "return_lse": True}
    found = results(fastattn.attention, tensors, **options)
    assert not copies
    plain = [x.detach().contiguous().requires_grad_() for x in tensors]
    for name, value in results(fastattn.attention, plain, **options).items():
        assert same_bits(found[name], value), name
    if layout in ("(B, M, H, D)", "slices of a packed projection"):
        for name in ("o", "dq", "dk", "dv"):
            assert found[name].transpose(1, 2).is_contiguous(), name


def test_packed_sequences_are_read_in_place(copies):
    packed = torch.randn(40, 3, 2, 16, device=DEVICE)
    tensors = [x.requires_grad_() for x in packed.unbind(1)]
    cumulative = torch.tensor([0, 30, 40], dtype=torch.int32, device=DEVICE)

    def attention(*tensors: torch.Tensor) -> Any:
        return fastattn.attention_varlen(*tensors, cumulative, cumulative, 30, 30)

    found = results(attention, tensors)
    assert not copies
    plain = [x.detach().contiguous().requires_grad_() for x in tensors]
    for name, value in results(attention, plain).items():
        assert same_bits(found[name], value), name
        assert found[name].is_contiguous(), name


def hidden_keys() -> list[Any]:
    """Calls on q (2, 2, 20, 8) and 70 keys, and which keys (2, 70) nobody sees in them."""
    order = torch.arange(70)
    lengths = torch.tensor([33, 0])
    beyond = order >= lengths[:, None]
    column = (order % 3 == 1) | (order > 50)
    scores = {"causal": True, "softcap": 2.0, "alibi_slopes": torch.ones(2)}
    attention = fastattn.attention
    cases = {
        "key lengths": (attention, {"kv_lengths": lengths}, beyond),
        "key lengths, causal, with scores": (attention, {"kv_lengths": lengths, **scores}, beyond),
        "mask of keys": (attention, {"mask": ~column}, column),
        "whole mask": (attention, {"mask": ~column.expand(2, 2, 20, 70)}, column),
        "before a window": (attention, {"window": (4, None)}, order < 46),
        "causal window": (attention, {"window": 4, "causal": True}, order < 46),
        "after torch's diagonal": (scaled_dot_product_attention, {"is_causal": True}, order >= 20),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    "garbage", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("function", "options", "hidden"), hidden_keys())
def test_keys_that_nobody_sees_may_be_anything(function, options, hidden, backend, garbage):
    options = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    if function is fastattn.attention:
        options["return_lse"] = True
    hidden = hidden.to(DEVICE).expand(2, 70)[:, None, :, None]
    shared = {"key_heads": 1} if function is fastattn.attention else {}
    q, k, v = qkv(2, 2, 20, 70, 8, **shared)

    def with_instead(number: float) -> Results:
        own = [q, *(x.detach().masked_fill(hidden, number).requires_grad_() for x in (k, v))]
        with fastattn.backend(backend):
            return results(function, own, **options)

    found, expected = with_instead(garbage), with_instead(0.0)
    for name, value in expected.items():
        assert same_bits(found[name], value), name
    for name in ("dk", "dv"):
        assert (found[name].masked_select(hidden) == 0).all(), name


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_rows_of_no_packed_sequence_may_be_anything(garbage):
    cumulative = torch.tensor([0, 17, 17, 33], dtype=torch.int32, device=DEVICE)

    def with_instead(number: float) -> Results:
        torch.manual_seed(0)
        tensors = [torch.randn(60, 2, 8, device=DEVICE) for _ in range(3)]
        for tensor in tensors:
            tensor[33:] = number
        return results(
            lambda *x, **o: fastattn.attention_varlen(*x, cumulative, cumulative, 17, 17, **o),
            [x.requires_grad_() for x in tensors],
            return_lse=True,
            causal=True,
        )

    found, expected = with_instead(garbage), with_instead(0.0)
    for name, value in expected.items():
        assert same_bits(found[name], value), name
    assert (found["o"][33:] == 0).all()
    assert (found["lse"][:, 33:] == float("-inf")).all()
    for name in ("dq", "dk", "dv"):
        assert (found[name][33:] == 0).all(), name


FAR = 20 * 2**27
"""Elements of a buffer of which offsets need more than 32 bits. It is never written as a whole: the
system gives memory to the pages that are."""


@pytest.fixture
def far_buffer(monkeypatch) -> torch.Tensor:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    return torch.empty(FAR, dtype=torch.float16, device=DEVICE)


# Strides of batch, heads and rows. With the last a tile's own offsets need more than 32 bits.
FAR_STRIDES = {
    "batch": (2**31, 16 * 20, 16),
    "heads": (16 * 20, 2**31, 16),
    "rows": (64, 16, 2**27),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAR_STRIDES)
def test_offsets_beyond_32_bits(name, far_buffer):
    # q, k, v and the incoming gradient lie in one buffer, 2^19 elements after one another.
    tensors = [
        far_buffer[place * 2**19 :].as_strided((2, 2, 20, 16), (*FAR_STRIDES[name], 1))
        for place in range(4)
    ]
    assert sum((s - 1) * t for s, t in zip((2, 2, 20), FAR_STRIDES[name], strict=True)) > 2**31
    near = []
    for tensor in tensors:
        near.append(torch.randn(2, 2, 20, 16, device=DEVICE).half())
        tensor.copy_(near[-1])

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor) -> list[Any]:
        variables = [x.detach().requires_grad_() for x in (q, k, v)]
        o = fastattn.attention(*variables, causal=True)
        return [o, *torch.autograd.grad(o, variables, do)]

    for found, expected in zip(run(*tensors), run(*near), strict=True):
        assert same_bits(found, expected)


@pytest.mark.slow
def test_packed_offsets_beyond_32_bits(far_buffer):
    cumulative = torch.tensor([0, 3, 20], dtype=torch.int32, device=DEVICE)
    far = far_buffer.as_strided((20, 2, 16), (2**27, 16, 1))
    near = torch.randn(20, 2, 16, device=DEVICE).half()
    far.copy_(near)

    def attention(*tensors: torch.Tensor) -> Any:
        return fastattn.attention_varlen(*tensors, cumulative, cumulative, 17, 17)

    expected = results(attention, [near.detach().requires_grad_() for _ in range(3)])
    for name, value in results(
        attention, [far.detach().requires_grad_() for _ in range(3)]
    ).items():
        assert same_bits(value, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("strides", [(2**27, 1), (1, 2**27)], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_masks_with_offsets_beyond_32_bits(kind, strides, far_buffer):
    tensors = qkv(1, 1, 20)
    if kind == "mask":
        near = random_mask(20, 20)
        far = far_buffer.view(torch.bool).as_strided((20, 20), strides)
    else:
        near = torch.randn(20, 20, device=DEVICE).half()
        far = far_buffer.as_strided((20, 20), strides)
    far.copy_(near)

    def attention(*tensors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*tensors, attn_mask=mask)

    assert_results_close(
        results(attention, tensors, mask=far), results(attention, tensors, mask=near)
    )
