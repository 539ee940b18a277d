"""Llama and its kin beside transformers' models of the same parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_support import (
    BACKENDS,
    assert_near,
    check_autocast,
    check_checkpointing,
    check_compiled,
    compare_training,
    compare_way_back,
    compare_with_transformers,
    counting_batch,
    made,
    ours_on,
    token_batches,
)

from fastattn.models.llama import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from fastattn.ops.core.backends import INTERPRETED

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
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
        {
            "num_hidden_layers": 2,
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
        },
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


def batches_for(variant: str, backend: str) -> list[dict[str, torch.Tensor]]:
    _, head, options = VARIANTS[variant]
    found = token_batches(options["num_labels"] if head == "SequenceClassification" else None)
    # Interpreted kernels take seconds for each.
    return found if backend == "reference" else found[::2]


@variants
@backends
def test_logits_and_gradients_are_those_of_transformers(
    variant: str, backend: str, tmp_path: Path
) -> None:
    theirs, given = theirs_of(variant), batches_for(variant, backend)
    model = compare_with_transformers(theirs, tmp_path / "theirs", given, backend)
    if backend == "reference":
        compare_way_back(model, theirs, tmp_path / "ours", given[1])


@backends
def test_lengths_are_the_same_as_a_mask(backend: str) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    padded = token_batches()[1]
    lengths = {**padded, "attention_mask": padded["attention_mask"].sum(1)}
    a, b = (ours_on(model, batch, backend) for batch in (padded, lengths))
    assert_near(b.loss, a.loss, "loss")
    for name, gradient in a.gradients.items():
        assert gradient is not None
        assert b.gradients[name] is not None
        assert_near(b.gradients[name], gradient, name)


@pytest.mark.kernels
@pytest.mark.slow
def test_training_through_kernels_follows_the_reference() -> None:
    sizes = {**SIZES, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes)
    compare_training(lambda: LlamaForCausalLM(config), counting_batch)


@pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
class TestReference:
    def test_checkpointed_blocks(self) -> None:
        check_checkpointing(LlamaForCausalLM(LlamaConfig(**SIZES)), token_batches()[1])

    @pytest.mark.slow
    def test_one_graph(self) -> None:
        torch.manual_seed(0)
        check_compiled(
            Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 16})), token_batches()[2]
        )

    def test_masks_of_every_form(self) -> None:
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
        batch = token_batches()[1]
        ids, mask = batch["input_ids"], batch["attention_mask"]
        keep = mask.bool()[:, None, None]
        added = torch.where(keep, 0.0, -1e9)
        expected = model(ids, mask).logits
        for other in (mask.bool(), mask.float(), keep, keep.expand(-1, 4, 13, -1), added):
            torch.testing.assert_close(model(ids, other).logits[keep[:, 0, 0]], expected[mask == 1])
        for wrong in (mask[:, 1:], mask[:1], mask.float().sum(1)):
            with pytest.raises(
                ValueError, match=r"attention_mask must be \(2, 13\), \(2,\) lengths"
            ):
                model(ids, wrong)

    def test_a_head_with_hooks_is_called_for_the_loss(self) -> None:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
        batch = token_batches()[1]
        expected, calls = model(**batch).loss, []
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(model(**batch).loss, expected)
        assert calls

    def test_logits_are_computed_when_asked_for_and_once(self) -> None:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
        calls = []
        model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        batch = token_batches()[0]
        plain = model(batch["input_ids"])
        assert len(calls) == 1
        assert plain.logits is plain.logits
        # With hooks the loss calls the head too.
        output = model(**batch)
        assert len(calls) == 2
        assert output.logits is output.logits
        assert len(calls) == 3
        with pytest.raises(AttributeError, match="no head"):
            _ = model.model(batch["input_ids"]).logits

    def test_several_sequences_need_a_padding_token_to_be_classified(self) -> None:
        model = LlamaForSequenceClassification(LlamaConfig(**SIZES))
        ids = token_batches()[0]["input_ids"]
        assert model(ids[:1]).logits.shape == (1, 2)
        with pytest.raises(ValueError, match="pad_token_id must be set"):
            model(ids)

    def test_losses_of_classifiers_of_every_kind(self) -> None:
        ids = token_batches()[0]["input_ids"]
        kinds = {
            "regression": (1, torch.tensor([0.5, 2.0]), F.mse_loss),
            "single_label_classification": (3, torch.tensor([2, 0]), F.cross_entropy),
            "multi_label_classification": (
                3,
                torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]),
                F.binary_cross_entropy_with_logits,
            ),
        }
        for problem, (classes, labels, loss) in kinds.items():
            for said in (None, problem):
                config = LlamaConfig(**SIZES, num_labels=classes, pad_token_id=0, problem_type=said)
                output = LlamaForSequenceClassification(config)(ids, labels=labels)
                logits = output.logits[:, 0] if classes == 1 else output.logits
                torch.testing.assert_close(output.loss, loss(logits, labels))

    def test_autocast(self) -> None:
        check_autocast(LlamaForCausalLM(LlamaConfig(**SIZES)), token_batches()[1])
