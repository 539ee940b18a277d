"""Hooks for every module: all children are called, also where kernels would do their work."""

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks

import fastattn
import fastattn.nn
from fastattn import models
from support import DEVICE, WIDEST, assert_close, same_bits

both_backends = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.kernels)]
)
# torch says so of its own layers too, where they cannot go through nested tensors.
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

C = 8
IDS = torch.arange(1, 7)[None]
TEXT = {"input_ids": IDS, "labels": IDS}
SMALL: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": C,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def block() -> nn.Module:
    layers = fastattn.nn.Attention(C, 2), fastattn.nn.GatedMLP(C, 12)
    norm = partial(fastattn.nn.RMSNorm, C)
    blocks = [fastattn.nn.TransformerBlock(*layers, norm)]
    return fastattn.nn.TransformerStack(blocks, fastattn.nn.LayerNorm(C))


def patched() -> nn.Module:
    layer = nn.TransformerEncoderLayer(C, 2, 12, activation=nn.GELU(), batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.LayerNorm(C), nn.Linear(C, 3))
    fastattn.patch(model, linear=True)
    return model


def family(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A model of a family of fastattn.models, by the name of its class."""

    def make() -> nn.Module:
        module = importlib.import_module(f"fastattn.models.{name.partition('.')[0]}")
        kind = getattr(module, name.partition(".")[2])
        return kind(kind.config_class(**sizes))

    return make


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "block": (block, {"x": (2, 5, C)}),
    "MLP": (lambda: fastattn.nn.MLP(C, 12, dropout=0.1), {"x": (2, 5, C)}),
    "patches": (lambda: fastattn.nn.PatchEmbedding(2, 1, C), {"images": (1, 1, 4, 4)}),
    "latent attention": (
        lambda: fastattn.nn.LatentAttention(
            C,
            2,
            kv_lora_rank=6,
            qk_nope_head_dim=4,
            qk_rope_head_dim=2,
            v_head_dim=4,
            rotary=fastattn.nn.RotaryEmbedding(2),
        ),
        {"x": (2, 5, C)},
    ),
    "patched": (patched, {"input": (2, 5, C)}),
    "decoder layer": (
        lambda: fastattn.nn.TransformerDecoderLayer(C, 2, 12, activation=nn.SiLU()),
        {"tgt": (2, 5, C), "memory": (3, 5, C)},
    ),
    "llama": (family("llama.LlamaForCausalLM", **SMALL), TEXT),
    "gemma": (family("gemma.Gemma2ForCausalLM", **SMALL, head_dim=4, num_key_value_heads=1), TEXT),
    "gpt2": (
        family("gpt2.GPT2LMHeadModel", vocab_size=20, n_embd=C, n_layer=1, n_head=2),
        TEXT,
    ),
    "bert": (family("bert.BertForMaskedLM", **SMALL), TEXT),
    "t5": (
        family(
            "t5.T5ForConditionalGeneration",
            vocab_size=20,
            d_model=C,
            d_kv=4,
            d_ff=12,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        ),
        TEXT,
    ),
    "bart": (
        family(
            "bart.BartForConditionalGeneration",
            vocab_size=20,
            d_model=C,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=12,
            decoder_ffn_dim=12,
        ),
        TEXT,
    ),
    "vit": (
        family(
            "vit.ViTForImageClassification",
            hidden_size=C,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
            image_size=4,
            patch_size=2,
        ),
        {"pixel_values": (1, 3, 4, 4)},
    ),
}

# Their parameters are arguments of attention and nothing else, as out_proj's in torch.nn.
NEVER_CALLED = r"(self_attn|multihead_attn)\.out_proj$|relative_attention_bias$"


@contextlib.contextmanager
def called(register: Callable[..., Any]) -> Iterator[list[nn.Module]]:
    """The modules that a hook for every module hears of."""
    heard: list[nn.Module] = []

    def hear(module: nn.Module, *_: Any) -> None:
        heard.append(module)

    handle = register(hear)
    try:
        yield heard
    finally:
        handle.remove()


def outputs_of(model: nn.Module, given: dict[str, Any]) -> Any:
    """What a call gives: the loss of a model that has one, or its logits."""
    output = model(**given)
    if isinstance(output, models.Output):
        return output.logits if output.loss is None else output.loss
    return output[0] if isinstance(output, tuple) else output


def prepared(case: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    make, given = CASES[case]
    model = make().to(DEVICE or "cpu", WIDEST)
    return model, {
        name: torch.randn(value, dtype=WIDEST, device=DEVICE or "cpu", requires_grad=True)
        if isinstance(value, tuple)
        else value.to(DEVICE or "cpu")
        for name, value in given.items()
    }


def assert_all_heard(model: nn.Module, heard: list[nn.Module]) -> None:
    silent = [
        name
        for name, module in model.named_modules()
        if type(module).forward is not nn.Module.forward
        and module not in heard
        and not re.search(NEVER_CALLED, name)
    ]
    assert not silent


@both_backends
@pytest.mark.parametrize("mode", ["training", "evaluation", "no gradients"])
@pytest.mark.parametrize("case", CASES)
def test_hooks_for_every_module_hear_of_every_child(case, mode, backend):
    model, given = prepared(case)
    model.train(mode == "training")
    with fastattn.backend(backend), torch.set_grad_enabled(mode != "no gradients"):
        expected = outputs_of(model, given)
        for register in (
            hooks.register_module_forward_pre_hook,
            hooks.register_module_forward_hook,
        ):
            with called(register) as heard:
                found = outputs_of(model, given)
            assert_all_heard(model, heard)
            if mode != "training":
                assert_close(found, expected)


@both_backends
@pytest.mark.parametrize(
    "register",
    [hooks.register_module_full_backward_pre_hook, hooks.register_module_full_backward_hook],
)
@pytest.mark.parametrize("case", ["block", "MLP", "patched", "decoder layer"])
def test_backward_hooks_for_every_module_hear_of_every_child(case, register, backend):
    model, given = prepared(case)
    with fastattn.backend(backend), called(register) as heard:
        outputs_of(model, given).sum().backward()
    assert_all_heard(model, heard)


@both_backends
def test_hooks_for_every_module_are_no_hooks_of_a_layer(backend):
    # What refuses a layer with hooks does so because they would be lost.
    model, given = prepared("latent attention")
    with fastattn.backend(backend):
        expected = model(**given, absorbed=True)
        with called(hooks.register_module_forward_hook):
            assert same_bits(model(**given, absorbed=True), expected)
            assert fastattn.nn.apply_lora(model, "kv_b_proj", rank=2) == ["kv_b_proj"]
