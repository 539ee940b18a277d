"""Gemma and Gemma 2 beside transformers' models of the same parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import (
    BACKENDS,
    check_autocast,
    check_checkpointing,
    check_compiled,
    compare_training,
    compare_way_back,
    compare_with_transformers,
    counting_batch,
    made,
    token_batches,
)

from fastattn.models.gemma import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, ScaledEmbedding
from fastattn.ops.core.backends import INTERPRETED

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "max_position_embeddings": 32,
}
# Caps small enough to bend the scores and logits of so small a model, and a window of its length.
CAPPED = {
    "sliding_window": 4,
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 1.5,
}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma": ("Gemma", "CausalLM", {}),
    "gemma with biases, untied": (
        "Gemma",
        "CausalLM",
        {"attention_bias": True, "tie_word_embeddings": False, "num_hidden_layers": 1},
    ),
    "gemma2": ("Gemma2", "CausalLM", CAPPED),
    "gemma2 without caps": (
        "Gemma2",
        "CausalLM",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention"],
            "num_hidden_layers": 1,
        },
    ),
    "classifier": ("Gemma2", "SequenceClassification", {**CAPPED, "num_labels": 3}),
    "reward": ("Gemma", "SequenceClassification", {"num_labels": 1, "num_hidden_layers": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_gradients_are_those_of_transformers(
    variant: str, backend: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    family, head, options = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    theirs = made(lambda: getattr(transformers, f"{family}For{head}")(config))
    batches = token_batches(options["num_labels"] if head == "SequenceClassification" else None)
    # Interpreted kernels take seconds for each.
    given = batches if backend == "reference" else batches[::2]
    model = compare_with_transformers(theirs, tmp_path / "theirs", given, backend)
    if backend == "reference":
        compare_way_back(model, theirs, tmp_path / "ours", batches[1])


@pytest.mark.kernels
@pytest.mark.slow
def test_training_through_kernels_follows_the_reference() -> None:
    sizes = {**SIZES, **CAPPED, "hidden_size": 16, "head_dim": 8, "num_hidden_layers": 1}
    config = Gemma2Config(**{**sizes, "final_logit_softcapping": 20.0})
    compare_training(lambda: Gemma2ForCausalLM(config), counting_batch)


@pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
class TestReference:
    def test_checkpointed_blocks(self) -> None:
        model = Gemma2ForCausalLM(Gemma2Config(**SIZES, **CAPPED))
        check_checkpointing(model, token_batches()[1])

    @pytest.mark.slow
    def test_one_graph(self) -> None:
        model = Gemma2ForCausalLM(Gemma2Config(**SIZES, **CAPPED))
        check_compiled(model, token_batches()[2])

    def test_autocast(self) -> None:
        check_autocast(Gemma2ForCausalLM(Gemma2Config(**SIZES, **CAPPED)), token_batches()[1])

    def test_the_embedding_is_scaled_by_a_rounded_factor(self) -> None:
        embedding = ScaledEmbedding(4, 3072).to(torch.bfloat16)
        torch.nn.init.ones_(embedding.weight)
        assert embedding(torch.tensor([1])).unique().item() == 55.5

    def test_configurations_of_the_first_release(self) -> None:
        plain = {"hidden_act": "gelu", "rope_theta": 500.0, "rope_scaling": None}
        for older in (plain, {**plain, "hidden_activation": "gelu_pytorch_tanh"}):
            config = GemmaConfig.from_dict(older)
            assert config.hidden_act == "gelu_pytorch_tanh"
            assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
