"""BART beside transformers' models of the same parameters."""

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
from fastattn.models.bart import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BartModel,
)
from fastattn.ops.core.backends import INTERPRETED

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "max_position_embeddings": 14,
    "encoder_layers": 2,
    "encoder_ffn_dim": 40,
    "encoder_attention_heads": 4,
    "decoder_layers": 2,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 2,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("ConditionalGeneration", {}),
    "everything": (
        "ConditionalGeneration",
        {
            "scale_embedding": True,
            "decoder_layers": 1,
            "activation_function": "relu",
        },
    ),
    "classifier": ("SequenceClassification", {}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def theirs_of(variant: str) -> Any:
    transformers = pytest.importorskip("transformers")
    head, options = VARIANTS[variant]
    config = transformers.BartConfig(**{**SIZES, **options})
    theirs = made(lambda: getattr(transformers, f"BartFor{head}")(config))
    if head == "ConditionalGeneration":
        theirs.final_logits_bias.normal_()
    return theirs


def batches(variant: str = "bart") -> list[dict[str, torch.Tensor]]:
    """A full batch, one padded at the right, and one padded at the left with inputs of its own."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (2, 13), generator=generator)
    labels = torch.randint(3, 64, (2, 9), generator=generator)
    found = []
    for padding in (slice(0, 0), slice(9, None), slice(None, 4)):
        mask = torch.ones_like(ids)
        mask[1, padding] = 0
        found.append({"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask})
        found[-1]["labels"] = labels.masked_fill(torch.arange(9) > 5 + len(found), -100)
    del found[0]["attention_mask"]
    if VARIANTS[variant][0] == "SequenceClassification":
        for batch, place in zip(found, (12, 8, 12), strict=True):
            batch["input_ids"][:, [0, place]] = 2
            batch["labels"] = torch.tensor([2, 0])
        return found
    found[2]["decoder_input_ids"] = torch.randint(3, 64, (2, 9), generator=generator)
    found[2]["decoder_attention_mask"] = torch.ones(2, 9, dtype=torch.long)
    found[2]["decoder_attention_mask"][0, 7:] = 0
    return found


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


def ours(**options: Any) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(**{**SIZES, **options}))


@pytest.mark.kernels
@pytest.mark.slow
def test_training_through_kernels_follows_the_reference() -> None:
    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        starts = torch.randint(2, (1, 1), generator=generator)
        ids = (starts + 3 * torch.arange(12)) % 64
        return {"input_ids": ids, "labels": ids[:, :6]}

    sizes = dict.fromkeys(
        (
            "encoder_attention_heads",
            "decoder_attention_heads",
            "encoder_layers",
            "decoder_layers",
        ),
        1,
    )
    compare_training(lambda: ours(d_model=16, **sizes, dropout=0.0), batch)


@pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
class TestReference:
    def test_checkpointed_blocks(self) -> None:
        check_checkpointing(ours(), batches()[1])

    def test_one_graph(self) -> None:
        model = ours(encoder_layers=1, decoder_layers=1).eval()
        check_compiled(model, batches()[2], VANISHING)

    def test_one_graph_of_a_classifier(self) -> None:
        model = classifier(encoder_layers=1, decoder_layers=1).eval()
        check_compiled(model, batches("classifier")[1], VANISHING)

    def test_autocast(self) -> None:
        check_autocast(ours().eval(), batches()[1], VANISHING)

    def test_every_dropout(self) -> None:
        names = ("dropout", "attention_dropout", "activation_dropout")
        check_dropouts(ours, batches()[1], names)
        names = (*names, "classifier_dropout")
        check_dropouts(classifier, batches("classifier")[1], names)

    def test_a_body_alone(self, tmp_path: Path) -> None:
        """Without tokens of its own, the decoder reads what the encoder does."""
        transformers = pytest.importorskip("transformers")
        theirs = made(lambda: transformers.BartModel(transformers.BartConfig(**SIZES)))
        model = BartModel.from_pretrained(save(theirs, tmp_path))
        batch = {name: batches()[1][name] for name in ("input_ids", "attention_mask")}
        wanted, found = theirs(**batch), model(**batch)
        for name in ("last_hidden_state", "encoder_last_hidden_state"):
            torch.testing.assert_close(
                getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-5
            )
        lacking = r"lacks: final_logits_bias$"
        with pytest.raises(CheckpointError, match=lacking):
            BartForConditionalGeneration.from_pretrained(tmp_path)
        head = BartForConditionalGeneration.from_pretrained(
            tmp_path, except_for=["final_logits_bias"]
        )
        assert not head.final_logits_bias.any()
        torch.testing.assert_close(
            head(**batch).logits, found.last_hidden_state @ model.shared.weight.T
        )

    def test_initial_values(self) -> None:
        transformers = pytest.importorskip("transformers")
        options = {**SIZES, "init_std": 0.1}
        theirs = transformers.BartForConditionalGeneration(transformers.BartConfig(**options))
        check_initial_values(ours(**options), theirs)

    def test_a_published_configuration(self) -> None:
        """What they say besides is nothing that a model depends on, and is kept."""
        besides = {"normalize_embedding": True, "normalize_before": False, "save_step": 81}
        config = BartConfig.from_dict({**SIZES, **besides, "classif_dropout": 0.1})
        assert config == BartConfig(**SIZES, extra=config.extra)
        assert besides.items() <= config.to_dict().items()

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(ConfigError, match=r"encoder_layerdrop must be one of 0\.0, got 0\.1"):
            BartConfig(encoder_layerdrop=0.1)
        with pytest.raises(ConfigError, match=r"activation_function.*'quick_gelu'"):
            BartConfig(activation_function="quick_gelu")
        with pytest.raises(ConfigError, match="decoder_attention_heads must divide d_model"):
            BartConfig(decoder_attention_heads=5)
        with pytest.raises(ConfigError, match="decoder_start_token_id must be a token, got None"):
            BartConfig.from_dict({"decoder_start_token_id": None})
        with pytest.raises(ValueError, match="there are 16 positions"):
            ours()(torch.ones(1, 15, dtype=torch.long))
        with pytest.raises(ValueError, match="every sequence must have the token 2"):
            classifier()(batches()[0]["input_ids"].clamp(min=3))


def classifier(**options: Any) -> BartForSequenceClassification:
    torch.manual_seed(0)
    return BartForSequenceClassification(BartConfig(**{**SIZES, **options}))
