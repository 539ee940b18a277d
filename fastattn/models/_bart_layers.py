"""What BART's layers are made of: the configuration, and attention between its projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..nn import Linear
from ._config import Config
from ._layers import ACTIVATIONS, ProjectedAttention, check_tokens, find_head_dim


@dataclass(kw_only=True)
class BartConfig(Config):
    """The fields of Hugging Face's `BartConfig` that a model depends on, with its defaults.

    Layers are not dropped as a whole: encoder_layerdrop and decoder_layerdrop must be 0. The
    embeddings of encoder and decoder are always tied.
    """

    model_type: ClassVar[str] = "bart"
    # What published configurations have and nothing reads, or what is said by another field too.
    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            "classif_dropout",
            "extra_pos_embeddings",
            "force_bos_token_to_be_generated",
            "normalize_embedding",
            "num_hidden_layers",
            "save_step",
        }
    )

    vocab_size: int = 50265
    max_position_embeddings: int = 1024
    d_model: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    classifier_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    pad_token_id: int = 1
    eos_token_id: int = 2
    decoder_start_token_id: int = 2
    tie_word_embeddings: bool = True
    num_labels: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.supports("activation_function", *ACTIVATIONS)
        self.supports("encoder_layerdrop", 0.0)
        self.supports("decoder_layerdrop", 0.0)
        check_tokens(self, "pad_token_id", "decoder_start_token_id")
        find_head_dim(self, "d_model", "encoder_attention_heads")
        find_head_dim(self, "d_model", "decoder_attention_heads")

    @property
    def initializer_range(self) -> float:
        """`init_std`."""
        return self.init_std


class BartAttention(ProjectedAttention):
    """Attention between an input and an output projection, which Hugging Face calls `out_proj`."""

    names = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(self, config: BartConfig, heads: int) -> None:
        columns = config.d_model
        super().__init__(columns // heads, config.attention_dropout)
        self.q_proj = Linear(columns, columns)
        self.k_proj = Linear(columns, columns)
        self.v_proj = Linear(columns, columns)
        self.out_proj = Linear(columns, columns)
