"""The function that Hugging Face's models call, by itself: its options, and what it refuses."""

from typing import Any

import pytest
import torch
import transformers

import fastattn
from families import FAMILIES, LENGTH, inputs_of, make_model, tokens
from fastattn.integrations.transformers import attention_forward, register
from fastattn.integrations.transformers.documents import (
    documents_of_lengths,
    documents_of_positions,
)
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")


def qkv(
    queries: int = 6, keys: int = 6, heads: int = 4, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = ((batch, heads, queries, 8), (batch, 2, keys, 8), (batch, 2, keys, 12))
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)  # type: ignore


def attend(*tensors: torch.Tensor, mask: Any = None, module: Any = None, **options: Any) -> Any:
    module = torch.nn.Module() if module is None else module
    return attention_forward(module, *tensors, mask, **options)


def test_without_a_mask_the_first_query_stands_at_the_first_key():
    q, k, v = qkv(4, 9)
    expected = fastattn.attention(q, k[:, :, :4], v[:, :, :4], causal=True).transpose(1, 2)
    torch.testing.assert_close(attend(q, k, v)[0], expected)
    torch.testing.assert_close(attend(q, k, v, is_causal=True)[0], expected)
    everything = fastattn.attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(attend(q, k, v, is_causal=False)[0], everything)
    one = attend(q[:, :, :1], k, v)[0]
    torch.testing.assert_close(one, everything[:, :1])


def test_more_queries_than_keys():
    q, k, v = qkv(9, 4)
    keep = torch.ones(9, 4, dtype=torch.bool).tril()
    expected = fastattn.attention(q, k, v, mask=keep).transpose(1, 2)
    torch.testing.assert_close(attend(q, k, v)[0], expected)


@pytest.mark.parametrize("extra", [0, 3])
def test_masks_of_four_dimensions(extra: int):
    q, k, v = qkv()
    keep = torch.rand(2, 1, 6, 6 + extra) < 0.6
    keep[..., 0] = True
    expected = fastattn.attention(q, k, v, mask=keep[..., :6]).transpose(1, 2)
    torch.testing.assert_close(attend(q, k, v, mask=keep)[0], expected)
    added = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(~keep, torch.finfo(q.dtype).min)
    torch.testing.assert_close(attend(q, k, v, mask=added)[0], expected)


def test_a_mask_of_two_dimensions_is_padding():
    q, k, v = qkv()
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    keep = real[:, None, None].bool() & torch.ones(6, 6, dtype=torch.bool).tril()
    expected = fastattn.attention(q, k, v, mask=keep).transpose(1, 2)
    torch.testing.assert_close(attend(q, k, v, mask=real)[0], expected)
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        attend(q, k, v, mask=real[:, :4])


