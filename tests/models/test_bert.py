"""BERT beside transformers' models of the same parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import (
    BACKENDS,
    VANISHING,
    check_autocast,
    check_checkpointing,
    check_compiled,
    check_dropouts,
    check_initial_values,
    compare_training,
    compare_way_back,
    compare_with_transformers,
    made,
    save,
)

from fastattn.models import CheckpointError, ConfigError
from fastattn.models.bert import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)
from fastattn.ops.core.backends import INTERPRETED

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("MaskedLM", {}),
    "untied, other activation": (
        "MaskedLM",
        {"tie_word_embeddings": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
    ),
    "classifier": ("SequenceClassification", {"num_labels": 3}),
    "reward": ("SequenceClassification", {"num_labels": 1, "pad_token_id": None}),
    "several labels": (
        "SequenceClassification",
        {"num_labels": 2, "problem_type": "multi_label_classification"},
    ),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def theirs_of(variant: str) -> Any:
    transformers = pytest.importorskip("transformers")
    head, options = VARIANTS[variant]
    config = transformers.BertConfig(**{**SIZES, **options})
    return made(lambda: getattr(transformers, f"BertFor{head}")(config))


def batches(variant: str = "bert") -> list[dict[str, torch.Tensor]]:
    """A full batch, one padded at the right, and one padded at the left with two segments."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (2, 13), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.4
    found = []
    for padding in (slice(0, 0), slice(9, None), slice(None, 4)):
        mask = torch.ones_like(ids)
        mask[1, padding] = 0
        tokens = ids.masked_fill(masked, 1).where(mask.bool(), 0)
        found.append({"input_ids": tokens, "attention_mask": mask})
        found[-1]["labels"] = labels_for(variant, ids.where(masked & mask.bool(), -100))
    del found[0]["attention_mask"]
    found[2]["token_type_ids"] = (torch.arange(13) > 6).long().expand(2, -1)
    return found


def labels_for(variant: str, tokens: torch.Tensor) -> torch.Tensor:
    head, options = VARIANTS[variant]
    if head == "MaskedLM":
        return tokens
    if "problem_type" in options:
        return torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    return torch.tensor([2, 0]) if options["num_labels"] > 1 else torch.tensor([0.5, -2.0])


@variants
@backends
def test_logits_and_gradients_are_those_of_transformers(
    variant: str, backend: str, tmp_path: Path
) -> None:
    theirs, given = theirs_of(variant), batches(variant)
    if backend == "triton":
        del given[1]
    model = compare_with_transformers(
        theirs, tmp_path / "theirs", given, backend, vanishing=VANISHING
    )
    if backend == "reference":
        compare_way_back(model, theirs, tmp_path / "ours", given[2])


def masked_lm(**options: Any) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**{**SIZES, **options}))


@pytest.mark.kernels
@pytest.mark.slow
def test_training_through_kernels_follows_the_reference() -> None:
    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        starts = torch.randint(2, (1, 1), generator=generator)
        ids = (starts + 3 * torch.arange(12)) % 64
        masked = torch.arange(12) % 3 == 1
        return {"input_ids": ids.masked_fill(masked, 0), "labels": ids.where(masked, -100)}

    undropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}
    compare_training(lambda: masked_lm(**sizes, **undropped), batch)


@pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
class TestReference:
    def test_checkpointed_blocks(self) -> None:
        check_checkpointing(masked_lm(), batches()[1])

    def test_one_graph(self) -> None:
        check_compiled(masked_lm(num_hidden_layers=1).eval(), batches()[2], VANISHING)

    def test_autocast(self) -> None:
        check_autocast(masked_lm().eval(), batches()[1], VANISHING)

    def test_every_dropout(self) -> None:
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        check_dropouts(lambda **rates: masked_lm(**rates), batches()[1], names)
        names = (*names, "classifier_dropout")
        check_dropouts(classifier, batches("classifier")[1], names)

    def test_positions_of_ones_own(self) -> None:
        model, batch = masked_lm().eval(), batches()[1]
        places = torch.arange(13).flip(0)
        flipped = {name: tensor.flip(1) for name, tensor in batch.items()}
        expected = model(**batch).logits
        found = model(**flipped, position_ids=places).logits
        torch.testing.assert_close(found.flip(1), expected)

    def test_a_body_alone(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        theirs = made(lambda: transformers.BertModel(transformers.BertConfig(**SIZES)))
        model = BertModel.from_pretrained(save(theirs, tmp_path))
        batch = {name: tensor for name, tensor in batches()[2].items() if name != "labels"}
        wanted, found = theirs(**batch), model(**batch)
        torch.testing.assert_close(found.pooler_output, wanted.pooler_output)
        seen = batch["attention_mask"].bool()
        torch.testing.assert_close(
            found.last_hidden_state[seen], wanted.last_hidden_state[seen], rtol=1e-4, atol=1e-5
        )

    def test_a_published_checkpoint(self, tmp_path: Path) -> None:
        """The first ones have norms' older names, and heads of which one is read."""
        transformers = pytest.importorskip("transformers")
        from safetensors.torch import load_file, save_file

        config = transformers.BertConfig(**SIZES, architectures=["BertForMaskedLM"])
        theirs = made(lambda: transformers.BertForPreTraining(config))
        save(theirs, tmp_path)
        older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        tensors = load_file(tmp_path / "model.safetensors")
        for new, old in older.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        model = BertForMaskedLM.from_pretrained(tmp_path)
        ids = batches()[0]["input_ids"]
        torch.testing.assert_close(
            model(ids).logits, theirs(ids).prediction_logits, rtol=1e-4, atol=1e-5
        )

    def test_a_published_configuration(self) -> None:
        """What they say besides is nothing that a model depends on, and is kept."""
        besides = {"directionality": "bidi", "pooler_type": "first_token_transform"}
        config = BertConfig.from_dict({**SIZES, **besides, "position_embedding_type": "absolute"})
        assert config == BertConfig(**SIZES, extra=config.extra)
        assert besides.items() <= config.to_dict().items()

    def test_a_classifier_of_a_language_model(self, tmp_path: Path) -> None:
        masked_lm().save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"lacks: bert\.pooler.*classifier.*cls\.pred"):
            BertForSequenceClassification.from_pretrained(tmp_path)
        model = BertForSequenceClassification.from_pretrained(
            tmp_path, except_for=["bert.pooler", "classifier", "cls"]
        )
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())

    def test_initial_values(self) -> None:
        transformers = pytest.importorskip("transformers")
        options = {**SIZES, "initializer_range": 0.1}
        theirs = transformers.BertForMaskedLM(transformers.BertConfig(**options))
        check_initial_values(masked_lm(**options), theirs)

    def test_what_is_not_supported(self) -> None:
        with pytest.raises(ConfigError, match=r"position_embedding_type.*'relative_key'"):
            BertConfig(position_embedding_type="relative_key")
        with pytest.raises(ConfigError, match=r"hidden_act.*'quick_gelu'"):
            BertConfig(hidden_act="quick_gelu")
        with pytest.raises(ConfigError, match="num_attention_heads must divide hidden_size"):
            BertConfig(num_attention_heads=5)
        with pytest.raises(ConfigError, match="is_decoder=True"):
            BertConfig.from_dict({"model_type": "bert", "is_decoder": True})
        with pytest.raises(ConfigError, match=r"of type 'vit', not 'bert'"):
            BertConfig.from_dict({"model_type": "vit"})


def classifier(**options: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**{**SIZES, "num_labels": 3, **options}))
