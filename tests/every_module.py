"""A small instance of every module and family of models, and a call of each."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

import fastattn.nn as nn
from fastattn import models


class Case(NamedTuple):
    """A module, and what it is called with.

    Attributes:
        make: the module, on the default device; each call draws other parameters.
        inputs: shapes of floats, and tensors of integers.
        options: keyword arguments.
    """

    make: Callable[[], Any]
    inputs: tuple[tuple[int, ...] | torch.Tensor, ...] = ((2, 5, 8),)
    options: Mapping[str, Any] = MappingProxyType({})


ids = torch.arange(10).reshape(2, 5)
tokens = {"labels": ids}


def _latent() -> nn.LatentAttention:
    options = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}
    return nn.LatentAttention(8, 2, **options, rotary=nn.RotaryEmbedding(2))


def _attention() -> nn.Attention:
    return nn.Attention(8, 2, num_kv_heads=1, sinks=True, bias=True)


def _block(order: Any = "pre", norm: Any = nn.RMSNorm) -> nn.TransformerBlock:
    options = {"order": order, "cross_attn": nn.Attention(8, 2), "dropout": 0.0}
    return nn.TransformerBlock(_attention(), nn.GatedMLP(8, 12), partial(norm, 8), **options)


def _mixture(**options: Any) -> nn.MixtureOfExperts:
    router = nn.TopKRouter(8, 3, 2, bias=True, correction=True, wide=True, score="sigmoid")
    return nn.MixtureOfExperts(router, nn.Experts(3, 8, 6, bias=True), **options)


def _stack() -> nn.TransformerStack:
    layers = [nn.TransformerBlock(_attention(), nn.MLP(8, 12), partial(nn.LayerNorm, 8))] * 2
    return nn.TransformerStack(layers, nn.LayerNorm(8))


def _lora() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    nn.apply_lora(model, ["0", "1"], rank=2)
    return model


def _model(name: str, **fields: Any) -> Callable[[], Any]:
    """A model of a family, without dropout."""
    kind = getattr(models, name)
    return lambda: kind(kind.config_class(**fields)).eval()


_layer = partial(nn.TransformerEncoderLayer, 8, 2, 12, batch_first=True, dropout=0.0)
_decoder_layer = partial(nn.TransformerDecoderLayer, 8, 2, 12, batch_first=True, dropout=0.0)
_pair = ((2, 5, 8), (2, 3, 8))
_llama = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}
_llama |= {"vocab_size": 12, "intermediate_size": 12}
_bert = {**_llama, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_t5 = {"vocab_size": 12, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
_bart = {"vocab_size": 12, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
_bart |= {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 9}
_bart |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
_gpt2 = {"vocab_size": 12, "n_positions": 9, "n_embd": 8, "n_layer": 2, "n_head": 2}
_vit = {**_bert, "image_size": 4, "patch_size": 2}
del _vit["vocab_size"]

CASES: dict[str, Case] = {
    "AlibiPositions": Case(lambda: nn.Attention(8, 2, relative=nn.AlibiPositions(2))),
    "Attention": Case(_attention),
    "CrossEntropyLoss": Case(nn.CrossEntropyLoss, ((10, 12), ids.flatten())),
    "Dropout": Case(nn.Dropout),
    "Experts": Case(
        lambda: nn.Experts(4, 8, 6, interleaved=True, transposed=True),
        ((5, 8), ids.remainder(4).view(5, 2), (5, 2)),
    ),
    "GatedRMSNorm": Case(lambda: nn.GatedRMSNorm(8, group_size=4), ((2, 5, 8),) * 2),
    "GatedMLP": Case(lambda: nn.GatedMLP(8, 12, bias=True)),
    "LatentAttention": Case(_latent),
    "LayerNorm": Case(lambda: nn.LayerNorm(8)),
    "LearnedPositions": Case(lambda: nn.LearnedPositions(9, 8)),
    "Linear": Case(lambda: nn.Linear(8, 4)),
    "Linear with an activation": Case(lambda: nn.Linear(8, 4, activation="gelu")),
    "LinearCrossEntropyLoss": Case(
        lambda: nn.LinearCrossEntropyLoss(8, 12), ((10, 8), ids.flatten())
    ),
    "LinearLogProb": Case(
        lambda: nn.LinearLogProb(8, 12, return_entropy=True), ((10, 8), ids.flatten())
    ),
    "LogSoftmax": Case(lambda: nn.LogSoftmax(-1)),
    "LoRALinear": Case(_lora),
    "MLP": Case(lambda: nn.MLP(8, 12)),
    "MixtureOfExperts": Case(_mixture),
    "MixtureOfExperts, shared too": Case(
        lambda: _mixture(shared=nn.GatedMLP(8, 6), shared_gate=True)
    ),
    "PlainExperts": Case(
        lambda: nn.PlainExperts(4, 8, 6, bias=True, activation="gelu"),
        ((5, 8), ids.remainder(4).view(5, 2), (5, 2)),
    ),
    "MultiheadAttention": Case(lambda: nn.MultiheadAttention(8, 2), ((2, 5, 8),) * 3),
    "MultiheadAttention without weights": Case(
        lambda: nn.MultiheadAttention(8, 2), ((2, 5, 8),) * 3, {"need_weights": False}
    ),
    "PatchEmbedding": Case(lambda: nn.PatchEmbedding(2, 3, 8), ((2, 3, 4, 6),)),
    "RMSNorm": Case(lambda: nn.RMSNorm(8)),
    "RelativePositionBias": Case(lambda: nn.Attention(8, 2, relative=nn.RelativePositionBias(2))),
    "RotaryEmbedding": Case(lambda: nn.RotaryEmbedding(4), ((2, 2, 5, 4), (2, 1, 5, 4))),
    "SinusoidalPositions": Case(lambda: nn.SinusoidalPositions(8)),
    "Softmax": Case(lambda: nn.Softmax(-1)),
    "TopKRouter": Case(lambda: nn.TopKRouter(8, 4, 2, groups=2, top_groups=1)),
    "Transformer": Case(
        lambda: nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True), _pair
    ),
    "TransformerBlock": Case(_block, _pair),
    "TransformerBlock after": Case(partial(_block, "post", nn.LayerNorm), _pair),
    "TransformerDecoder": Case(lambda: nn.TransformerDecoder(_decoder_layer(), 1), _pair),
    "TransformerDecoderLayer": Case(partial(_decoder_layer, norm_first=True), _pair),
    "TransformerEncoder": Case(
        lambda: nn.TransformerEncoder(_layer(), 1, enable_nested_tensor=False)
    ),
    "TransformerEncoderLayer": Case(_layer),
    "TransformerEncoderLayer, evaluated": Case(lambda: _layer().eval().requires_grad_(False)),
    "TransformerEncoderLayer, gated": Case(partial(_layer, activation="swiglu")),
    "TransformerStack": Case(_stack),
    "BartForConditionalGeneration": Case(
        _model("BartForConditionalGeneration", **_bart, dropout=0.0), (ids,), tokens
    ),
    "BertForMaskedLM": Case(_model("BertForMaskedLM", **_bert), (ids,), tokens),
    "GPT2LMHeadModel": Case(_model("GPT2LMHeadModel", **_gpt2), (ids,), tokens),
    "Gemma2ForCausalLM": Case(
        _model("Gemma2ForCausalLM", **_llama, head_dim=4, num_key_value_heads=1), (ids,), tokens
    ),
    "LlamaForCausalLM": Case(_model("LlamaForCausalLM", **_llama), (ids,), tokens),
    "LlamaForSequenceClassification": Case(
        _model("LlamaForSequenceClassification", **_llama, pad_token_id=0), (ids,)
    ),
    "T5ForConditionalGeneration": Case(
        _model("T5ForConditionalGeneration", **_t5, tie_word_embeddings=False), (ids,), tokens
    ),
    "T5ForConditionalGeneration, gated": Case(
        _model("T5ForConditionalGeneration", **_t5, feed_forward_proj="gated-gelu"), (ids,), tokens
    ),
    "ViTForImageClassification": Case(_model("ViTForImageClassification", **_vit), ((2, 3, 4, 4),)),
}
"""By names that begin with the class that is shown, alone or in what it is a part of."""


def called(case: Case, module: Any, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Call a module with inputs that ask for gradients: all its outputs."""
    generator = torch.Generator("cpu").manual_seed(1)
    inputs = [
        given.to(device)
        if isinstance(given, torch.Tensor)
        else torch.randn(given, generator=generator, dtype=torch.float64, device="cpu")
        .to(device, dtype)
        .requires_grad_()
        for given in case.inputs
    ]
    options = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in case.options.items()
    }
    return list(tensors_in(module(*inputs, **options)))


def tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """The tensors that a module gives."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from tensors_in(part)
    elif isinstance(output, models.Output):
        for field in fields(output):
            if field.name not in ("head", "features"):
                yield from tensors_in(getattr(output, field.name))
        yield output.logits
