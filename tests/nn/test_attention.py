"""Attention beside plain PyTorch and Hugging Face's modules, with every option."""

from functools import partial
from typing import Any

import pytest
import torch
from block_support import (
    assert_autocasts,
    assert_checkpoints,
    assert_compiles,
    assert_same_outcome,
    assert_survives_copies,
    assert_works_in_16_bits,
    causal,
    numbers,
    place,
    plain_module,
)

import fastattn
import fastattn.nn as nn
from support import DEVICE, WIDEST, assert_close, same_bits

kernels = pytest.mark.kernels
COLUMNS, HEADS, HEAD_DIM, LENGTH, KEYS = 24, 4, 6, 9, 11
norm = partial(nn.RMSNorm, eps=1e-6)


def tables(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    return nn.RotaryEmbedding(HEAD_DIM).tables(length, device=DEVICE or "cpu")


def some(*shape: int) -> torch.Tensor:
    """A mask that leaves every query some keys."""
    place = torch.arange(torch.Size(shape).numel(), device=DEVICE or "cpu").reshape(shape)
    return (place * 7919 % 5 < 3) | (place % shape[-1] == 0)


def documents() -> torch.Tensor:
    return torch.tensor([[0] * 4 + [1] * 5, [0] * 9], device=DEVICE or "cpu")


def alike(ids: torch.Tensor) -> torch.Tensor:
    return (ids[:, :, None] == ids[:, None, :])[:, None]


def lengths() -> torch.Tensor:
    return torch.tensor([7, 9], device=DEVICE or "cpu")


def within(lengths: torch.Tensor) -> torch.Tensor:
    return (torch.arange(LENGTH, device=lengths.device) < lengths[:, None])[:, None, None]


def distances(length: int = LENGTH) -> torch.Tensor:
    place = torch.arange(length, device=DEVICE or "cpu")
    return (place[:, None] - place).abs()


def alibi(slopes: torch.Tensor) -> torch.Tensor:
    return -slopes[:, None, None].to(WIDEST) * distances()


# The constructor's options, forward's, and what plain attention is given for both.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}),
    "grouped, causal": ({"num_kv_heads": 2, "causal": True}, {}, {"keep": causal(LENGTH, LENGTH)}),
    "one key head of another width, biases": (
        {"num_kv_heads": 1, "head_dim": 10, "bias": True},
        {},
        {},
    ),
    "out_bias alone": ({"out_bias": True}, {}, {}),
    "window, softcap, scale": (
        {"causal": True, "window": 3, "softcap": 2.0, "scale": 0.7},
        {},
        {"keep": causal(LENGTH, LENGTH, 3)},
    ),
    "norms and a rotary module": (
        {"qk_norm": norm, "rotary": nn.RotaryEmbedding(HEAD_DIM), "causal": True},
        {},
        {"keep": causal(LENGTH, LENGTH), "tables": tables()},
    ),
    "rotary tables": ({}, {"rotary": tables()}, {"tables": tables()}),
    "rotary positions": (
        {"rotary": nn.RotaryEmbedding(HEAD_DIM)},
        {"positions": 5},
        {"tables": tuple(x[5:] for x in tables(LENGTH + 5))},
    ),
    "mask": ({}, {"mask": some(2, 1, 9, 9)}, {"keep": some(2, 1, 9, 9)}),
    "key lengths": ({}, {"kv_lengths": lengths()}, {"keep": within(lengths())}),
    "ALiBi": (
        {"relative": nn.AlibiPositions(HEADS)},
        {},
        {"bias": alibi(fastattn.alibi_slopes(HEADS).to(DEVICE or "cpu"))},
    ),
    "sinks": ({"sinks": True, "causal": True}, {}, {"keep": causal(LENGTH, LENGTH)}),
    "documents": ({}, {"document_ids": documents()}, {"keep": alike(documents())}),
}


