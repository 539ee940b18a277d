"""ViT beside transformers' models of the same parameters."""

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
from fastattn.models.vit import ViTConfig, ViTForImageClassification, ViTModel
from fastattn.ops.core.backends import INTERPRETED

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
    "num_labels": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "vit": {},
    "other shapes": {
        "image_size": [8, 12],
        "patch_size": [4, 2],
        "num_channels": 1,
        "qkv_bias": False,
        "hidden_act": "gelu_new",
    },
    "regression": {"num_labels": 1},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
backends = pytest.mark.parametrize("backend", BACKENDS)

# What transformers' modules are called, and their parameters in its checkpoints.
NAMES = {
    "layers.": "encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def stored(name: str) -> str:
    """The name in a checkpoint of a parameter of transformers' model."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def theirs_of(variant: str, kind: str = "ViTForImageClassification") -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**{**SIZES, **VARIANTS[variant]})
    return made(lambda: getattr(transformers, kind)(config))


def batch(variant: str = "vit") -> dict[str, torch.Tensor]:
    config = ViTConfig(**{**SIZES, **VARIANTS[variant]})
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, config.num_channels, *config.image, generator=generator)
    labels = torch.tensor([2, 0]) if config.num_labels > 1 else torch.tensor([0.5, -2.0])
    return {"pixel_values": pixels, "labels": labels}


@variants
@backends
def test_logits_and_gradients_are_those_of_transformers(
    variant: str, backend: str, tmp_path: Path
) -> None:
    theirs, given = theirs_of(variant), batch(variant)
    model = compare_with_transformers(
        theirs, tmp_path / "theirs", [given], backend, renamed=stored, vanishing=VANISHING
    )
    if backend == "reference":
        compare_way_back(model, theirs, tmp_path / "ours", given)


def ours(**options: Any) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**{**SIZES, **options}))


@pytest.mark.kernels
@pytest.mark.slow
def test_training_through_kernels_follows_the_reference() -> None:
    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        labels = torch.randint(3, (2,), generator=generator)
        pixels = torch.randn(2, 3, 12, 12, generator=generator) + labels[:, None, None, None]
        return {"pixel_values": pixels, "labels": labels}

    # Labels are drawn anew, and a loss is that of two.
    compare_training(
        lambda: ours(hidden_size=16, num_attention_heads=1, num_hidden_layers=1), batch, steps=30
    )


@pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
class TestReference:
    def test_checkpointed_blocks(self) -> None:
        check_checkpointing(ours(hidden_dropout_prob=0.1), batch())

    def test_one_graph(self) -> None:
        check_compiled(ours(num_hidden_layers=1).eval(), batch(), VANISHING)

    def test_autocast(self) -> None:
        check_autocast(ours().eval(), batch(), VANISHING)

    def test_every_dropout(self) -> None:
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        check_dropouts(ours, batch(), names)

    def test_a_body_with_a_pooler(self, tmp_path: Path) -> None:
        theirs = theirs_of("vit", "ViTModel")
        model = ViTModel.from_pretrained(save(theirs, tmp_path))
        pixels = batch()["pixel_values"]
        wanted, found = theirs(pixels), model(pixels)
        torch.testing.assert_close(found.pooler_output, wanted.pooler_output)
        torch.testing.assert_close(
            found.last_hidden_state, wanted.last_hidden_state, rtol=1e-4, atol=1e-5
        )

    def test_images_of_other_sizes(self, tmp_path: Path) -> None:
        theirs = theirs_of("vit")
        model = ViTForImageClassification.from_pretrained(save(theirs, tmp_path))
        pixels = torch.randn(2, 3, 20, 8)
        found = model(pixels, interpolate_pos_encoding=True).logits
        wanted = theirs(pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="must be 12 x 12 pixels"):
            model(pixels)

    def test_initial_values(self) -> None:
        transformers = pytest.importorskip("transformers")
        options = {**SIZES, "hidden_size": 64, "initializer_range": 0.1}
        theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**options))
        check_initial_values(ours(**options), theirs, renamed=stored)

    def test_what_does_not_fit(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="image_size must be made of whole patches"):
            ViTConfig(image_size=225)
        with pytest.raises(ConfigError, match=r"hidden_act.*'quick_gelu'"):
            ViTConfig(hidden_act="quick_gelu")
        with pytest.raises(ConfigError, match="num_attention_heads must divide hidden_size"):
            ViTConfig(num_attention_heads=5)
        ours(num_labels=5).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"lacks: pooler\.dense.*model: classifier\."):
            ViTModel.from_pretrained(tmp_path)
