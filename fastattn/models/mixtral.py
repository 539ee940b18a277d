"""Mixtral and Qwen3-MoE: a Mistral and a Qwen3 whose blocks have experts.

Sources: Jiang et al., "Mixtral of Experts" (2024); Qwen Team, "Qwen3 Technical Report" (2025).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn as nn

from ..nn import Experts, MixtureOfExperts, TopKRouter
from ._base import Model
from ._config import ConfigError
from ._decoder import GATED
from ._experts import ExpertNames
from .llama import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    Qwen3Config,
)

BLOCK = r"\.block_sparse_moe\."
"""What Mixtral's checkpoints call the feed-forward layer."""


def check_experts(config: Any, experts: str) -> None:
    """As many experts of a token as there are, and none of what is not computed here.

    Args:
        config: the configuration.
        experts: the field that says how many experts there are.

    Raises:
        ConfigError: more are wanted, or the router's logits are to be returned.
    """
    config.supports("output_router_logits", False)
    count, chosen = getattr(config, experts), config.num_experts_per_tok
    if not 1 <= chosen <= count:
        raise ConfigError(
            f"{type(config).__name__}: num_experts_per_tok must be in [1, {count}], got {chosen}"
        )


def modernize_experts(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A config.json in which the number of experts has the family's name of two that are used."""
    for other in ("num_experts", "num_local_experts"):
        if other != name and other in values:
            values[name] = values.pop(other)
    return values


@dataclass(kw_only=True)
class MixtralConfig(MistralConfig):
    """A Mistral with num_local_experts in each block, of which a token has num_experts_per_tok.

    The loss that balances experts is `fastattn.load_balancing_loss` of what hooks on the routers
    keep; output_router_logits, with which transformers' models add it themselves, is not supported.
    """

    model_type: ClassVar[str] = "mixtral"

    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 1000000.0}
    )
    sliding_window: int | None = None
    num_experts_per_tok: int = 2
    num_local_experts: int = 8
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.supports("router_jitter_noise", 0.0)
        check_experts(self, "num_local_experts")

    @classmethod
    def modernize(cls, values: dict[str, Any]) -> dict[str, Any]:
        return modernize_experts(super().modernize(dict(values)), "num_local_experts")


@dataclass(kw_only=True)
class Qwen3MoeConfig(Qwen3Config):
    """A Qwen3 with num_experts in some blocks, of which a token has num_experts_per_tok.

    Experts are in every decoder_sparse_step-th block but those of mlp_only_layers. Of the loss that
    balances them, see `MixtralConfig`.
    """

    model_type: ClassVar[str] = "qwen3_moe"

    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 768
    num_experts_per_tok: int = 8
    num_experts: int = 128
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    mlp_only_layers: list[int] | None = None

    def __post_init__(self) -> None:
        # Its windows are those of every layer.
        self.max_window_layers = 0
        super().__post_init__()
        self.mlp_only_layers = self.mlp_only_layers or []
        check_experts(self, "num_experts")

    @classmethod
    def modernize(cls, values: dict[str, Any]) -> dict[str, Any]:
        return modernize_experts(super().modernize(dict(values)), "num_experts")

    def has_experts(self, layer: int) -> bool:
        """Whether a block has experts, or a feed-forward layer as Qwen3's."""
        assert self.mlp_only_layers is not None
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


class MixtralModel(LlamaModel):
    """A Mistral with experts."""

    config_class = MixtralConfig
    expert_names = ExpertNames("w1", "w3", "w2")
    renamed: ClassVar = {BLOCK: ".mlp."}
    written_as: ClassVar = {r"\.mlp\.": ".block_sparse_moe."}

    @classmethod
    def _mlp(cls, config: Any, layer: int) -> nn.Module:
        columns, experts = config.hidden_size, config.num_local_experts
        return MixtureOfExperts(
            TopKRouter(columns, experts, config.num_experts_per_tok),
            Experts(
                experts, columns, config.intermediate_size, activation=GATED[config.hidden_act]
            ),
        )


class MixtralForCausalLM(LlamaForCausalLM):
    """A Mixtral with the logits of the next token."""

    config_class = MixtralConfig
    body_class = MixtralModel
    expert_names = MixtralModel.expert_names
    renamed = MixtralModel.renamed
    written_as = MixtralModel.written_as


class MixtralForSequenceClassification(LlamaForSequenceClassification):
    """A Mixtral with one answer for a sequence, or a reward."""

    config_class = MixtralConfig
    body_class = MixtralModel
    expert_names = MixtralModel.expert_names
    renamed = MixtralModel.renamed
    written_as = MixtralModel.written_as


class Qwen3MoeModel(LlamaModel):
    """A Qwen3 with experts."""

    config_class = Qwen3MoeConfig
    expert_names = ExpertNames("gate_proj", "up_proj", "down_proj")

    @classmethod
    def _mlp(cls, config: Any, layer: int) -> nn.Module:
        if not config.has_experts(layer):
            return super()._mlp(config, layer)
        columns, experts, chosen = (
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
        )
        activation = GATED[config.hidden_act]
        return MixtureOfExperts(
            TopKRouter(columns, experts, chosen, normalize=config.norm_topk_prob),
            Experts(experts, columns, config.moe_intermediate_size, activation=activation),
        )


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    """A Qwen3-MoE with the logits of the next token."""

    config_class = Qwen3MoeConfig
    body_class = Qwen3MoeModel
    expert_names = Qwen3MoeModel.expert_names


class Qwen3MoeForSequenceClassification(LlamaForSequenceClassification):
    """A Qwen3-MoE with one answer for a sequence, or a reward."""

    config_class = Qwen3MoeConfig
    body_class = Qwen3MoeModel
    expert_names = Qwen3MoeModel.expert_names


MODELS: tuple[type[Model], ...] = (
    MixtralForCausalLM,
    MixtralForSequenceClassification,
    MixtralModel,
    Qwen3MoeForCausalLM,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeModel,
)
