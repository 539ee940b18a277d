"""Tiny models of many families of Hugging Face's, made from configurations: nothing is downloaded.

Activations are smooth and every expert is chosen, so that rounding changes no side of a kink.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

import fastattn.integrations.transformers  # noqa: F401

VOCABULARY = 64
LENGTH = 14

DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {name: value for name, value in DECODER.items() if name != "head_dim"}
ENCODER: dict[str, Any] = {
    **{name: WIDE[name] for name in WIDE if name != "num_key_value_heads"},
    "hidden_act": "gelu",
}
TWO_KINDS = ["sliding_attention", "full_attention"]
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "hidden_act": "gelu",
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "activation_function": "gelu_new",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "activation_function": "gelu",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
WHISPER: dict[str, Any] = {
    **BART,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 64,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "apply_spec_augment": False,
}
WAV2VEC: dict[str, Any] = {
    **ENCODER,
    "conv_dim": (16, 16),
    "conv_stride": (4, 2),
    "conv_kernel": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "apply_spec_augment": False,
}


@dataclass(frozen=True)
class Family:
    """A family, and how a small model of it is made and called.

    Attributes:
        model: the name of its class.
        config: the name of its configuration's class.
        kind: "decoder", "encoder", "pair", "image" or "audio".
        options: of the configuration.
        has: what its attention needs beyond the plain.
        packs: whether its positions tell packed documents.
        pads: whether a mask of padding is taken.
    """

    model: str
    config: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    has: str = ""
    packs: bool = True
    pads: bool = True


def _decoder(name: str, has: str = "", base: dict[str, Any] = DECODER, **options: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", "decoder", {**base, **options}, has)


FAMILIES: dict[str, Family] = {
    "llama": _decoder("Llama", "GQA"),
    "mistral": _decoder("Mistral", "window", sliding_window=5),
    "qwen2": _decoder("Qwen2", "GQA", WIDE),
    "qwen3": _decoder("Qwen3", "norms of q and k"),
    "phi3": _decoder("Phi3", "packed projection", WIDE),
    "gemma2": _decoder(
        "Gemma2",
        "softcap, window",
        sliding_window=5,
        attn_logit_softcapping=5.0,
        layer_types=TWO_KINDS,
        query_pre_attn_scalar=8,
        hidden_activation="gelu_pytorch_tanh",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        "decoder",
        {**DECODER, "sliding_window": 5, "layer_types": TWO_KINDS, "query_pre_attn_scalar": 8},
        "window",
    ),
    "cohere2": _decoder("Cohere2", "window", sliding_window=5, layer_types=TWO_KINDS),
    "olmo2": _decoder("Olmo2", "norms of q and k", WIDE),
    "granite": _decoder("Granite", "scale", WIDE, attention_multiplier=0.25),
    "glm4": _decoder("Glm4", "GQA", partial_rotary_factor=0.5),
    "smollm3": _decoder("SmolLM3", "layers without positions", WIDE, no_rope_layers=[1, 0]),
    "starcoder2": _decoder("Starcoder2", "window", WIDE, sliding_window=5),
    "stablelm": _decoder("StableLm", "partial rotary", WIDE),
    "gpt_neox": _decoder(
        "GPTNeoX",
        "partial rotary",
        {name: WIDE[name] for name in WIDE if name != "num_key_value_heads"},
    ),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", "decoder", GPT2, "learned positions"),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        "decoder",
        {
            **{n: DECODER[n] for n in ("vocab_size", "hidden_size", "num_hidden_layers")},
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 64,
            "activation_function": "gelu",
            "pad_token_id": 0,
        },
        "learned positions",
        packs=False,
    ),
    "mixtral": _decoder("Mixtral", "experts", num_local_experts=2, num_experts_per_tok=2),
    "qwen3_moe": _decoder(
        "Qwen3Moe", "experts", num_experts=2, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "gpt_oss": _decoder(
        "GptOss",
        "sinks, window, experts",
        sliding_window=5,
        layer_types=TWO_KINDS,
        num_local_experts=2,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "llama4_text": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        "decoder",
        {
            **DECODER,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 5,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
        "chunks, experts",
        # The last layer has no positions, and its model adapts scores by places in the row.
        packs=False,
    ),
    "deepseek_v3": _decoder(
        "DeepseekV3",
        "MLA (24 and 16), experts",
        {name: WIDE[name] for name in WIDE if name != "num_key_value_heads"},
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=2,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        n_shared_experts=1,
    ),
    "bert": Family("BertForMaskedLM", "BertConfig", "encoder", ENCODER),
    "roberta": Family("RobertaForMaskedLM", "RobertaConfig", "encoder", ENCODER),
    "electra": Family(
        "ElectraForMaskedLM", "ElectraConfig", "encoder", {**ENCODER, "embedding_size": 32}
    ),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        "encoder",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        "encoder",
        {
            **ENCODER,
            "local_attention": 6,
            "layer_types": TWO_KINDS,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        "window to both sides",
    ),
    "t5": Family(
        "T5ForConditionalGeneration", "T5Config", "pair", T5, "relative bias with its gradient"
    ),
    "umt5": Family(
        "UMT5ForConditionalGeneration",
        "UMT5Config",
        "pair",
        T5,
        "relative bias with its gradient",
    ),
    "bart": Family("BartForConditionalGeneration", "BartConfig", "pair", BART, "cross attention"),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        "pair",
        WHISPER,
        "cross attention",
        pads=False,
    ),
    "vit": Family("ViTModel", "ViTConfig", "image", VISION),
    "dinov2": Family("Dinov2Model", "Dinov2Config", "image", VISION),
    "clip": Family("CLIPVisionModel", "CLIPVisionConfig", "image", VISION),
    "siglip": Family("SiglipVisionModel", "SiglipVisionConfig", "image", VISION),
    "wav2vec2": Family("Wav2Vec2Model", "Wav2Vec2Config", "audio", WAV2VEC, pads=False),
    "hubert": Family("HubertModel", "HubertConfig", "audio", WAV2VEC, pads=False),
}

INTERPRETED = (
    "llama",
    "gemma2",
    "gpt_oss",
    "llama4_text",
    "deepseek_v3",
    "modernbert",
    "t5",
    "bart",
    "vit",
    "wav2vec2",
)
"""Those that run on interpreted kernels as well, one of each kind of attention."""


def make_model(family: Family, implementation: str = "eager", **changes: Any) -> Any:
    """A model in training mode without dropout, with weights of a size at which attention counts.

    Args:
        family: which.
        implementation: the name of its attention.
        changes: of the configuration.
    """
    config = getattr(transformers, family.config)(**{**family.options, **changes})
    config._attn_implementation = implementation
    config._experts_implementation = "eager"
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name in vars(part):
            if "dropout" in name or name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
                setattr(part, name, 0.0)
            if name in ("attn_pdrop", "resid_pdrop", "embd_pdrop"):
                setattr(part, name, 0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, family.model)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.train()


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    """Random tokens, none of them a special one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (batch, length), generator=generator)


def inputs_of(family: Family) -> dict[str, torch.Tensor]:
    """What a model of the family is called with."""
    generator = torch.Generator().manual_seed(2)
    if family.kind == "image":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if family.kind == "audio":
        return {"input_values": torch.randn(2, 160, generator=generator)}
    if family.model.startswith("Whisper"):
        features = torch.randn(2, 8, 24, generator=generator)
        return {"input_features": features, "decoder_input_ids": tokens(length=9)}
    if family.kind == "pair":
        return {"input_ids": tokens(), "decoder_input_ids": tokens(length=9, seed=3)}
    return {"input_ids": tokens()}


Forward = Callable[..., torch.Tensor]


def output_of(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """The logits (B, S, vocabulary), or the last hidden states of a model without."""
    dtype = next(model.parameters()).dtype
    cast = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    decoder = isinstance(model, transformers.GenerationMixin) and "decoder_input_ids" not in cast
    output = model(**cast, use_cache=False) if decoder else model(**cast)
    return output.logits if "logits" in output else output.last_hidden_state
