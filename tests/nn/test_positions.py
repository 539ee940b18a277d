"""Positions as modules: the values of the papers and of Hugging Face's models."""

import math
from typing import Any

import numpy
import pytest
import torch
from block_support import (
    assert_checkpoints,
    assert_compiles,
    assert_same_outcome,
    assert_survives_copies,
    numbers,
    place,
)

import fastattn
import fastattn.nn as nn
from support import DEVICE, assert_close, same_bits

COLUMNS, LENGTH = 12, 9


def call(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def test_sinusoidal_positions_are_those_of_the_paper():
    rows = nn.SinusoidalPositions(COLUMNS, 20).table
    for position in (0, 1, 7, 19):
        for pair in range(COLUMNS // 2):
            angle = position / 10000 ** (2 * pair / COLUMNS)
            assert math.isclose(rows[position, 2 * pair], math.sin(angle), abs_tol=2e-6)
            assert math.isclose(rows[position, 2 * pair + 1], math.cos(angle), abs_tol=2e-6)


MODULES: dict[str, Any] = {
    "SinusoidalPositions": lambda: nn.SinusoidalPositions(COLUMNS, 16),
    "LearnedPositions": lambda: nn.LearnedPositions(16, COLUMNS),
}
added_to_tokens = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def draw_rows(module: Any) -> torch.Tensor:
    rows = module.table if isinstance(module, nn.SinusoidalPositions) else module.weight
    return rows.to(numbers(1).dtype)


@added_to_tokens
def test_rows_are_added_to_tokens(make):
    module = place(make())
    rows = draw_rows(module)
    x = numbers(2, LENGTH, COLUMNS)
    places = torch.arange(2 * LENGTH, device=x.device).reshape(2, LENGTH) * 5 % 16
    for positions, expected in (
        (None, rows[:LENGTH]),
        (3, rows[3 : 3 + LENGTH]),
        (places, rows[places]),
        (places[0], rows[places[0]]),
    ):
        assert_same_outcome(
            lambda positions=positions: module(x, positions),
            lambda expected=expected: x + expected,
            {"x": x, **dict(module.named_parameters())},
        )
    half = x.detach().to(torch.bfloat16)
    assert module(half).dtype is torch.bfloat16


@added_to_tokens
def test_copies_compiles_and_checkpoints(make):
    x = numbers(2, LENGTH, COLUMNS)
    assert_survives_copies(make, call, x)
    assert_compiles(place(make()), call, x)
    assert_checkpoints(place(make()), call, x)


def test_sinusoidal_positions_beyond_the_table_and_in_no_state_dict():
    module = nn.SinusoidalPositions(COLUMNS, 4)
    x = torch.randn(2, LENGTH, COLUMNS)
    whole = nn.SinusoidalPositions(COLUMNS, 64)
    assert torch.equal(module(x), whole(x))
    assert torch.equal(module(x, 3), whole(x, 3))
    assert not module.state_dict()


def test_tables_survive_casts_and_devices():
    for module, name in (
        (nn.SinusoidalPositions(COLUMNS, 16), "table"),
        (nn.AlibiPositions(6), "slopes"),
    ):
        kept = getattr(module, name).clone()
        module.to(torch.bfloat16)
        assert same_bits(getattr(module, name), kept)
        module.to("meta").to_empty(device="cpu")
        assert same_bits(getattr(module, name), kept)


def test_learned_positions_load_what_an_embedding_has_and_start_small():
    module = nn.LearnedPositions(512, 64)
    assert abs(module.weight.std().item() - 0.02) < 5e-4
    assert abs(module.weight.mean().item()) < 5e-4
    embedding = torch.nn.Embedding(512, 64)
    assert module.load_state_dict(embedding.state_dict()) == ([], [])
    x = torch.randn(2, 5, 64)
    assert torch.equal(module(x), x + embedding(torch.arange(5)))
    assert isinstance(module, torch.nn.Embedding)


def test_alibi_slopes():
    fixed = nn.AlibiPositions(6)
    assert torch.equal(fixed.terms(3, 4)["alibi_slopes"], fastattn.alibi_slopes(6))
    assert not fixed.state_dict()
    assert not list(fixed.parameters())
    learnable = nn.AlibiPositions(6, learnable=True)
    assert list(learnable.state_dict()) == ["slopes"]
    assert torch.equal(learnable.slopes, fastattn.alibi_slopes(6))
    assert learnable.slopes.requires_grad
    with torch.no_grad():
        learnable.slopes.zero_()
    learnable.reset_parameters()
    assert torch.equal(learnable.slopes, fastattn.alibi_slopes(6))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (12, 50)])
def test_relative_bias_is_that_of_t5(bidirectional, buckets, distance):
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    config = transformers.T5Config(
        num_heads=4,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=distance,
        is_decoder=not bidirectional,
    )
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = nn.RelativePositionBias(4, buckets, distance, bidirectional=bidirectional)
    weight = theirs.relative_attention_bias.weight
    ours.load_state_dict({"relative_attention_bias.weight": weight})
    # From every distance that there is a bucket for to where the last one ends, and with a cache.
    for queries, keys in ((300, 300), (1, 200), (7, 12)):
        expected = theirs.compute_bias(queries, keys, past_seen_tokens=keys - queries)
        assert torch.equal(ours(queries, keys), expected)


