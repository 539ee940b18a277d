"""The Switch Transformer beside transformers' model of the same parameters."""

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
    compare_way_back,
    compare_with_transformers,
    made,
    save,
    single_experts,
)

import fastattn
from fastattn import models
from fastattn.models import CheckpointError, ConfigError
from fastattn.models.switch import (
    SwitchRouter,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    SwitchTransformersModel,
)
from fastattn.ops.core.backends import INTERPRETED

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 20,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_experts": 3,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 2,
    # Fewer than come.
    "expert_capacity": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,
    "decoder_start_token_id": 0,
    "initializer_factor": 0.5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "switch": {},
    "silu, biased routers, room for all": {
        "dense_act_fn": "silu",
        "router_bias": True,
        "expert_capacity": 13,
    },
}


def theirs_of(variant: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwitchTransformersConfig(**{**SIZES, **VARIANTS[variant]})
    return made(lambda: transformers.SwitchTransformersForConditionalGeneration(config))


def batches() -> list[dict[str, torch.Tensor]]:
    """A batch without padding, and one padded at the right whose decoder is told what it reads."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (2, 13), generator=generator)
    labels = torch.randint(3, 64, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    padded = {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}
    read = torch.randint(3, 64, (2, 9), generator=generator)
    return [
        {"input_ids": ids, "labels": labels},
        {**padded, "labels": labels.masked_fill(labels < 9, -100), "decoder_input_ids": read},
    ]


def ours(**options: Any) -> SwitchTransformersForConditionalGeneration:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(**{**SIZES, **options})
    return SwitchTransformersForConditionalGeneration(config)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_gradients_are_those_of_transformers(
    variant: str, backend: str, tmp_path: Path
) -> None:
    theirs, given = theirs_of(variant), batches()
    given = given if backend == "reference" else given[1:]
    folder = tmp_path / "theirs"
    model = compare_with_transformers(theirs, folder, given, backend, parts=single_experts)
    if backend == "reference":
        compare_way_back(model, theirs, tmp_path / "ours", given[1])


def test_an_expert_takes_the_first_tokens_of_a_sequence() -> None:
    config = SwitchTransformersConfig(**{**SIZES, "num_experts": 2, "expert_capacity": 2})
    router = SwitchRouter(config).eval()
    with torch.no_grad():
        router.classifier.weight.zero_()[0, 0] = 1.0
    # By its first column a token goes to the first expert or to the second.
    x = torch.zeros(2, 5, 32)
    x[:, :, 0] = torch.tensor([[1.0, 2.0, -1.0, 3.0, -2.0], [-1.0, -1.0, -1.0, 1.0, -3.0]])
    weights, ids, logits = router(x)
    assert ids[..., 0].tolist() == [[0, 0, 1, 2, 1], [1, 1, 2, 0, 2]]
    torch.testing.assert_close(weights, logits.softmax(-1).amax(-1, keepdim=True))
    assert torch.equal(router.train()(x)[1], ids), "so little noise changes no choice here"
    assert not torch.equal(router(x)[2], logits)


@pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
class TestReference:
    def test_checkpointed_blocks(self) -> None:
        check_checkpointing(ours(), batches()[1])

    def test_one_graph(self) -> None:
        check_compiled(ours().eval(), batches()[1])

    def test_autocast(self) -> None:
        check_autocast(ours().eval(), batches()[1])

    def test_every_dropout(self) -> None:
        def make(**options: Any) -> SwitchTransformersForConditionalGeneration:
            return ours(router_jitter_noise=0.0, **options)

        check_dropouts(make, batches()[1], ("dropout_rate",))

    def test_generation_beside_no_cache(self) -> None:
        model = ours(expert_capacity=64).double().eval()
        prompts = batches()[0]["input_ids"]
        made_by_steps = fastattn.generate(model, prompts, max_new_tokens=6)
        tokens = torch.zeros(2, 1, dtype=torch.long)
        for _ in range(6):
            logits = model(input_ids=prompts, decoder_input_ids=tokens).logits
            tokens = torch.cat((tokens, logits[:, -1].argmax(-1, keepdim=True)), 1)
        assert torch.equal(made_by_steps.tokens[:, -6:], tokens[:, 1:])

    def test_a_body_alone(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.SwitchTransformersConfig(**SIZES)
        theirs = made(lambda: transformers.SwitchTransformersModel(config))
        model = SwitchTransformersModel.from_pretrained(save(theirs, tmp_path))
        batch = {name: tensor for name, tensor in batches()[1].items() if name != "labels"}
        wanted, found = theirs(**batch), model(**batch)
        for name in ("last_hidden_state", "encoder_last_hidden_state"):
            torch.testing.assert_close(
                getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-5
            )

    def test_checkpoints_have_single_experts_and_need_all_of_them(self, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        model = ours()
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        stored = safetensors.load_file(path)
        name = "encoder.block.1.layer.1.mlp.experts"
        assert torch.equal(
            stored[f"{name}.expert_2.wi.weight"], model.get_parameter(f"{name}.up_proj")[2]
        )
        again = models.from_pretrained(tmp_path)
        for parameter, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[parameter], tensor), parameter
        del stored[f"{name}.expert_2.wo.weight"]
        safetensors.save_file(stored, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"experts\.2\.wo\.weight"):
            models.from_pretrained(tmp_path)

    def test_an_output_of_its_own(self, tmp_path: Path) -> None:
        """It is not scaled; with it transformers wants embeddings of each stack."""
        transformers = pytest.importorskip("transformers")
        model = ours(tie_word_embeddings=False).eval()
        model.save_pretrained(tmp_path / "apart")
        kind = transformers.SwitchTransformersForConditionalGeneration
        theirs, report = kind.from_pretrained(tmp_path / "apart", output_loading_info=True)
        assert not any(report.values()), report
        batch = {name: tensor for name, tensor in batches()[1].items() if name != "labels"}
        wanted = theirs.eval()(**batch).logits
        torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-4, atol=1e-4)
        assert models.from_pretrained(tmp_path / "apart").config == model.config

    def test_initial_values(self) -> None:
        transformers = pytest.importorskip("transformers")
        options = {"d_model": 64, "d_ff": 96}
        config = transformers.SwitchTransformersConfig(**{**SIZES, **options})
        theirs = transformers.SwitchTransformersForConditionalGeneration(config)
        check_initial_values(ours(**options), theirs, parts=single_experts)

    def test_what_is_not_supported(self) -> None:
        for options, match in (
            ({"dense_act_fn": "gated-gelu"}, "dense_act_fn"),
            ({"router_dtype": "bfloat16"}, "router_dtype"),
            ({"router_ignore_padding_tokens": True}, "router_ignore_padding_tokens"),
            ({"num_experts": 0}, "num_experts must be 1 or more"),
        ):
            with pytest.raises(ConfigError, match=match):
                SwitchTransformersConfig(**options)
