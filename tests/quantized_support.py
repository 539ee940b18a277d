"""Small checkpoints with weights in fp8 and in mxfp4."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import models

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 48],
}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
Tensors = dict[str, torch.Tensor]


def deepseek() -> models.Model:
    torch.manual_seed(0)
    config = models.DeepseekV3Config(
        **SIZES,
        intermediate_size=80,
        moe_intermediate_size=40,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=24,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=1,
    )
    return models.DeepseekV3ForCausalLM(config).bfloat16()


def gpt_oss() -> models.Model:
    torch.manual_seed(0)
    sizes = {"intermediate_size": 32, "head_dim": 8, "num_key_value_heads": 1}
    chosen = {"num_local_experts": 3, "num_experts_per_tok": 2}
    config = models.GptOssConfig(**SIZES, **sizes, **chosen)
    return models.GptOssForCausalLM(config).bfloat16()


def write(folder: Path, tensors: Tensors, **values: Any) -> None:
    """Put tensors into a folder that a model was written to, with further values of its config."""
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def in_fp8(folder: Path, block: tuple[int, int] = (32, 48)) -> tuple[Tensors, Tensors]:
    """What a DeepSeek-V3 in fp8 has in its files, and the weights that it stands for."""
    safetensors = pytest.importorskip("safetensors.torch")
    deepseek().save_pretrained(folder)
    stored = safetensors.load_file(folder / "model.safetensors")
    files, weights = dict(stored), {}
    for name, weight in stored.items():
        # Embeddings, norms, the routers and the head are in 16 bits in published files too.
        if weight.dim() == 2 and "proj" in name:
            rows, columns = (-(-n // size) for n, size in zip(weight.shape, block, strict=True))
            scales = torch.rand(rows, columns) * 1e-3 + 1e-4
            files[name] = (weight.float() * 1e3).to(torch.float8_e4m3fn)
            files[f"{name}_scale_inv"] = scales
            # A number for each of the block's rows and columns, looked up one by one.
            n, k = (torch.arange(length) for length in weight.shape)
            each = scales[n[:, None] // block[0], k[None] // block[1]]
            weights[name] = files[name].double().mul(each.double()).to(torch.bfloat16)
    write(folder, files, quantization_config={**FP8, "weight_block_size": block})
    return files, {**stored, **weights}


def in_mxfp4(folder: Path) -> tuple[Tensors, Tensors]:
    """The same of a gpt-oss, whose experts are in mxfp4."""
    safetensors = pytest.importorskip("safetensors.torch")
    gpt_oss().save_pretrained(folder)
    stored = safetensors.load_file(folder / "model.safetensors")
    files, weights = dict(stored), {}
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for name, weight in stored.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = weight.shape
            del files[name]
            blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(110, 130, blocks.shape[:3], dtype=torch.uint8)
            files |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            weights[name] = torch.empty_like(weight)
            for e, k, n in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
                byte = int(blocks[e, n, k // 32, k % 32 // 2])
                code = byte >> 4 if k % 2 else byte & 15
                number = numbers[code & 7] * (-1.0 if code & 8 else 1.0)
                weights[name][e, k, n] = number * 2.0 ** (int(scales[e, n, k // 32]) - 127)
    write(folder, files, quantization_config=MXFP4)
    return files, {**stored, **weights}
