"""flash-attn's attention functions: every option against one formula, and what callers type."""

import itertools
from typing import Any

import pytest
import torch
from flash_formula import BACKENDS, assert_accurate, attend, device_of

import fastattn
from fastattn.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func
from fastattn.integrations.flash_attn.bert_padding import pad_input, unpad_input
from support import WIDEST

OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"softmax_scale": 0.3},
    {"window_size": (5, 2)},
    {"window_size": (4, -1)},
    {"window_size": (-1, 0)},
    {"causal": True, "window_size": (6, 6)},
    {"softcap": 2.0},
    {"causal": True, "softcap": 2.0, "window_size": (3, 0), "softmax_scale": 0.5},
]


def leaves(backend: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    numbers = [torch.randn(shape, device=device_of(backend), dtype=dtype) for shape in shapes]
    return {name: x.requires_grad_() for name, x in zip("qkv", numbers, strict=True)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "slopes"),
    [
        *((options, None) for options in OPTIONS),
        (OPTIONS[0], (4,)),
        *((o, (2, 4)) for o in OPTIONS),
    ],
    ids=str,
)
def test_options(options: dict[str, Any], slopes: tuple[int, ...] | None, backend: str):
    tensors = leaves(backend, WIDEST, (2, 9, 4, 16), (2, 21, 2, 16), (2, 21, 2, 24))
    if slopes is not None:
        tensors["alibi_slopes"] = torch.rand(slopes, device=device_of(backend))

    def function(**given: torch.Tensor) -> Any:
        return flash_attn_func(**given, **options, return_attn_probs=True)[:2]

    assert_accurate(function, lambda **given: attend(**given, **options), tensors, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype: torch.dtype, backend: str):
    tensors = leaves(backend, dtype, *3 * [(1, 48, 2, 32)])

    def formula(**given: torch.Tensor) -> torch.Tensor:
        return attend(**given, causal=True)[0]

    assert_accurate(
        lambda **given: flash_attn_func(**given, causal=True), formula, tensors, backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_get_zero(backend: str):
    q, k, v = leaves(backend, WIDEST, (1, 5, 2, 8), (1, 2, 2, 8), (1, 2, 2, 8)).values()
    with fastattn.backend(backend):
        out, lse, probabilities = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert not out[:, :3].any()
    assert lse[..., :3].eq(float("-inf")).all()
    assert lse[..., 3:].isfinite().all()
    assert probabilities is None
    assert lse.shape == (1, 2, 5)
    assert lse.dtype is WIDEST


def test_tensors_are_viewed_and_the_result_lies_as_flash_attn_has_it(monkeypatch):
    from fastattn.integrations.flash_attn import attention as module

    seen = []

    def watch(*tensors: torch.Tensor, **options: Any) -> Any:
        seen.extend(tensors)
        return fastattn.attention(*tensors, **options)

    monkeypatch.setattr(module, "attention", watch)
    q, k, v = (torch.randn(2, 5, 3, 8) for _ in range(3))
    flash_attn_func(q, k, v)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in (q, k, v)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_unpadding_attending_and_padding_is_attention_of_each_row(causal: bool, backend: str):
    device = device_of(backend)
    # The second row is empty, and the third is padded at its left.
    mask = torch.tensor([[1, 1, 1, 1, 0], [0] * 5, [0, 0, 1, 1, 1], [1] * 5], device=device)
    tensors = leaves(backend, WIDEST, (4, 5, 4, 16), (4, 5, 2, 16), (4, 5, 2, 16))

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, indices, ends, longest, used = unpad_input(q, mask)
        k, v = (unpad_input(x, mask)[0] for x in (k, v))
        assert used.tolist() == [4, 0, 3, 5]
        out = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=causal)
        return pad_input(out, indices, 4, 5)

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(q)
        for row, kept in enumerate(mask.bool()):
            if kept.any():
                out[row, kept] = attend(
                    *(x[row : row + 1, kept] for x in (q, k, v)), causal=causal
                )[0][0]
        return out

    assert_accurate(function, formula, tensors, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_beyond_the_last_sequence_get_zero(backend: str):
    q, k, v = leaves(backend, WIDEST, (9, 2, 8), (9, 2, 8), (9, 2, 8)).values()
    ends = torch.tensor([0, 3, 7], dtype=torch.int32, device=q.device)
    # A tensor for a length, as transformers passes it.
    longest = torch.tensor(4)
    with fastattn.backend(backend):
        out, lse, _ = flash_attn_varlen_func(
            q, k, v, ends, ends, longest, longest, return_attn_probs=True
        )
        out.sum().backward()
    assert out[:7].abs().amin(-1).gt(0).all()
    assert not out[7:].any()
    assert lse.shape == (2, 9)
    assert q.grad is not None
    assert not q.grad[7:].any()


def test_dropout_is_drawn_from_torchs_generator():
    q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(flash_attn_func(q, k, v, 0.5))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_a_video_model_calls_it_with_ten_names():
    """Wan 2.1: everything by name, lengths as integers, a scale of its own or none."""
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    q, k, v = (torch.randn(8, 2, 8) for _ in range(3))
    ends = torch.cat([lengths.new_zeros([1]), lengths]).cumsum(0, dtype=torch.int32)
    x = flash_attn_varlen_func(
        q=q, k=k, v=v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=5, max_seqlen_k=5,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False,
    )  # fmt: skip
    expected = [attend(*(y[None, part] for y in (q, k, v)))[0][0] for part in ends_to_slices(ends)]
    torch.testing.assert_close(x, torch.cat(expected))


def test_a_speech_model_calls_it_with_three_tensors_and_causal():
    """Zonos: (B, S, H, D) of a packed projection, which is cut into unequal parts."""
    projected = torch.randn(2, 7, 8 * 8, requires_grad=True)
    q, k, v = (x.unflatten(-1, (-1, 8)) for x in projected.split([32, 16, 16], dim=-1))
    out = flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(out, attend(q, k, v, causal=True)[0])
    out.sum().backward()
    assert projected.grad is not None


def test_an_encoder_calls_it_with_seven_positions_and_a_window():
    """ModernBERT: tokens without padding, q, k and v in one tensor, a window to both sides."""
    qkv = torch.randn(9, 3, 2, 8)
    q, k, v = qkv.unbind(1)
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    out = flash_attn_varlen_func(q, k, v, ends, ends, 5, 5, dropout_p=0.0, window_size=(2, 2))
    expected = [
        attend(*(x[None, part] for x in (q, k, v)), window_size=(2, 2))[0][0]
        for part in ends_to_slices(ends)
    ]
    torch.testing.assert_close(out, torch.cat(expected))


def ends_to_slices(ends: torch.Tensor) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise(ends.tolist())]


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"q": torch.randn(5, 2, 8)}, ValueError, r"q must be \(batch, length, heads, head dim"),
        ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
        ({"window_size": 3}, TypeError, r"window_size must be a pair of integers .*got 3"),
        ({"window_size": (1, 2, 3)}, TypeError, "window_size must be a pair"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
        ({"k": torch.randn(1, 5, 3, 8)}, ValueError, "the same number of heads"),
    ],
)
def test_bad_arguments(changed: dict[str, Any], error: type[Exception], says: str):
    tensors = dict(zip("qkv", torch.randn(3, 1, 5, 2, 8), strict=True))
    with pytest.raises(error, match=says):
        flash_attn_func(**{**tensors, **changed})


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"q": torch.randn(1, 5, 2, 8)}, ValueError, r"q must be \(tokens, heads, head dim"),
        ({"max_seqlen_q": 2.5}, TypeError, "max_seqlen_q must be an integer or a tensor of one"),
        ({"max_seqlen_k": torch.ones(2)}, TypeError, "max_seqlen_k must be an integer"),
        ({"block_table": torch.ones(1, 1)}, ValueError, r"k must be \(pages, page, heads"),
        ({"max_seqlen_k": 4}, ValueError, "a sequence of 5, more than the 4 of max_seqlen_k"),
    ],
)
def test_bad_arguments_of_packed_sequences(
    changed: dict[str, Any], error: type[Exception], says: str
):
    ends = torch.tensor([0, 5], dtype=torch.int32)
    given = dict(zip("qkv", torch.randn(3, 5, 2, 8), strict=True))
    given |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 5, "max_seqlen_k": 5}
    with pytest.raises(error, match=says):
        flash_attn_varlen_func(**{**given, **changed})
