"""The models that the demo trains: one of `fastattn.models` each, over bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..models import Config, model_class
from ..models.bert import BertConfig
from ..models.gemma import Gemma2Config
from ..models.gpt2 import GPT2Config
from ..models.llama import LlamaConfig
from ..models.t5 import T5Config
from .plain import PlainLlama
from .tasks import PADDING, MaskedBytes, NextByte, SpanCorruption, Task

VARIANTS = ("plain", "fused")


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that determine the model's parameters, and the longest text it reads at once."""

    width: int
    layers: int
    heads: int
    context: int
    family: str = "llama"


def _gated_width(width: int) -> int:
    """Two thirds of four times the width, rounded up to a multiple of 64.

    Three matrices of a gated MLP then cost as much as the two of an ordinary one.
    """
    return -(-8 * width // (3 * 64)) * 64


def _llama(sizes: ModelSizes) -> Config:
    return LlamaConfig(
        vocab_size=NextByte.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=_gated_width(sizes.width),
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )


def _gemma(sizes: ModelSizes) -> Config:
    return Gemma2Config(
        vocab_size=NextByte.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=_gated_width(sizes.width),
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=1,
        head_dim=sizes.width // sizes.heads,
        query_pre_attn_scalar=sizes.width // sizes.heads,
        max_position_embeddings=sizes.context,
        sliding_window=max(1, sizes.context // 2),
        pad_token_id=None,
    )


def _gpt2(sizes: ModelSizes) -> Config:
    return GPT2Config(
        vocab_size=NextByte.vocabulary,
        n_positions=sizes.context,
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def _bert(sizes: ModelSizes) -> Config:
    return BertConfig(
        vocab_size=MaskedBytes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.context,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,
    )


def _t5(sizes: ModelSizes) -> Config:
    return T5Config(
        vocab_size=SpanCorruption(sizes.context).vocabulary,
        d_model=sizes.width,
        d_kv=sizes.width // sizes.heads,
        d_ff=_gated_width(sizes.width),
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PADDING,
        decoder_start_token_id=PADDING,
    )


# Dropout is off everywhere: two runs are to see the same numbers, and the text is never repeated.
FAMILIES: dict[str, tuple[str, Callable[[ModelSizes], Config]]] = {
    "llama": ("LlamaForCausalLM", _llama),
    "gpt2": ("GPT2LMHeadModel", _gpt2),
    "gemma": ("Gemma2ForCausalLM", _gemma),
    "bert": ("BertForMaskedLM", _bert),
    "t5": ("T5ForConditionalGeneration", _t5),
}


def make_task(sizes: ModelSizes) -> Task:
    """What a model of this family learns."""
    if sizes.family == "bert":
        return MaskedBytes()
    return SpanCorruption(sizes.context) if sizes.family == "t5" else NextByte()


def make_model(sizes: ModelSizes, variant: str) -> nn.Module:
    """A model with initial values that depend on the sizes and on torch's seed alone.

    Of Llama the plain variant is one of PyTorch's modules, with the same values; of the other
    families both are the same model, which the plain run computes on the reference backend.
    """
    name, configure = FAMILIES[sizes.family]
    config: Any = configure(sizes)
    model = model_class({"model_type": config.model_type, "architectures": [name]})(config)
    if variant == "plain" and sizes.family == "llama":
        plain = PlainLlama(config)
        plain.load_state_dict(model.state_dict())
        return plain
    return model
