"""What models take of transformers' arguments: positions, embeddings, items, logits to keep."""

from typing import Any

import pytest
import torch
from small_models import CLASSES, LANGUAGE_MODELS, batch_of, small, unlabelled

from fastattn.models._decoder import CausalLM
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
DECODERS = [name for name in LANGUAGE_MODELS if issubclass(CLASSES[name], CausalLM)]
decoders = pytest.mark.parametrize("name", DECODERS)
OTHERS = [name for name in LANGUAGE_MODELS if name not in DECODERS]
others = pytest.mark.parametrize("name", OTHERS)


def make(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model = small(name)
    return model, unlabelled(model, batch_of(model))


def test_there_are_decoders():
    assert len(DECODERS) >= 6


@decoders
def test_positions_are_those_given(name: str):
    model, batch = make(name)
    length = batch["input_ids"].shape[1]
    places = torch.arange(length)[None]
    expected = model(**batch).logits
    torch.testing.assert_close(model(**batch, position_ids=places).logits, expected)
    stretched = model(**batch, position_ids=places // 2).logits
    assert not torch.allclose(stretched, expected)


@decoders
def test_embeddings_take_the_place_of_tokens(name: str):
    model, batch = make(name)
    expected = model(**batch).logits
    tokens = batch.pop("input_ids")
    body = getattr(model, model.base_prefix)
    embedding = body.wte if hasattr(body, "wte") else body.embed_tokens
    given = embedding(tokens)
    torch.testing.assert_close(model(**batch, inputs_embeds=given).logits, expected)
    for both in ({}, {"input_ids": tokens, "inputs_embeds": given}):
        with pytest.raises(TypeError, match="one of input_ids and inputs_embeds must be given"):
            model(**batch, **both)


@decoders
def test_losses_are_divided_by_the_items_given(name: str):
    model = small(name)
    batch = batch_of(model)
    count = (batch["labels"][:, 1:] != -100).sum()
    mean = model(**batch).loss
    for items in (count, int(count)):
        torch.testing.assert_close(model(**batch, num_items_in_batch=items).loss, mean)
    double = model(**batch, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(2 * double, mean)
    # Trainer counts the labels that follow a token where it finds these.
    assert model.accepts_loss_kwargs
    assert model.loss_type == "ForCausalLM"


@decoders
def test_logits_to_keep(name: str):
    model, batch = make(name)
    expected = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, expected[:, -2:])
    places = torch.tensor([0, 2])
    torch.testing.assert_close(model(**batch, logits_to_keep=places).logits, expected[:, places])
    labelled = batch_of(model)
    output = model(**labelled, logits_to_keep=1)
    torch.testing.assert_close(output.logits, expected[:, -1:])
    torch.testing.assert_close(output.loss, model(**labelled).loss)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_other_arguments_are_named(name: str):
    model, batch = make(name)
    expected = model(**batch).logits
    nothing = {"use_cache": False, "past_key_values": None, "output_attentions": False}
    torch.testing.assert_close(model(**batch, **nothing, return_dict=True).logits, expected)
    for other in ({"use_cache": True}, {"output_attentions": True}, {"casual": 1}):
        with pytest.raises(TypeError, match=f"{name}: {next(iter(other))}=.* is not supported"):
            model(**batch, **other)


def embedding_of(model: Any) -> Any:
    """What maps tokens to what a model's encoder begins with."""
    if hasattr(model, "bert"):
        return model.bert.embeddings.word_embeddings
    return model.base.embed


@others
def test_embeddings_take_the_place_of_tokens_of_encoders(name: str):
    model, batch = make(name)
    expected = model(**batch).logits
    embedding = embedding_of(model)
    tokens = batch.pop("input_ids")
    given = embedding(tokens)
    torch.testing.assert_close(model(**batch, inputs_embeds=given).logits, expected)
    with pytest.raises(TypeError, match="one of input_ids and inputs_embeds must be given"):
        model(**batch, input_ids=tokens, inputs_embeds=given)
    if "decoder_input_ids" in batch:
        read = batch.pop("decoder_input_ids")
        both = {"inputs_embeds": given, "decoder_inputs_embeds": embedding(read)}
        torch.testing.assert_close(model(**batch, **both).logits, expected)
        with pytest.raises(TypeError, match="one of decoder_input_ids and decoder_inputs_embeds"):
            model(**batch, **both, decoder_input_ids=read)


@others
def test_losses_of_encoders_are_divided_by_the_items_given(name: str):
    model = small(name)
    assert model.accepts_loss_kwargs
    batch = batch_of(model)
    batch["labels"][0, 1] = -100
    count = (batch["labels"] != -100).sum()
    mean = model(**batch).loss
    for items in (count, int(count)):
        torch.testing.assert_close(model(**batch, num_items_in_batch=items).loss, mean)
    double = model(**batch, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(2 * double, mean)
