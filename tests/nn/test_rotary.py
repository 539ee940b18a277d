"""RotaryEmbedding: the angles of Hugging Face's models, and tables that stay what they are."""

import copy
import pickle
from typing import Any

import pytest
import torch

import fastattn
import fastattn.nn as nn

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256},
    "yarn of gpt-oss": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "yarn of DeepSeek": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 4096,
    },
    "yarn with an attention factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "attention_factor": 1.3,
        "original_max_position_embeddings": 64,
    },
}
BASE = 500000.0
MAX_POSITIONS = 64
HEAD_DIM = 32


def theirs(scaling: dict[str, Any]) -> torch.nn.Module:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={**scaling, "rope_theta": BASE},
    )
    return LlamaRotaryEmbedding(config)


def ours(scaling: dict[str, Any]) -> nn.RotaryEmbedding:
    return nn.RotaryEmbedding(HEAD_DIM, MAX_POSITIONS, BASE, scaling=scaling)


# Within the tables, all of them, and beyond them, where dynamic scaling begins.
@pytest.mark.parametrize("length", [7, MAX_POSITIONS, 3 * MAX_POSITIONS])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_angles_are_those_of_hugging_face(scaling, length):
    cos, sin = theirs(scaling)(torch.zeros(1), torch.arange(length)[None])
    found_cos, found_sin = ours(scaling).tables(length)
    assert torch.equal(found_cos, cos[0, :, : HEAD_DIM // 2])
    assert torch.equal(found_sin, sin[0, :, : HEAD_DIM // 2])


@pytest.mark.parametrize("length", [7, 3 * MAX_POSITIONS])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_queries_and_keys_are_those_of_hugging_face(scaling, length):
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 4, length, HEAD_DIM), torch.randn(2, 2, length, HEAD_DIM)
    cos, sin = theirs(scaling)(q, torch.arange(length)[None])
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    for a, b in zip(ours(scaling)(q, k), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_a_whole_configuration_is_accepted(scaling):
    embedding = ours({**scaling, "rope_theta": BASE, "partial_rotary_factor": 1.0})
    assert torch.equal(embedding.cos, ours(scaling).cos)


@pytest.mark.kernels
@pytest.mark.parametrize("scaling", ["default", "dynamic", "yarn"])
def test_a_step_of_decoding_beyond_the_tables(scaling):
    from support import DEVICE

    length = MAX_POSITIONS + 9
    embedding = ours(SCALINGS[scaling]).to(DEVICE)
    q, k = torch.randn(2, 2, 4, length, HEAD_DIM, device=DEVICE)
    whole_q, whole_k = embedding(q, k)
    last_q, last_k = embedding(q[..., -1:, :], k[..., -1:, :], length - 1)
    assert torch.equal(last_q, whole_q[..., -1:, :])
    assert torch.equal(last_k, whole_k[..., -1:, :])


def test_positions_of_a_tensor_beyond_the_tables_need_the_length():
    embedding = ours(SCALINGS["linear"])
    q, k = torch.randn(2, 1, 4, 3, HEAD_DIM)
    positions = torch.tensor([0, MAX_POSITIONS + 2, 5])
    turned, _ = embedding(q, k, positions, length=MAX_POSITIONS + 3)
    expected = fastattn.apply_rotary(q, *embedding.tables(MAX_POSITIONS + 3), positions=positions)
    assert torch.equal(turned, expected)
    unknown, _ = embedding(q, k, positions)
    assert unknown[..., 1, :].isnan().all()
    assert torch.equal(unknown[..., ::2, :], expected[..., ::2, :])


@pytest.mark.parametrize("scaling", ["default", "dynamic"])
def test_packed_sequences(scaling):
    # All together are longer than the tables, each alone is not.
    embedding = ours(SCALINGS[scaling])
    parts = [torch.randn(4, length, HEAD_DIM) for length in (MAX_POSITIONS, 3)]
    packed = torch.cat(parts, dim=1)
    cu_seqlens = torch.tensor([0, MAX_POSITIONS, MAX_POSITIONS + 3])
    turned, _ = embedding(packed, packed, cu_seqlens=cu_seqlens)
    alone = [embedding(part, part)[0] for part in parts]
    assert torch.equal(turned, torch.cat(alone, dim=1))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half().float(),
        lambda m: m.double(),
        lambda m: copy.deepcopy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to("meta").to_empty(device="cpu"),
    ],
    ids=["bfloat16", "half and back", "double", "deepcopy", "pickle", "meta and back"],
)
def test_tables_survive(change):
    expected = ours(SCALINGS["yarn"])
    found = change(ours(SCALINGS["yarn"]))
    assert torch.equal(found.cos, expected.cos)
    assert torch.equal(found.sin, expected.sin)
    assert found.cos.dtype is torch.float32


def test_nothing_is_saved_and_nothing_learns():
    embedding = ours(SCALINGS["default"])
    assert not embedding.state_dict()
    assert not list(embedding.parameters())


def test_it_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        embedding = ours(SCALINGS["llama3"])
    assert embedding.cos.is_meta
    assert torch.equal(embedding.to_empty(device="cpu").cos, ours(SCALINGS["llama3"]).cos)


def test_repr_says_what_it_was_made_of():
    assert repr(nn.RotaryEmbedding(8)) == "RotaryEmbedding(8, max_positions=2048, base=10000.0)"
    assert "'factor': 4.0" in repr(ours(SCALINGS["linear"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 7}, "dim must be even and positive, got 7"),
        ({"dim": 0}, "dim must be even and positive, got 0"),
        ({"max_positions": 0}, "max_positions must be positive, got 0"),
        ({"base": 1.0}, "base must be greater than 1"),
        ({"scaling": {"rope_type": "longrope"}}, "rope_type must be one of .*, got 'longrope'"),
        ({"scaling": {"rope_type": "linear"}}, "linear scaling needs factor"),
        (
            {"scaling": {"type": "yarn", "factor": 2.0}},
            "yarn scaling needs original_max_position_embeddings",
        ),
        (
            {"scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}},
            "linear scaling has no beta_fast",
        ),
        (
            {"dim": 2, "scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "dynamic scaling needs a dim greater than 2",
        ),
        ({"scaling": {"rope_theta": 5.0}}, r"rope_theta is 5\.0, base is 10000\.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        nn.RotaryEmbedding(**{"dim": 8, **arguments})
