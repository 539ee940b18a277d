"""T5 beside transformers' models of the same parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import (
    BACKENDS,
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
from torch.nn import Parameter

from fastattn.models import CheckpointError, ConfigError
from fastattn.models.t5 import (
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
    T5Model,
)
from fastattn.ops.core.backends import INTERPRETED

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    # Few buckets for these lengths, so that distances share them.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
    "decoder_start_token_id": 0,
    # With the scores that nothing scales, float32 would otherwise show its rounding.
    "initializer_factor": 0.5,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("ConditionalGeneration", {}),
    "t5 1.1": (
        "ConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1},
    ),
    "gated silu": ("ConditionalGeneration", {"feed_forward_proj": "gated-silu"}),
    "classifier": ("SequenceClassification", {"num_labels": 3}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
backends = pytest.mark.parametrize("backend", BACKENDS)


def theirs_of(variant: str) -> Any:
    transformers = pytest.importorskip("transformers")
    head, options = VARIANTS[variant]
    config = transformers.T5Config(**{**SIZES, **options})
    return made(lambda: getattr(transformers, f"T5For{head}")(config))


def batches(variant: str = "t5") -> list[dict[str, torch.Tensor]]:
    """A full batch, one padded at the right, and one padded at the left with inputs of its own."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (2, 13), generator=generator)
    labels = torch.randint(3, 64, (2, 9), generator=generator)
    found = []
    for padding in (slice(0, 0), slice(9, None), slice(None, 4)):
        mask = torch.ones_like(ids)
        mask[1, padding] = 0
        found.append({"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask})
        found[-1]["labels"] = labels.masked_fill(torch.arange(9) > 5 + len(found), -100)
    del found[0]["attention_mask"]
    if VARIANTS[variant][0] == "SequenceClassification":
        for batch, place in zip(found, (12, 8, 12), strict=True):
            batch["input_ids"][:, place] = 1
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
    model = compare_with_transformers(theirs, tmp_path / "theirs", given, backend)
    if backend == "reference":
        compare_way_back(model, theirs, tmp_path / "ours", given[2])


def ours(**options: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**{**SIZES, **options}))


@pytest.mark.kernels
@pytest.mark.slow
def test_training_through_kernels_follows_the_reference() -> None:
    def batch(generator: torch.Generator) -> dict[str, torch.Tensor]:
        starts = torch.randint(2, (1, 1), generator=generator)
        ids = (starts + 3 * torch.arange(12)) % 64
        return {"input_ids": ids, "labels": ids[:, :6]}

    sizes = {"d_model": 16, "d_kv": 16, "num_heads": 1, "num_layers": 1, "dropout_rate": 0.0}
    compare_training(lambda: ours(**sizes, feed_forward_proj="gated-gelu"), batch)


@pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
class TestReference:
    @pytest.mark.parametrize("tied_by", ["config", "transformers"])
    def test_an_output_of_its_own(self, tied_by: str, tmp_path: Path) -> None:
        """Published ones of 1.1 say that it is not tied, and those of transformers 5 that it is."""
        theirs = theirs_of("t5 1.1")
        theirs.lm_head.weight = Parameter(theirs.lm_head.weight.detach() + 0.1)
        save(theirs, tmp_path)
        if tied_by == "config":
            path = tmp_path / "config.json"
            text = path.read_text().replace(
                '"tie_word_embeddings": true', '"tie_word_embeddings": false'
            )
            path.write_text(text.replace('"scale_decoder_outputs": false,', ""))
        model = T5ForConditionalGeneration.from_pretrained(tmp_path)
        assert model.lm_head.weight is not model.shared.weight
        compare_way_back(model, theirs, tmp_path / "ours", batches()[2])
        batch = {name: tensor for name, tensor in batches()[2].items() if name != "labels"}
        torch.testing.assert_close(
            model(**batch).logits, theirs(**batch).logits, rtol=1e-4, atol=1e-4
        )

    def test_checkpointed_blocks(self) -> None:
        check_checkpointing(ours(), batches()[1])

    def test_one_graph(self) -> None:
        check_compiled(ours().eval(), batches()[2])

    def test_autocast(self) -> None:
        check_autocast(ours(feed_forward_proj="gated-gelu").eval(), batches()[1])

    def test_every_dropout(self) -> None:
        check_dropouts(ours, batches()[1], ("dropout_rate",))
        names = ("dropout_rate", "classifier_dropout")
        check_dropouts(classifier, batches("classifier")[1], names)

    def test_a_body_alone(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        theirs = made(lambda: transformers.T5Model(transformers.T5Config(**SIZES)))
        model = T5Model.from_pretrained(save(theirs, tmp_path))
        batch = {name: tensor for name, tensor in batches()[2].items() if name != "labels"}
        wanted, found = theirs(**batch), model(**batch)
        for name in ("last_hidden_state", "encoder_last_hidden_state"):
            torch.testing.assert_close(
                getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-5
            )

    def test_older_names(self, tmp_path: Path) -> None:
        """Embeddings that each stack names once more, and a table that nothing uses."""
        pytest.importorskip("safetensors")
        from safetensors.torch import load_file, save_file

        model = ours()
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
            tensors[f"{name}.weight"] = tensors["shared.weight"].clone()
        table = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        tensors[table] = torch.zeros(8, 4)
        save_file(tensors, tmp_path / "model.safetensors")
        again = T5ForConditionalGeneration.from_pretrained(tmp_path)
        assert again.lm_head.weight is again.shared.weight
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        tensors["decoder.embed_tokens.weight"] += 1.0
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"differs from another.*shared\.weight"):
            T5ForConditionalGeneration.from_pretrained(tmp_path)

    def test_a_published_configuration(self) -> None:
        """Whether the output is scaled follows from whether it is tied, unless it is said."""
        config = T5Config.from_dict({**SIZES, "n_positions": 512, "tie_word_embeddings": False})
        assert config.scale_decoder_outputs is False
        assert T5Config(**SIZES).scale_decoder_outputs is True
        said = T5Config.from_dict({**SIZES, "scale_decoder_outputs": False, "dense_act_fn": "relu"})
        assert (said.scale_decoder_outputs, said.tie_word_embeddings) == (False, True)

    def test_initial_values(self) -> None:
        """Deviations as in transformers, with which scores need no scale."""
        transformers = pytest.importorskip("transformers")
        options = {"d_model": 64, "d_ff": 96, "feed_forward_proj": "gated-gelu"}
        config = transformers.T5Config(**{**SIZES, **options})
        check_initial_values(ours(**options), transformers.T5ForConditionalGeneration(config))

    def test_what_does_not_fit(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"feed_forward_proj.*'gated-tanh'"):
            T5Config(feed_forward_proj="gated-tanh")
        with pytest.raises(ConfigError, match="num_layers and num_decoder_layers must be 1"):
            T5Config(num_decoder_layers=0)
        with pytest.raises(ConfigError, match="pad_token_id must be a token, got None"):
            T5Config.from_dict({"pad_token_id": None})
        model = ours()
        with pytest.raises(ValueError, match="give labels or decoder_input_ids"):
            model(batches()[0]["input_ids"])
        model.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"lacks: classification_head\.dense"):
            T5ForSequenceClassification.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="every sequence must have the token 1"):
            classifier()(batches()[0]["input_ids"].clamp(min=2))


def classifier(**options: Any) -> T5ForSequenceClassification:
    torch.manual_seed(0)
    return T5ForSequenceClassification(T5Config(**{**SIZES, "num_labels": 3, **options}))
