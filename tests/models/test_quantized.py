"""Checkpoints with weights in fp8 and mxfp4, as DeepSeek-V3, Qwen3 and gpt-oss are published."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_support import FP8, Tensors, in_fp8, in_mxfp4, write

from fastattn import models
from fastattn.models import CheckpointError, ConfigError
from fastattn.models._quantized import restore_fp8, restore_mxfp4
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel")
safetensors = pytest.importorskip("safetensors.torch")

CODES = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("quantize", [in_fp8, in_mxfp4])
def test_quantized_weights_are_read_in_16_bits_and_written_so(
    quantize: Callable[[Path], tuple[Tensors, Tensors]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files, weights = quantize(tmp_path)
    count = len(files.keys() - weights.keys()) // (1 if quantize is in_fp8 else 2)
    assert count > 3
    with caplog.at_level(logging.WARNING, "fastattn"):
        model = models.from_pretrained(tmp_path)
    assert f"{count} quantized weights are read in 16 or 32 bits" in caplog.text
    model.save_pretrained(tmp_path / "again")
    again = safetensors.load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == weights.keys()
    for name, weight in weights.items():
        assert again[name].dtype is weight.dtype
        assert torch.equal(again[name], weight), name
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in config
    same = models.from_pretrained(tmp_path / "again").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(same[name], tensor), name
    tokens = torch.arange(6)[None]
    assert torch.isfinite(model(tokens).logits).all()


def test_a_dtype_is_that_of_restored_weights_too(tmp_path: Path) -> None:
    files, _ = in_fp8(tmp_path)
    wide = models.from_pretrained(tmp_path, dtype=torch.float32)
    assert {x.dtype for x in wide.parameters()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj.weight"
    scales = files[f"{name}_scale_inv"]
    exact = restore_fp8(files[name], scales, torch.float32, (32, 48))
    assert torch.equal(wide.get_parameter(name), exact)
    write(tmp_path, files, dtype="float16")
    assert models.from_pretrained(tmp_path).get_parameter(name).dtype is torch.float16
    # What was not quantized keeps what it is stored in.
    assert models.from_pretrained(tmp_path).get_parameter("lm_head.weight").dtype is torch.bfloat16


def test_weight_and_scales_may_lie_in_two_files(tmp_path: Path) -> None:
    files, _ = in_fp8(tmp_path)
    whole = models.from_pretrained(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"model-{'_scale_inv' in name}.safetensors" for name in files}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in files.items() if places[name] == file}
        safetensors.save_file(part, tmp_path / file, metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for name, tensor in models.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(whole[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_is_restored_as_transformers_does(dtype: torch.dtype) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    # All finite numbers of float8_e4m3fn, in blocks that end where the weight does or beyond.
    finite = CODES[(CODES & 127) < 127].view(torch.float8_e4m3fn)
    for shape in ((64, 96), (37, 131), (2, 40, 50)):
        weight = finite[torch.randint(len(finite), shape)]
        blocks = (*shape[:-2], -(-shape[-2] // 32), -(-shape[-1] // 48))
        scales = torch.rand(blocks) * 1e-3
        found = restore_fp8(weight, scales, dtype, (32, 48))
        wanted = fp8._dequantize_fp8_weight(weight, scales, (32, 48), torch.float32)
        assert torch.equal(found, wanted.to(dtype))
    powers = torch.randint(100, 130, (2, 2), dtype=torch.uint8)
    weight = finite[torch.randint(len(finite), (64, 96))]
    wanted = fp8.Fp8Dequantize(None)._dequantize_one(weight, powers, dtype)
    for scales in (powers, powers.view(torch.float8_e8m0fnu)):
        assert torch.equal(restore_fp8(weight, scales, dtype, (32, 48)), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mxfp4_is_restored_as_transformers_does(dtype: torch.dtype) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = CODES[torch.randperm(256)].view(2, 8, 1, 16).repeat(1, 1, 3, 1)
    # float16 has exponents down to -24, and transformers multiplies in it.
    lowest = 115 if dtype is torch.float16 else 90
    scales = torch.randint(lowest, 135, blocks.shape[:3], dtype=torch.uint8)
    wanted = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    found = restore_mxfp4(blocks, scales, dtype)
    assert found.shape == (2, 96, 8)
    assert torch.equal(found, wanted)
    assert torch.equal(found.signbit(), wanted.signbit())


# What the families' first models have in config.json besides their sizes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM": {
        "aux_loss_alpha": 0.001,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "ep_size": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
        "pretraining_tp": 1,
        "quantization_config": {**FP8, "weight_block_size": [128, 128]},
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
    },
    "GptOssForCausalLM": {
        "experts_per_token": 4,
        "initial_context_length": 4096,
        "quantization_config": {
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
            "quant_method": "mxfp4",
        },
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "swiglu_limit": 7.0,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_no_obstacle(name: str, tmp_path: Path) -> None:
    """Layers of full width would be too large here: what is missing is said, and nothing else."""
    values = {**PUBLISHED[name], "architectures": [name], "num_hidden_layers": 2}
    values["model_type"] = {"D": "deepseek_v3", "G": "gpt_oss"}[name[0]]
    (tmp_path / "config.json").write_text(json.dumps(values))
    safetensors.save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"parameters that it lacks: .*embed_tokens"):
        models.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "says",
    [
        {"quant_method": "gptq", "bits": 4},
        {**FP8, "activation_scheme": "static"},
        {**FP8, "weight_block_size": None},
        {**FP8, "fmt": "e5m2"},
    ],
)
def test_what_is_quantized_otherwise_is_refused(tmp_path: Path, says: dict[str, Any]) -> None:
    files, _ = in_fp8(tmp_path)
    write(tmp_path, files, quantization_config=says)
    with pytest.raises(ConfigError, match="convert others to bfloat16"):
        models.from_pretrained(tmp_path)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    files, _ = in_fp8(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"

    def refused(changes: Tensors, match: str) -> None:
        write(tmp_path, {**files, **changes})
        with pytest.raises(CheckpointError, match=match):
            models.from_pretrained(tmp_path)

    refused({f"{name}_scale_inv": torch.ones(2, 2)}, r"is \(2, 2\), and must be \(3, 2\)")
    refused({name: torch.ones(80, 64, dtype=torch.int8)}, "must be float8_e4m3fn, got torch.int8")
    refused({"model.lost.weight_scale_inv": torch.ones(1, 1)}, r"no parameters.*lost")
    plain = {
        name: value
        for name, value in json.loads((tmp_path / "config.json").read_text()).items()
        if name != "quantization_config"
    }
    (tmp_path / "config.json").write_text(json.dumps(plain))
    # Without a word of it in config.json the scales are in vain, and nothing is read without them.
    with pytest.raises(CheckpointError, match=r"no parameters of the model.*weight_scale_inv"):
        models.from_pretrained(tmp_path)
    gpt = tmp_path / "gpt"
    files, _ = in_mxfp4(gpt)
    name = "model.layers.1.mlp.experts.down_proj"
    write(gpt, {**files, f"{name}_scales": torch.ones(3, 64, 2, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=r"is \(3, 64, 2\), and must be \(3, 64, 1\)"):
        models.from_pretrained(gpt)
    write(gpt, {**files, f"{name}_blocks": torch.ones(3, 64, 1, 16)})
    with pytest.raises(CheckpointError, match=r"blocks must be uint8, got torch\.float32"):
        models.from_pretrained(gpt)
