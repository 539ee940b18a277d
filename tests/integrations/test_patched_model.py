"""What patching changes of a model of Hugging Face's, what it does not, and that it is undone."""

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
)

import fastattn
from families import FAMILIES, make_model, tokens
from fastattn.integrations.transformers.logits import DeferredLogits
from fastattn.ops.core.backends import INTERPRETED
from support import same_bits

pytestmark = pytest.mark.skipif(INTERPRETED, reason="asks for classes, not for numbers")

LLAMA = FAMILIES["llama"]
SOME = ["llama", "phi3", "gemma2", "gpt2", "gpt_oss", "bert", "t5", "vit"]


def call(model: Any) -> Any:
    """A training call."""
    return model(input_ids=tokens(), labels=tokens(), use_cache=False)


def state_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """All that the modules consist of, by identity where that is what counts."""
    return [
        (name, type(module), *((key, id(value)) for key, value in vars(module).items()))
        for name, module in model.named_modules(remove_duplicate=False)
    ]


@pytest.mark.parametrize("name", SOME)
def test_unpatching_undoes_it_exactly(name: str):
    family = FAMILIES[name]
    model = make_model(family, "sdpa" if name == "llama" else "eager")
    before, implementation = state_of(model), model.config._attn_implementation
    keys = list(model.state_dict())
    report = fastattn.patch(model)
    assert report.replaced
    assert report.changed
    assert model.config._attn_implementation == "fastattn"
    assert list(model.state_dict()) == keys
    assert fastattn.patch(model).replaced == fastattn.patch(model).changed == ()
    fastattn.unpatch(model)
    assert state_of(model) == before
    assert model.config._attn_implementation == implementation
    fastattn.unpatch(model)
    assert state_of(model) == before


def test_bits_come_back():
    model = make_model(LLAMA)
    logits, loss = call(model).logits, call(model).loss
    fastattn.patch(model)
    call(model)
    fastattn.unpatch(model)
    assert same_bits(call(model).logits, logits)
    assert same_bits(call(model).loss, loss)
    assert model.loss_function.__name__ == "ForCausalLMLoss"


def test_classes_keep_their_names():
    model = make_model(LLAMA)
    signature = inspect.signature(model.forward)
    names = [(type(m).__name__, type(m).__qualname__, type(m).__module__) for m in model.modules()]
    fastattn.patch(model)
    again = [(type(m).__name__, type(m).__qualname__, type(m).__module__) for m in model.modules()]
    assert again == names
    assert inspect.signature(model.forward) == signature
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert isinstance(model.model.norm, LlamaRMSNorm)


def test_another_model_of_the_class_is_not_touched():
    patched, other = make_model(LLAMA), make_model(LLAMA)
    before, expected = state_of(other), call(other).logits
    kinds = (LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm, type(other), nn.Linear)
    text = {kind: dict(vars(kind)) for kind in kinds}
    module = dict(vars(modeling_llama))
    mapping = dict(LOSS_MAPPING)
    fastattn.patch(patched)
    call(patched).loss.backward()
    assert state_of(other) == before
    assert same_bits(call(other).logits, expected)
    assert other.config._attn_implementation == "eager"
    assert all(dict(vars(kind)) == members for kind, members in text.items())
    assert dict(vars(modeling_llama)) == module
    assert dict(LOSS_MAPPING) == mapping


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_patched_and_can_be_unpatched(how: str):
    model = make_model(LLAMA)
    expected = call(model).logits
    fastattn.patch(model)
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
    assert call(copied).loss.item() == call(model).loss.item()
    fastattn.unpatch(copied)
    assert type(copied) is transformers.LlamaForCausalLM
    assert same_bits(call(copied).logits, expected)
    assert isinstance(call(model).logits, DeferredLogits)


def test_saved_as_their_own(tmp_path: Path):
    model = make_model(LLAMA)
    fastattn.patch(model)
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is transformers.LlamaForCausalLM
    assert plain.config.architectures == ["LlamaForCausalLM"]
    again = fastattn.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert again.config._attn_implementation == "fastattn"
    kept = fastattn.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert kept.config._attn_implementation == "eager"
    for loaded in (plain, again, kept):
        assert loaded.state_dict().keys() == model.state_dict().keys()
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)


def test_what_is_not_wanted_stays():
    kinds = {
        "norms": {"LlamaRMSNorm", "LlamaDecoderLayer"},
        "mlp": {"LlamaMLP"},
        "rotary": {"LlamaAttention"},
        "loss": {"LlamaForCausalLM", "Linear"},
        "attention": set(),
    }
    for option, its_own in kinds.items():
        model = make_model(LLAMA)
        report = fastattn.patch(model, **{option: False})
        found = {entry.theirs.__name__ for entry in report.replaced}
        assert found == set().union(*kinds.values()) - its_own
        assert bool(report.changed) == (option != "attention")


def test_a_part_of_a_model():
    model = make_model(LLAMA)
    expected = call(model).logits
    report = fastattn.patch(model.model.layers[0])
    kinds = [LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRMSNorm]
    assert [entry.theirs for entry in report.replaced] == kinds
    assert report.changed == ()
    torch.testing.assert_close(call(model).logits, expected)


def test_norms_keep_their_dtype():
    """As `prepare_model_for_kbit_training` leaves them: float32 beside 16 bits."""
    for name in ("llama", "gemma2", "gpt_oss", "t5"):
        model = make_model(FAMILIES[name]).bfloat16()
        norms = [m for m in model.modules() if "Norm" in type(m).__name__]
        x = torch.randn(3, norms[0].weight.numel())
        expected = []
        for patched in (False, True):
            if patched:
                fastattn.patch(model)
            found = []
            for dtype in (torch.bfloat16, torch.float32):
                norms[0].to(dtype)
                found += [norms[0](x.bfloat16()), norms[0](x), norms[0](x.double())]
            expected.append(found)
        for theirs, ours in zip(*expected, strict=True):
            assert ours.dtype is theirs.dtype
            torch.testing.assert_close(ours, theirs)


def test_the_printed_report():
    text = str(fastattn.patch(make_model(LLAMA)))
    assert "LlamaMLP           fastattn.patching.mlp.PatchedMLP" in text
    assert "attention eager  fastattn       1  (the model)" in text
