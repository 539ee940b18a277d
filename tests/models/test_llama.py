"""Llama and its kin beside transformers' models of the same parameters."""

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
    made,
)

from fastattn.models.llama import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from fastattn.ops.backends import INTERPRETED

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "CausalLM", {}),
    "everything": (
        "Llama",
        "CausalLM",
        {
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 12,
            "rope_parameters": LLAMA3,
        },
    ),
    "beyond its positions": ("Llama", "CausalLM", {"max_position_embeddings": 8}),
    "classifier": ("Llama", "SequenceClassification", {"num_labels": 3, "pad_token_id": 0}),
    "mistral": ("Mistral", "CausalLM", {"sliding_window": 5}),
    "reward": (
        "Mistral",
        "SequenceClassification",
        {"num_labels": 1, "pad_token_id": 0, "sliding_window": None},
    ),
    "qwen2": (
        "Qwen2",
        "CausalLM",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", "CausalLM", {"head_dim": 16}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def theirs_of(variant: str) -> Any:
    transformers = pytest.importorskip("transformers")
    family, head, options = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    return made(lambda: getattr(transformers, f"{family}For{head}")(config))


def batches(classes: int | None = None, length: int = 13) -> list[dict[str, torch.Tensor]]:
    """A full batch, one padded at the right, and one padded at the left."""
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(2))
    found = []
    for hidden in (slice(0, 0), slice(9, None), slice(None, 4)):
        mask = torch.ones_like(ids)
        mask[1, hidden] = 0
        tokens = ids.where(mask.bool(), 0)
        labels = ids.masked_fill(mask == 0, -100)
        if classes is not None:
            labels = torch.tensor([2, 0]) if classes > 1 else torch.tensor([0.5, -2.0])
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    del found[0]["attention_mask"]
    return found


def batches_for(variant: str) -> list[dict[str, torch.Tensor]]:
    _, head, options = VARIANTS[variant]
    return batches(options["num_labels"] if head == "SequenceClassification" else None)


@variants
@backends
def test_logits_and_gradients_are_those_of_transformers(
    variant: str, backend: str, tmp_path: Path
) -> None:
    theirs, given = theirs_of(variant), batches_for(variant)
    model = compare_with_transformers(theirs, tmp_path / "theirs", given, backend)
    if backend == "reference":
        compare_way_back(model, theirs, tmp_path / "ours", given[1])


@backends
def test_lengths_are_the_same_as_a_mask(backend: str) -> None:
    from model_support import assert_near, ours_on

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    padded = batches()[1]
    lengths = {**padded, "attention_mask": padded["attention_mask"].sum(1)}
    a, b = (ours_on(model, batch, backend) for batch in (padded, lengths))
    assert_near(b.loss, a.loss, "loss")
    for name, gradient in a.gradients.items():
        assert gradient is not None
        assert b.gradients[name] is not None
        assert_near(b.gradients[name], gradient, name)


def small() -> LlamaForCausalLM:
    config = LlamaConfig(**{**SIZES, "hidden_size": 16, "num_hidden_layers": 1})
    return LlamaForCausalLM(config)


@pytest.mark.kernels
@pytest.mark.slow
def test_training_through_kernels_follows_the_reference() -> None:
    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        starts = torch.randint(64, (2, 1), generator=generator)
        ids = (starts + 3 * torch.arange(16)) % 64
        return {"input_ids": ids, "labels": ids}

    compare_training(small, batch)


@pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
class TestReference:
    def test_checkpointed_blocks(self) -> None:
        check_checkpointing(LlamaForCausalLM(LlamaConfig(**SIZES)), batches()[1])

    def test_one_graph(self) -> None:
        torch.manual_seed(0)
        check_compiled(Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 16})), batches()[2])

    def test_autocast(self) -> None:
        check_autocast(LlamaForCausalLM(LlamaConfig(**SIZES)), batches()[1])
