"""Modules on the meta device, and the default device, which has no say in what is elsewhere."""

import pytest
import torch
from every_module import CASES, called

import fastattn.nn as nn
from support import same_bits


def test_every_module_has_a_case():
    classes = {name for name in nn.__all__ if isinstance(getattr(nn, name), type)}
    modules = {name for name in classes if issubclass(getattr(nn, name), torch.nn.Module)}
    assert modules - {name.partition(" ")[0].strip(",") for name in CASES} == {"ScorePositions"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_modules_on_meta_give_shapes_and_dtypes(name, dtype):
    case = CASES[name]
    known = [(y.shape, y.dtype) for y in called(case, case.make().to(dtype), dtype, "cpu")]
    with torch.device("meta"):
        module = case.make().to(dtype)
    outputs = called(case, module, dtype, "meta")
    assert all(output.is_meta for output in outputs)
    assert [(output.shape, output.dtype) for output in outputs] == known
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if wanted:
        total = torch.stack([output.float().sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
        for gradient, parameter in zip(gradients, wanted, strict=True):
            assert (gradient.shape, gradient.dtype) == (parameter.shape, parameter.dtype)


@pytest.mark.parametrize("name", CASES)
def test_modules_work_beside_another_default_device(name):
    case = CASES[name]
    module = case.make().eval()
    expected = called(case, module, torch.float32, "cpu")
    with torch.device("meta"):
        found = called(case, module, torch.float32, "cpu")
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a, b)


SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 9},
    "llama3": {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 9,
    },
}

ON_A_DEVICE = {
    **{
        f"RotaryEmbedding, {name}": lambda device, scaling=scaling: nn.RotaryEmbedding(
            8, 20, scaling=scaling, device=device
        )
        for name, scaling in SCALINGS.items()
    },
    "AlibiPositions": lambda device: nn.AlibiPositions(3, device=device),
    "SinusoidalPositions": lambda device: nn.SinusoidalPositions(8, device=device),
}
"""Modules whose buffers are numbers that no state_dict holds."""


@pytest.mark.parametrize("make", ON_A_DEVICE.values(), ids=ON_A_DEVICE)
def test_buffers_are_made_where_the_module_is_asked_to_be(make):
    expected = dict(make("cpu").named_buffers())
    with torch.device("meta"):
        made = dict(make("cpu").named_buffers())
        module = make(None)
        assert all(buffer.is_meta for buffer in module.buffers())
        moved = dict(module.to_empty(device="cpu").named_buffers())
    for name, buffer in expected.items():
        assert same_bits(made[name], buffer)
        assert same_bits(moved[name], buffer)


def test_parameters_are_made_where_the_module_is_asked_to_be():
    with torch.device("meta"):
        modules = (
            nn.AlibiPositions(2, learnable=True, device="cpu"),
            nn.Attention(8, 2, sinks=True, qk_norm=nn.RMSNorm, device="cpu"),
            nn.LatentAttention(
                8,
                2,
                q_lora_rank=4,
                kv_lora_rank=4,
                qk_nope_head_dim=4,
                qk_rope_head_dim=2,
                v_head_dim=4,
                device="cpu",
            ),
            nn.LoRALinear(4, 4, device="cpu"),
            nn.RelativePositionBias(2, device="cpu"),
            nn.TransformerEncoderLayer(8, 2, activation="swiglu", device="cpu"),
        )
    for module in modules:
        assert all(parameter.is_cpu for parameter in module.parameters())
