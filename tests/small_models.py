"""A small model of every class of every family, and what it is called with."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from fastattn import models
from fastattn.models import Model

TOKENS = 24
DECODER = {
    "vocab_size": TOKENS,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
ENCODER = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), DECODER),
    "mixtral": {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **DECODER,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "mlp_only_layers": [1],
    },
    "deepseek_v3": {
        **{k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")},
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "kv_lora_rank": 6,
        "q_lora_rank": None,
        "qk_rope_head_dim": 2,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 3},
    "gpt2": {
        "vocab_size": TOKENS,
        "n_positions": 16,
        "n_embd": 8,
        "n_layer": 2,
        "n_head": 2,
        "pad_token_id": 0,
    },
    "bert": {**ENCODER, "vocab_size": TOKENS, "max_position_embeddings": 16},
    "vit": {**ENCODER, "image_size": 4, "patch_size": 2},
    "t5": {
        "vocab_size": TOKENS,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": 2,
        "num_heads": 2,
    },
    "switch_transformers": {
        "vocab_size": TOKENS,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": 2,
        "num_heads": 2,
        "num_experts": 3,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        # For all tokens: with less room, padding would take that of other tokens.
        "expert_capacity": 16,
        "router_jitter_noise": 0.0,
    },
    "bart": {
        "vocab_size": TOKENS,
        "max_position_embeddings": 16,
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 12,
        "decoder_ffn_dim": 12,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
}
CLASSES: dict[str, type[Model]] = {
    kind.__name__: kind
    for module in dict.fromkeys(models.FAMILIES.values())
    for kind in import_module(f"fastattn.models.{module}").MODELS
}
"""Every class of every family, by its name."""

LANGUAGE_MODELS = {name: kind for name, kind in CLASSES.items() if hasattr(kind, "head")}
"""Those with logits of every token."""

CLASSIFIERS = {name: kind for name, kind in CLASSES.items() if "Classification" in name}


def small(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Model:
    """The model of a class, the same at every call, in evaluation mode.

    No parameter has a special value: norms that are 1 and biases that are 0 would hide mistakes.
    """
    kind = CLASSES[name]
    torch.manual_seed(0)
    config = kind.config_class(**{**SIZES[kind.config_class.model_type], **options})
    model = kind(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def batch_of(model: Model, sequences: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    """What the model is called with, labels among it if it has a head."""
    name = type(model).__name__.removeprefix("FSDP")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, TOKENS, (sequences, length), generator=generator)
    if name in CLASSIFIERS:
        # The token that ends a sequence, for those that are read there.
        ids[:, -1:] = getattr(model.config, "eos_token_id", 5)
    batch = {"input_ids": ids}
    if name.startswith("ViT"):
        batch = {"pixel_values": torch.randn(sequences, 3, 4, 4, generator=generator)}
    if name in ("T5Model", "BartModel", "SwitchTransformersModel"):
        batch["decoder_input_ids"] = ids
    if name in LANGUAGE_MODELS:
        batch["labels"] = ids.flip(1)
    if name in CLASSIFIERS:
        batch["labels"] = torch.arange(sequences) % 2
    return batch


def unlabelled(model: Model, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch without labels, and with what the decoder reads because of them."""
    batch = dict(batch)
    labels = batch.pop("labels", None)
    if labels is not None and type(model).__name__.endswith("ForConditionalGeneration"):
        start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
        batch["decoder_input_ids"] = torch.cat((start, labels[:, :-1]), dim=1)
    return batch


def loss_of(model: Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of labels, or for a body one of its hidden states."""
    output = model(**batch)
    return output.last_hidden_state.square().mean() if output.loss is None else output.loss


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model's stacks, which are what one shards."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [
        blocks
        for name, blocks in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    ]
    return [block for blocks in outer for block in blocks]


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """The gradient of every parameter, whole where it is sharded."""

    def whole(gradient: Any) -> Any:
        return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient

    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
