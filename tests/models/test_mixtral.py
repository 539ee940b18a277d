"""Models with experts beside transformers' models of the same parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import (
    BACKENDS,
    check_autocast,
    check_checkpointing,
    check_compiled,
    check_initial_values,
    compare_way_back,
    compare_with_transformers,
    made,
    save,
    token_batches,
)

import fastattn
from fastattn import models
from fastattn.models import CheckpointError, ConfigError
from fastattn.models.mixtral import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig
from fastattn.ops.core.backends import INTERPRETED

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
MIXTRAL = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**MIXTRAL, "sliding_window": 5}),
    "deepseek": (
        "DeepseekV3",
        {
            **{name: SIZES[name] for name in SIZES if name != "num_key_value_heads"},
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 12,
            "kv_lora_rank": 12,
            "q_lora_rank": 20,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "gpt-oss": (
        "GptOss",
        {
            **MIXTRAL,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "sliding_window": 5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5000.0,
                "factor": 4.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen3": (
        "Qwen3Moe",
        {
            **SIZES,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3, normalized": (
        "Qwen3Moe",
        {
            **SIZES,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
}


def theirs_of(variant: str) -> Any:
    transformers = pytest.importorskip("transformers")
    family, options = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**options)
    config._experts_implementation = "eager"
    theirs = made(lambda: getattr(transformers, f"{family}ForCausalLM")(config))
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    return theirs


def our_name(name: str) -> str:
    """What ours calls a parameter of theirs."""
    return name.replace(".mlp.router.", ".mlp.gate.")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_gradients_are_those_of_transformers(
    variant: str, backend: str, tmp_path: Path
) -> None:
    theirs, given = theirs_of(variant), token_batches()
    # Interpreted kernels take seconds for each.
    given = given if backend == "reference" else given[1:2]
    model = compare_with_transformers(theirs, tmp_path / "theirs", given, backend, renamed=our_name)
    if backend == "reference":
        compare_way_back(model, theirs, tmp_path / "ours", given[1])


@pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
class TestReference:
    def test_checkpoints_have_single_experts_and_need_all_of_them(self, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        model = MixtralForCausalLM(MixtralConfig(**MIXTRAL))
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        stored = safetensors.load_file(path)
        start = "model.layers.0.block_sparse_moe"
        assert stored[f"{start}.gate.weight"].shape == (4, 32)
        gate = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")[3, :20]
        assert torch.equal(stored[f"{start}.experts.3.w1.weight"], gate)
        again = models.from_pretrained(tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        body = models.MixtralModel.from_pretrained(tmp_path, except_for=["lm_head"])
        whole = body.get_parameter("layers.0.mlp.experts.gate_up_proj")
        assert torch.equal(whole[3, :20], gate)

        def refused(changed: dict[str, torch.Tensor], match: str) -> None:
            safetensors.save_file(changed, path, metadata={"format": "pt"})
            with pytest.raises(CheckpointError, match=match):
                models.from_pretrained(tmp_path)

        lost = f"{start}.experts.2.w3.weight"
        refused({n: t for n, t in stored.items() if n != lost}, r"experts\.2\.w3\.weight")
        refused({**stored, lost: torch.ones(3, 3)}, r"w3\.weight is \(3, 3\) there and \(20, 32\)")
        refused({**stored, f"{start}.experts.4.w1.weight": torch.ones(20, 32)}, r"experts\.4\.w1")

    def test_the_bias_of_a_choice_stays_in_float32(self, tmp_path: Path) -> None:
        theirs = theirs_of("deepseek")
        save(theirs, tmp_path)
        name = "model.layers.1.mlp.gate.e_score_correction_bias"
        model = models.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert torch.equal(model.get_buffer(name), theirs.get_buffer(name))
        assert model.get_parameter("lm_head.weight").dtype is torch.bfloat16

    def test_checkpointed_blocks(self) -> None:
        check_checkpointing(MixtralForCausalLM(MixtralConfig(**MIXTRAL)), token_batches()[1])

    @pytest.mark.slow
    def test_one_graph(self) -> None:
        torch.manual_seed(0)
        check_compiled(MixtralForCausalLM(MixtralConfig(**MIXTRAL)), token_batches()[2])

    def test_autocast(self) -> None:
        config = MixtralConfig(**{**MIXTRAL, "num_experts_per_tok": 4})
        check_autocast(MixtralForCausalLM(config), token_batches()[1])

    @pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
    def test_initial_values(self, family: str) -> None:
        transformers = pytest.importorskip("transformers")
        wide = {**MIXTRAL, "hidden_size": 64, "intermediate_size": 64}
        found = []
        for library in (transformers, models):
            config = getattr(library, f"{family}Config")(**wide)
            found.append(getattr(library, f"{family}ForCausalLM")(config))
        check_initial_values(found[1], found[0], renamed=our_name)

    def test_the_balancing_loss_is_that_of_transformers(self) -> None:
        theirs = theirs_of("mixtral")
        batch = token_batches()[1]
        output = theirs(**batch, output_router_logits=True)
        logits = output.router_logits
        ids = [fastattn.route_top_k(layer, 2)[1] for layer in logits]
        loss = fastattn.load_balancing_loss(logits, ids, 4, batch["attention_mask"].flatten())
        torch.testing.assert_close(loss, output.aux_loss)

    def test_what_is_not_supported_is_said(self) -> None:
        for options in ({"output_router_logits": True}, {"router_jitter_noise": 0.1}):
            with pytest.raises(ConfigError, match=next(iter(options))):
                MixtralConfig(**options)
        with pytest.raises(ConfigError, match="num_experts_per_tok"):
            Qwen3MoeConfig(num_experts=4)
        assert MixtralConfig.from_dict({"num_experts": 5}).num_local_experts == 5
