"""gpt-oss: experts with biases and a clamped gate, sinks, and windows in every other layer.

Experts in mxfp4, in which it is published, are read as numbers of 16 or 32 bits.

Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn as nn

from ..nn import Attention, Experts, MixtureOfExperts, TopKRouter
from ._base import Model
from ._decoder import check_layer_types, find_window
from ._norms import Casting
from .llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from .mixtral import check_experts, modernize_experts


@dataclass(kw_only=True)
class GptOssConfig(LlamaConfig):
    """The shape of a gpt-oss; names and defaults are those of transformers' GptOssConfig.

    layer_types has "full_attention" or "sliding_attention" for each layer; if it is None, the first
    layer and every other one slide. Of the loss that balances experts, see `MixtralConfig`.
    """

    model_type: ClassVar[str] = "gpt_oss"
    # What an older name of num_experts_per_tok and a length that nothing depends on are called.
    harmless: ClassVar[frozenset[str]] = frozenset({"experts_per_token", "initial_context_length"})

    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    num_key_value_heads: int | None = 8
    head_dim: int | None = 64
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] = field(
        default_factory=lambda: {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        }
    )
    attention_bias: bool = True
    sliding_window: int | None = 128
    layer_types: list[str] | None = None
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        self.supports("hidden_act", "silu")
        if self.layer_types is None:
            self.layer_types = [
                "full_attention" if layer % 2 else "sliding_attention"
                for layer in range(self.num_hidden_layers)
            ]
        check_layer_types(self)
        check_experts(self, "num_local_experts")

    @classmethod
    def modernize(cls, values: dict[str, Any]) -> dict[str, Any]:
        return modernize_experts(super().modernize(dict(values)), "num_local_experts")

    def window(self, layer: int) -> int | None:
        return find_window(self, layer)

    @property
    def casting(self) -> Casting:
        return "float32"

    @property
    def sinks(self) -> bool:
        return True


class GptOssModel(LlamaModel):
    """A Llama with sinks and experts."""

    config_class = GptOssConfig
    renamed: ClassVar = {r"\.mlp\.router\.": ".mlp.gate."}
    written_as: ClassVar = {r"\.mlp\.gate\.": ".mlp.router."}

    @classmethod
    def _mlp(cls, config: Any, layer: int) -> nn.Module:
        columns, experts = config.hidden_size, config.num_local_experts
        chosen = config.num_experts_per_tok
        return MixtureOfExperts(
            TopKRouter(columns, experts, chosen, score="softmax_top_k", bias=True),
            Experts(
                experts,
                columns,
                config.intermediate_size,
                bias=True,
                interleaved=True,
                transposed=True,
                limit=config.swiglu_limit,
                alpha=config.swiglu_alpha,
                up_offset=1.0,
            ),
        )

    def initialize(self, module: nn.Module) -> None:
        """As in other models; sinks and the routers' biases are normal as well."""
        super().initialize(module)
        drawn = module.sinks if isinstance(module, Attention) else None
        drawn = module.bias if isinstance(module, TopKRouter) else drawn
        if drawn is not None:
            nn.init.normal_(drawn, std=self.config.initializer_range)


class GptOssForCausalLM(LlamaForCausalLM):
    """A gpt-oss with the logits of the next token."""

    config_class = GptOssConfig
    body_class = GptOssModel
    renamed = GptOssModel.renamed
    written_as = GptOssModel.written_as


class GptOssForSequenceClassification(LlamaForSequenceClassification):
    """A gpt-oss with one answer for a sequence, or a reward."""

    config_class = GptOssConfig
    body_class = GptOssModel
    renamed = GptOssModel.renamed
    written_as = GptOssModel.written_as


MODELS: tuple[type[Model], ...] = (
    GptOssForCausalLM,
    GptOssForSequenceClassification,
    GptOssModel,
)