def test_sinks_of_each_query():
    q, k, v = qkv()
    sinks = torch.randn(2, 4, 6, 1, dtype=torch.float64, requires_grad=True)
    output, weights = attend(q, k, v, sinks=sinks, output_attentions=True)
    scores = (q @ k.repeat_interleave(2, 1).mT) * 8**-0.5
    scores = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), float("-inf"))
    own = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(weights, own)
    expected = (own @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    (found,) = torch.autograd.grad(output.square().sum(), sinks)
    (wanted,) = torch.autograd.grad(expected.square().sum(), sinks)
    torch.testing.assert_close(found, wanted)


def test_places_of_documents():
    q, k, v = (x[:1] for x in qkv())
    ends = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    ids = torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = fastattn.attention(q, k, v, document_ids=ids).transpose(1, 2)
    found = attend(
        q,
        k,
        v,
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=4,
        max_length_k=4,
        is_causal=False,
    )[0]
    torch.testing.assert_close(found, expected)
    # Fewer queries are the last of each document: its 1 and its 3.
    few = torch.tensor([0, 1, 1, 4], dtype=torch.int32)
    last = fastattn.attention(q, k, v, document_ids=ids, causal=True)[:, :, [1, 3, 4, 5]]
    given = {"cu_seq_lens_q": few, "cu_seq_lens_k": ends}
    found = attend(q[:, :, [1, 3, 4, 5]], k, v, **given)[0]
    torch.testing.assert_close(found, last.transpose(1, 2))
    with pytest.raises(ValueError, match="position_bias and continuous batching"):
        attend(q[:, :, :4], k, v, position_bias=torch.zeros(1, 1, 4, 6), **given)
    assert documents_of_lengths(ends, 7).tolist() == [[0, 0, 2, 2, 2, 2, 3]]


def test_positions_are_asked_once_and_again_after_a_change():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    first = documents_of_positions(positions)
    assert first is not None
    assert first.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert documents_of_positions(positions) is first
    positions.copy_(torch.arange(6))
    assert documents_of_positions(positions) is None
    with torch.inference_mode():
        positions = torch.tensor([[0, 1, 0]])
        assert documents_of_positions(positions).tolist() == [[0, 0, 1]]  # type: ignore
        positions.copy_(torch.arange(3))
        assert documents_of_positions(positions) is None


def test_one_batch_of_queries_serves_all_keys():
    q, k, v = qkv()
    expected = attend(q[:1].expand(2, -1, -1, -1), k, v)[0]
    torch.testing.assert_close(attend(q[:1], k, v)[0], expected)


def test_an_unknown_tensor_is_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"Module hands indices, a tensor \(3,\).*eager"):
        attend(q, k, v, indices=torch.zeros(3))
    attend(q, k, v, indices=None, num_items_in_batch=torch.tensor(3), use_cache=True)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert", "t5", "mistral", "vit"])
def test_weights_can_be_looked_at(name: str):
    inputs = inputs_of(FAMILIES[name])
    found = []
    for implementation in ("eager", "fastattn"):
        model = make_model(FAMILIES[name], implementation).eval()
        output = model(**inputs, output_attentions=True)
        kinds = [k for k in ("attentions", "decoder_attentions", "cross_attentions") if k in output]
        found.append([weights for kind in kinds for weights in output[kind]])
    assert len(found[0]) == len(found[1]) > 0
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_decoder_can_be_made_to_see_both_sides():
    outputs = []
    for implementation in ("eager", "fastattn"):
        model = make_model(FAMILIES["llama"], implementation)
        model.config.is_causal = False
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        outputs.append(model(tokens(), use_cache=False).logits)
    torch.testing.assert_close(*outputs)
    causal = make_model(FAMILIES["llama"], "fastattn")(tokens(), use_cache=False).logits
    assert (causal - outputs[1]).abs().max() > 0.01


def test_a_users_own_mask_of_four_dimensions():
    place = torch.arange(LENGTH)
    prefix = (place < 5) | (place <= place[:, None])
    outputs = []
    for implementation in ("eager", "fastattn"):
        model = make_model(FAMILIES["llama"], implementation)
        mask = prefix[None, None].expand(2, 1, -1, -1)
        if implementation == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        outputs.append(model(tokens(), attention_mask=mask, use_cache=False).logits)
    torch.testing.assert_close(*outputs)


def test_dropout_is_drawn_in_training_alone():
    model = make_model(FAMILIES["llama"], "fastattn")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    first, second = (model(tokens(), use_cache=False).logits for _ in range(2))
    assert (first - second).abs().max() > 0.01
    model.eval()
    first, second = (model(tokens(), use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


def test_registering_again_changes_nothing_of_theirs():
    before = {
        name: transformers.AttentionInterface()[name] for name in ("sdpa", "flash_attention_2")
    }
    register()
    register()
    for name, function in before.items():
        assert transformers.AttentionInterface()[name] is function
    assert transformers.AttentionInterface()["fastattn"] is attention_forward


def test_a_config_may_name_it_for_each_part():
    model = make_model(FAMILIES["t5"])
    model.set_attn_implementation("fastattn")
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {
        "fastattn"
    }
