"""DeepSeek-V3: latent attention, and experts of groups beside shared ones.

Weights in fp8, in which it is published, are read as numbers of 16 or 32 bits. The layer that
predicts further tokens is left out.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch.nn as nn

from ..nn import (
    Experts,
    GatedMLP,
    LatentAttention,
    MixtureOfExperts,
    TopKRouter,
    TransformerBlock,
)
from ._base import Model
from ._config import ConfigError
from ._decoder import GATED
from ._experts import ExpertNames
from ._norms import FamilyRMSNorm
from ._rotary import rotary_embedding
from .llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from .mixtral import check_experts

LATENT_EPS = 1e-6
"""What the norms of latents add to the mean of squares, whatever the others do."""


@dataclass(kw_only=True)
class DeepseekV3Config(LlamaConfig):
    """The shape of a DeepSeek-V3; names and defaults are those of transformers' DeepseekV3Config.

    The first first_k_dense_replace blocks have no experts. Of the loss that balances experts, see
    `MixtralConfig`.
    """

    model_type: ClassVar[str] = "deepseek_v3"
    # What follows from other fields, the layer that is left out, and the loss of experts' loads.
    harmless: ClassVar[frozenset[str]] = frozenset(
        (
            "aux_loss_alpha",
            "ep_size",
            "moe_layer_freq",
            "num_mtp_layers",
            "num_nextn_predict_layers",
            "qk_head_dim",
            "seq_aux",
        )
    )

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    routed_scaling_factor: float = 2.5
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    n_group: int = 8
    topk_group: int = 4
    first_k_dense_replace: int = 3
    norm_topk_prob: bool = True
    max_position_embeddings: int = 4096
    rope_interleave: bool = True
    output_router_logits: bool = False
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"

    def __post_init__(self) -> None:
        super().__post_init__()
        # transformers calls the part of a head that is turned a head.
        self.head_dim = self.qk_rope_head_dim
        self.supports("num_key_value_heads", self.num_attention_heads)
        self.supports("scoring_func", "sigmoid")
        self.supports("topk_method", "noaux_tc")
        check_experts(self, "n_routed_experts")
        if self.n_routed_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(
                f"DeepseekV3Config: n_group must divide n_routed_experts and topk_group be one of "
                f"them, got {self.n_group}, {self.n_routed_experts} and {self.topk_group}"
            )

    @property
    def scale(self) -> float:
        """What scores are multiplied by: YaRN changes it where the configuration says so."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        rope = self.rope_parameters
        weight = rope.get("mscale_all_dim") or 0.0
        if rope.get("rope_type", "default") == "default" or not weight or rope["factor"] <= 1.0:
            return scale
        return scale * (0.1 * weight * math.log(rope["factor"]) + 1.0) ** 2


class DeepseekV3Model(LlamaModel):
    """Embedding, blocks and the last norm of a DeepSeek-V3."""

    config_class = DeepseekV3Config
    expert_names = ExpertNames("gate_proj", "up_proj", "down_proj")
    ignored: ClassVar[Sequence[str]] = (*LlamaModel.ignored, r"\blayers\.61\.")
    kept_wide: ClassVar[Sequence[str]] = (r"\be_score_correction_bias$",)

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        self.rotary_emb = rotary_embedding(
            config.rope_parameters,
            config.qk_rope_head_dim,
            config.max_position_embeddings,
            interleaved=config.rope_interleave,
        )

    @classmethod
    def _block(cls, config: Any, layer: int) -> TransformerBlock:
        attention = LatentAttention(
            config.hidden_size,
            config.num_attention_heads,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            q_lora_rank=config.q_lora_rank,
            norm=partial(FamilyRMSNorm, eps=LATENT_EPS),
            scale=config.scale,
            bias=config.attention_bias,
            dropout=config.attention_dropout,
        )
        norm = partial(FamilyRMSNorm, config.hidden_size, config.rms_norm_eps)
        return TransformerBlock(attention, cls._mlp(config, layer), norm)

    @classmethod
    def _mlp(cls, config: Any, layer: int) -> nn.Module:
        if layer < config.first_k_dense_replace:
            return super()._mlp(config, layer)
        columns, experts, inside = (
            config.hidden_size,
            config.n_routed_experts,
            config.moe_intermediate_size,
        )
        activation = GATED[config.hidden_act]
        router = TopKRouter(
            columns,
            experts,
            config.num_experts_per_tok,
            score="sigmoid",
            normalize=config.norm_topk_prob,
            groups=config.n_group,
            top_groups=config.topk_group,
            scale=config.routed_scaling_factor,
            correction=True,
            wide=True,
        )
        shared = GatedMLP(columns, inside * config.n_shared_experts, activation=activation)
        return MixtureOfExperts(
            router, Experts(experts, columns, inside, activation=activation), shared
        )


class DeepseekV3ForCausalLM(LlamaForCausalLM):
    """A DeepSeek-V3 with the logits of the next token."""

    config_class = DeepseekV3Config
    body_class = DeepseekV3Model
    expert_names = DeepseekV3Model.expert_names
    ignored = DeepseekV3Model.ignored
    kept_wide = DeepseekV3Model.kept_wide


class DeepseekV3ForSequenceClassification(LlamaForSequenceClassification):
    """A DeepSeek-V3 with one answer for a sequence, or a reward."""

    config_class = DeepseekV3Config
    body_class = DeepseekV3Model
    expert_names = DeepseekV3Model.expert_names
    ignored = DeepseekV3Model.ignored
    kept_wide = DeepseekV3Model.kept_wide


MODELS: tuple[type[Model], ...] = (
    DeepseekV3ForCausalLM,
    DeepseekV3ForSequenceClassification,
    DeepseekV3Model,
)