def check(
    backend: Any, options: dict[str, Any], given: dict[str, Any], plain: dict[str, Any]
) -> None:
    module = place(nn.Attention(COLUMNS, HEADS, **options))
    x = numbers(2, LENGTH, COLUMNS)
    assert_same_outcome(
        lambda: module(x, **given),
        lambda: plain_module(module, x, **plain),
        {"x": x, **dict(module.named_parameters())},
        backend,
    )


@kernels
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_agree_with_plain_pytorch(case):
    check("triton", *case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_agrees_with_plain_pytorch(case):
    check("reference", *case)


def check_cross(backend: Any) -> None:
    module = place(nn.Attention(COLUMNS, HEADS, 2, context_dim=10, bias=True))
    x, context = numbers(2, LENGTH, COLUMNS), numbers(2, KEYS, 10)
    mask = some(2, 1, 1, KEYS)
    assert_same_outcome(
        lambda: module(x, context, mask=mask),
        lambda: plain_module(module, x, context, keep=mask),
        {"x": x, "context": context, **dict(module.named_parameters())},
        backend,
    )


@kernels
def test_kernels_attend_to_a_context():
    check_cross("triton")


def test_reference_attends_to_a_context():
    check_cross("reference")


@pytest.mark.parametrize(
    "backend", [pytest.param("triton", marks=kernels), pytest.param("reference")]
)
def test_learned_biases_of_scores_get_their_gradients(backend):
    slopes = nn.AlibiPositions(HEADS, learnable=True)
    module = place(nn.Attention(COLUMNS, HEADS, relative=slopes))
    x, bias = numbers(2, LENGTH, COLUMNS), numbers(1, HEADS, LENGTH, LENGTH)
    tensors = {"x": x, "bias": bias, **dict(module.named_parameters())}
    assert_same_outcome(
        lambda: module(x, bias=bias),
        lambda: plain_module(module, x, bias=bias + alibi(slopes.slopes)),
        tensors,
        backend,
    )
    relative = nn.RelativePositionBias(HEADS, 8, 16)
    module = place(nn.Attention(COLUMNS, HEADS, relative=relative))
    assert_same_outcome(
        lambda: module(x),
        lambda: plain_module(module, x, bias=relative(LENGTH, LENGTH)),
        {"x": x, **dict(module.named_parameters())},
        backend,
    )


def test_dropout_drops_weights_in_training_alone():
    module = place(nn.Attention(COLUMNS, HEADS, dropout=0.5))
    x = numbers(4, 40, COLUMNS)
    whole = place(nn.Attention(COLUMNS, HEADS))
    whole.load_state_dict(module.state_dict())
    assert same_bits(module.eval()(x), whole(x))
    module.train()
    torch.manual_seed(3)
    first = module(x)
    assert not torch.equal(first, module(x))
    torch.manual_seed(3)
    assert same_bits(module(x), first)
    with torch.no_grad():
        mean = torch.stack([module(x) for _ in range(200)]).mean(0)
    spread = (first - whole(x)).abs().mean()
    assert (mean - whole(x)).abs().mean() < 0.15 * spread


class GrowingCache:
    """Keys and values one after another."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def update(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kept:
            k, v = torch.cat((self.kept[0], k), dim=2), torch.cat((self.kept[1], v), dim=2)
        self.kept = [k, v]
        return k, v


def test_decoding_with_a_cache_gives_what_the_whole_sequence_gives():
    module = place(
        nn.Attention(
            COLUMNS,
            HEADS,
            2,
            causal=True,
            window=4,
            qk_norm=norm,
            rotary=nn.RotaryEmbedding(HEAD_DIM),
            relative=nn.AlibiPositions(HEADS),
        )
    )
    x = numbers(2, LENGTH, COLUMNS)
    with torch.no_grad():
        cache = GrowingCache()
        parts = [
            module(x[:, start:end], positions=start, cache=cache)
            for start, end in ((0, 4), (4, 5), (5, 6), (6, LENGTH))
        ]
        assert_close(torch.cat(parts, dim=1), module(x))


def every_option(**options: Any) -> nn.Attention:
    return nn.Attention(
        COLUMNS,
        HEADS,
        2,
        causal=True,
        window=5,
        softcap=5.0,
        qk_norm=norm,
        rotary=nn.RotaryEmbedding(HEAD_DIM, max_positions=16),
        relative=nn.RelativePositionBias(HEADS, 8, 16),
        sinks=True,
        bias=True,
        **options,
    )


def call(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def test_copies_and_round_trips():
    assert_survives_copies(every_option, call, numbers(2, LENGTH, COLUMNS))


@kernels
@pytest.mark.slow
def test_compiles_without_graph_breaks():
    assert_compiles(place(every_option()), call, numbers(2, LENGTH, COLUMNS))


def test_compiles_without_graph_breaks_on_the_reference():
    with fastattn.backend("reference"):
        assert_compiles(place(every_option()), call, numbers(2, LENGTH, COLUMNS))


def test_checkpointing():
    assert_checkpoints(place(every_option(dropout=0.4)), call, numbers(2, LENGTH, COLUMNS))


def test_16_bits():
    assert_works_in_16_bits(place(every_option()), call, numbers(2, LENGTH, COLUMNS))


def test_autocast():
    assert_autocasts(place(every_option()), call, numbers(2, LENGTH, COLUMNS))


def test_projections_start_as_torchs():
    torch.manual_seed(5)
    expected = [torch.nn.Linear(COLUMNS, COLUMNS) for _ in range(4)]
    torch.manual_seed(5)
    module: Any = nn.Attention(COLUMNS, HEADS, bias=True, sinks=True)
    for name, linear in zip(("q_proj", "k_proj", "v_proj", "o_proj"), expected, strict=True):
        assert torch.equal(getattr(module, name).weight, linear.weight)
        assert torch.equal(getattr(module, name).bias, linear.bias)
    assert torch.equal(module.sinks, torch.zeros(HEADS))
    with torch.no_grad():
        module.sinks.fill_(3.0)
    module.reset_parameters()
    assert torch.equal(module.sinks, torch.zeros(HEADS))


def test_dtype_and_device_reach_every_parameter():
    module = nn.Attention(
        COLUMNS, HEADS, sinks=True, bias=True, qk_norm=norm, device="meta", dtype=torch.bfloat16
    )
    parameters = dict(module.named_parameters())
    assert len(parameters) == 11
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in parameters.values())


def test_biases_are_where_they_were_asked_for():
    for bias, out_bias, expected in (
        (False, None, []),
        (True, None, ["q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"]),
        (True, False, ["q_proj.bias", "k_proj.bias", "v_proj.bias"]),
        (False, True, ["o_proj.bias"]),
    ):
        module = nn.Attention(COLUMNS, HEADS, bias=bias, out_bias=out_bias)
        names = [name for name, _ in module.named_parameters() if name.endswith("bias")]
        assert names == expected


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads, got 3 and 4"):
        nn.Attention(COLUMNS, 4, 3)
    with pytest.raises(ValueError, match=r"embed_dim must be a multiple of num_heads.*24 and 5"):
        nn.Attention(COLUMNS, 5)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1\.0"):
        nn.Attention(COLUMNS, HEADS, dropout=1.0)
    module = nn.Attention(COLUMNS, HEADS, context_dim=10)
    x = torch.randn(2, 3, COLUMNS)
    with pytest.raises(ValueError, match=r"x must be \(B, S, 24\), got the shape \(3, 24\)"):
        module(x[0])
    with pytest.raises(
        ValueError, match=r"context must be \(B, S, 10\), got the shape \(2, 3, 24\)"
    ):
        module(x, x)
    turning = nn.Attention(COLUMNS, HEADS, rotary=nn.RotaryEmbedding(HEAD_DIM))
    with pytest.raises(ValueError, match="rotary positions are those of one sequence"):
        turning(x, x)
    with pytest.raises(TypeError, match="attention_mask"):
        module(x, torch.randn(2, 5, 10), attention_mask=None)
    with pytest.raises(TypeError, match="Attention: return_lse must not be given"):
        module(x, torch.randn(2, 5, 10), return_lse=True)
