"""The models that the demo trains: one of `fastattn.models` each, over bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..models import Config, model_class
from ..models.bert import BertConfig
from ..models.gemma import Gemma2Config
from ..models.gpt2 import GPT2Config
from ..models.llama import LlamaConfig
from ..models.mixtral import MixtralConfig
from ..models.t5 import T5Config
from .plain import PlainLlama
from .tasks import PADDING, MaskedBytes, NextByte, SpanCorruption, Task

VARIANTS = ("plain", "fused")


@dataclass(frozen=True)
class Sizes:
    """How large a model is, and how long it trains on how much."""

    steps: int
    width: int
    layers: int
    heads: int
    context: int
    batch: int
    dtype: str = "float32"
    family: str = "llama"


# What each family is called by its head.
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "mixtral": "MixtralForCausalLM",
    "gemma": "Gemma2ForCausalLM",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
}


def make_config(sizes: Sizes) -> Config:
    """The configuration of a model of this family.

    Dropout is off everywhere: two runs are to see the same numbers, and the text is never repeated.
    """
    vocabulary, width = make_task(sizes).vocabulary, sizes.width
    head_dim = width // sizes.heads
    # Two thirds of four times the width, rounded up to a multiple of 64: three matrices of a gated
    # MLP then cost as much as the two of an ordinary one.
    gated = -(-8 * width // (3 * 64)) * 64
    usual: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width if sizes.family == "bert" else gated,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": sizes.context,
    }
    match sizes.family:
        case "llama":
            return LlamaConfig(**usual, rms_norm_eps=1e-5, tie_word_embeddings=True)
        case "mixtral":
            # Two of four experts, each half as wide, cost a token what Llama's MLP does.
            usual["intermediate_size"] = gated // 2
            return MixtralConfig(
                **usual,
                num_key_value_heads=sizes.heads,
                num_local_experts=4,
                num_experts_per_tok=2,
                tie_word_embeddings=True,
            )
        case "gemma":
            return Gemma2Config(
                **usual,
                num_key_value_heads=1,
                head_dim=head_dim,
                query_pre_attn_scalar=head_dim,
                sliding_window=max(1, sizes.context // 2),
                pad_token_id=None,
            )
        case "bert":
            return BertConfig(
                **usual,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=None,
            )
        case "gpt2":
            return GPT2Config(
                vocab_size=vocabulary,
                n_positions=sizes.context,
                n_embd=width,
                n_layer=sizes.layers,
                n_head=sizes.heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        case _:
            return T5Config(
                vocab_size=vocabulary,
                d_model=width,
                d_kv=head_dim,
                d_ff=gated,
                num_layers=sizes.layers,
                num_heads=sizes.heads,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=PADDING,
                decoder_start_token_id=PADDING,
            )


def make_task(sizes: Sizes) -> Task:
    """What a model of this family learns."""
    if sizes.family == "bert":
        return MaskedBytes()
    return SpanCorruption(sizes.context) if sizes.family == "t5" else NextByte()


def make_model(sizes: Sizes, variant: str) -> nn.Module:
    """A model with initial values that depend on the sizes and on torch's seed alone.

    Of Llama the plain variant is one of PyTorch's modules, with the same values; of the other
    families both are the same model, which the plain run computes on the reference backend.
    """
    config: Any = make_config(sizes)
    chosen = {"model_type": config.model_type, "architectures": [FAMILIES[sizes.family]]}
    model = model_class(chosen)(config)
    if variant == "plain" and sizes.family == "llama":
        plain = PlainLlama(config)
        plain.load_state_dict(model.state_dict())
        return plain
    return model
