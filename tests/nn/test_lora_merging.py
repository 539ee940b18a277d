"""Merging adapted layers whose weights others share, and the layers of GPT-2."""

import copy
from typing import Any

import pytest
import torch
from small_models import LANGUAGE_MODELS, batch_of, loss_of, small, unlabelled

import fastattn.nn as nn
from fastattn.nn.linear import Conv1D
from support import same_bits


def head_of(model: Any) -> Any:
    return model.get_submodule(model.head_layer)


def adapted(name: str, **options: Any) -> Any:
    """A language model whose head is adapted and shares its weight with the embedding."""
    model = small(name, tie_word_embeddings=True, **options)
    nn.apply_lora(model, model.head_layer, rank=2)
    torch.nn.init.normal_(head_of(model).lora_B, std=0.5)
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**unlabelled(model, batch_of(model))).logits


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_tied_head_is_merged_and_the_embedding_is_as_it_was(name):
    model = adapted(name)
    head, shared = head_of(model), head_of(model).weight
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before, plain = logits_of(model), logits_of(small(name, tie_word_embeddings=True))
    assert (before - plain).abs().max() > 0.1 * plain.abs().max(), "nothing to merge"
    head.merge()
    torch.testing.assert_close(logits_of(model), before)
    assert head.merged
    assert head.weight is not shared
    assert head.base_weight is shared
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(same_bits(found[key], state[key]) for key in state)
    head.unmerge()
    assert head.weight is shared
    torch.testing.assert_close(logits_of(model), before)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_copies_of_a_merged_model_stay_tied(name):
    model = adapted(name)
    before = logits_of(model)
    head_of(model).merge()
    copied = copy.deepcopy(model).float().double()
    torch.testing.assert_close(logits_of(copied), before, rtol=1e-5, atol=1e-5)
    head_of(copied).unmerge()
    source = copied.tied[f"{copied.head_layer}.weight"]
    assert head_of(copied).weight is copied.get_parameter(source)
    # What is loaded while merged goes to the weight that is shared.
    head_of(model).merge()
    model.load_state_dict(small(name).state_dict() | nn.lora_state_dict(model))
    assert head_of(model).weight is model.get_parameter(source)
    assert not head_of(model).merged


def test_training_goes_on_after_unmerging():
    """An optimizer that has the shared weight still trains it, and so does one of the head."""

    def trained(merging: bool) -> Any:
        model = adapted("LlamaForCausalLM")
        model.model.embed_tokens.weight.requires_grad_(True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            if merging:
                head_of(model).merge()
                head_of(model).unmerge()
            optimizer.zero_grad()
            loss_of(model, batch_of(model)).backward()
            optimizer.step()
        return model

    plain, merged = trained(False), trained(True)
    start = adapted("LlamaForCausalLM").state_dict()
    for key, tensor in plain.state_dict().items():
        assert same_bits(merged.state_dict()[key], tensor), key
    for key in ("lm_head.weight", "lm_head.lora_A", "model.embed_tokens.weight"):
        assert not torch.equal(plain.state_dict()[key], start[key]), key


def test_layers_tied_by_hand():
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    kept = first.weight.detach().clone()
    nn.apply_lora(model, "*", rank=2)
    for layer in model:
        torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 4)
    before = model(x)
    for layer in model:
        layer.merge()
    torch.testing.assert_close(model(x), before)
    assert same_bits(first.weight, kept)
    for layer in model:
        layer.unmerge()
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_conv1d(activation, dropout):
    torch.manual_seed(1)
    layer = Conv1D(6, 10, activation).double()
    torch.nn.init.normal_(layer.bias)
    model = torch.nn.Sequential(layer)
    x = torch.randn(3, 6, dtype=torch.float64)
    plain = model(x)
    assert nn.apply_lora(model, "0", rank=2, alpha=6.0, dropout=dropout) == ["0"]
    made: Any = model.eval()[0]
    assert (made.lora_A.shape, made.lora_B.shape) == ((2, 6), (10, 2))
    assert made.weight is layer.weight
    torch.testing.assert_close(model(x), plain)
    torch.nn.init.normal_(made.lora_B)
    weight = made.weight + 3.0 * (made.lora_B @ made.lora_A).t()
    whole = Conv1D(6, 10, activation).double()
    whole.weight, whole.bias = torch.nn.Parameter(weight), layer.bias
    before = model(x)
    torch.testing.assert_close(before, whole(x))
    made.merge()
    torch.testing.assert_close(model(x), before)
    made.unmerge()
    torch.testing.assert_close(model(x), before)
    model(x).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "0.lora_A",
        "0.lora_B",
    ]
    nn.merge_lora(model)
    assert type(model[0]) is Conv1D
    torch.testing.assert_close(model(x), before)


def test_gpt2_is_adapted_and_trains():
    model = small("GPT2LMHeadModel")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits_of(model)
    names = nn.apply_lora(model, ["c_attn", "c_fc", "c_proj"], rank=2)
    assert len(names) == 8
    torch.testing.assert_close(logits_of(model), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, batch_of(model))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    found = model.state_dict()
    assert all(same_bits(found[name], tensor) for name, tensor in state.items())
    learned = logits_of(model)
    nn.merge_lora(model)
    assert model.state_dict().keys() == state.keys()
    torch.testing.assert_close(logits_of(model), learned)


def test_gpt2_of_transformers_is_adapted():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(5)[None]
    before = theirs(ids).logits
    assert len(nn.apply_lora(theirs, ["c_attn", "c_fc"], rank=2)) == 2
    torch.testing.assert_close(theirs(ids).logits, before)
    layer = theirs.transformer.h[0].attn.c_attn
    torch.nn.init.normal_(layer.lora_B)
    changed = theirs(ids).logits
    assert not torch.allclose(changed, before)
    nn.merge_lora(theirs)
    torch.testing.assert_close(theirs(ids).logits, changed)
    assert theirs.state_dict().keys() == transformers.GPT2LMHeadModel(config).state_dict().keys()


def test_a_conv1d_with_hooks_is_named():
    model = torch.nn.ModuleDict({"c_fc": Conv1D(4, 4)})
    model["c_fc"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="c_fc is a Conv1D that cannot be replaced"):
        nn.apply_lora(model, "c_fc")