def test_relative_bias_starts_small():
    module = nn.RelativePositionBias(64, 64)
    weight = module.relative_attention_bias.weight
    assert abs(weight.std().item() - 0.02) < 1e-3
    assert list(module.state_dict()) == ["relative_attention_bias.weight"]


def test_positions_of_ones_own():
    class Near(nn.ScorePositions):
        """Sees no further than two keys."""

        def terms(self, queries: int, keys: int) -> dict[str, Any]:
            place = torch.arange(keys - queries, keys, device=DEVICE or "cpu")[:, None]
            return {"mask": (place - torch.arange(keys, device=DEVICE or "cpu")).abs() <= 2}

    near = place(nn.Attention(COLUMNS, 2, relative=Near()))
    window = place(nn.Attention(COLUMNS, 2, window=(2, 2)))
    window.load_state_dict(near.state_dict())
    x = numbers(2, LENGTH, COLUMNS)
    assert_close(near(x), window(x))
    with pytest.raises(TypeError, match=r"Own must define terms\(\)"):
        type("Own", (nn.ScorePositions,), {})().terms(1, 1)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="embed_dim must be even and positive, got 7"):
        nn.SinusoidalPositions(7)
    with pytest.raises(ValueError, match="max_positions must be positive, got 0"):
        nn.SinusoidalPositions(8, 0)
    with pytest.raises(ValueError, match=r"num_buckets must be 4 or more, and even, got 5"):
        nn.RelativePositionBias(2, 5)
    with pytest.raises(ValueError, match=r"num_buckets must be 2 or more, got 1"):
        nn.RelativePositionBias(2, 1, bidirectional=False)
    with pytest.raises(ValueError, match=r"max_distance must be greater than the 8 .*got 8"):
        nn.RelativePositionBias(2, 32, 8)
    for make in MODULES.values():
        module = make()
        with pytest.raises(ValueError, match=r"x must be \(\.\.\., S, 12\), got .* \(3, 5\)"):
            module(torch.randn(3, 5))
        with pytest.raises(ValueError, match="positions must not be negative, got -1"):
            module(torch.randn(3, 12), -1)
    with pytest.raises(ValueError, match=r"there are 16 positions, got tokens at .* up to 18"):
        nn.LearnedPositions(16, 12)(torch.randn(4, 12), 15)


@added_to_tokens
def test_positions_that_are_no_rows_are_named(make):
    module = make().cpu()
    x = torch.randn(2, 3, COLUMNS)
    for wrong, got in (([0, -1, 2], -1), ([0, 16, 2], 16), ([-9, 99, 2], -9)):
        with pytest.raises(ValueError, match=rf"positions must be in \[0, 16\), got {got}$"):
            module(x, torch.tensor(wrong))
    for wrong in (torch.ones(3), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(TypeError, match=r"positions must be integers, got a tensor of torch"):
            module(x, wrong)
    with pytest.raises(TypeError, match="positions must be a tensor or an int, got float"):
        module(x, 1.0)
    expected = module(x, torch.tensor([3, 0, 15]))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(module(x, torch.tensor([3, 0, 15], dtype=dtype)), expected)
    assert module(x[:0], torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, COLUMNS)


def test_sinusoidal_positions_that_are_not_looked_at_give_nan():
    """Compiled, as on a GPU, numbers in a tensor are not waited for."""
    module = nn.SinusoidalPositions(COLUMNS, 16)
    x, places = torch.randn(1, 4, COLUMNS), torch.tensor([3, -1, 16, 15])
    found = torch.compile(module, fullgraph=True, backend="eager")(x, places)
    assert found[:, 1:3].isnan().all()
    assert torch.equal(found[:, ::3], module(x[:, ::3], places[::3]))


class Counted:
    """A number of a type of its own."""

    def __index__(self) -> int:
        return 5


@pytest.mark.parametrize("number", [numpy.int64(5), numpy.uint8(5), Counted()])
def test_positions_are_numbers_of_any_type(number):
    x = torch.randn(2, 3, COLUMNS)
    for make in MODULES.values():
        module = make().cpu()
        assert torch.equal(module(x, number), module(x, 5))
    rotary = nn.RotaryEmbedding(4, 6)
    attention = nn.Attention(COLUMNS, 3, rotary=rotary)
    q = torch.randn(1, 3, 4, 4)
    with fastattn.backend("reference"):
        for call in (
            lambda positions: rotary(q, q, positions)[0],
            lambda positions: fastattn.apply_rotary(q, *rotary.tables(9), positions=positions),
            lambda positions: attention(x, positions=positions),
        ):
            assert torch.equal(call(number), call(5))
        with pytest.raises(TypeError, match="positions must be a tensor or an int, got str"):
            rotary(q, q, "5")


@pytest.mark.kernels
def test_kernels_take_numbers_of_any_type():
    rotary = place(nn.RotaryEmbedding(4, 6))
    q = numbers(1, 3, 4, 4)
    with fastattn.backend("triton"):
        assert torch.equal(rotary(q, q, numpy.int64(5))[1], rotary(q, q, 5)[1])
