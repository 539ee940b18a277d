"""timm's vision transformers, patched: outputs and gradients, and that it is undone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from against_unpatched import breaches, gradients_of, measure
from fastattn.checking import Results
from fastattn.integrations.timm import PatchedAttention
from fastattn.ops.core.backends import INTERPRETED
from fastattn.patching.mlp import PatchedMLP
from fastattn.patching.norms import PatchedNorm
from support import count_launches, same_bits

timm: Any = pytest.importorskip("timm")
reference_only = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")

SMALL = {"img_size": 16, "patch_size": 4, "num_classes": 5}
VIT = {**SMALL, "embed_dim": 32, "depth": 2, "num_heads": 4}


def vit(**options: Any) -> Any:
    """A vision transformer."""
    return timm.models.VisionTransformer(**VIT, **options)


def eva() -> Any:
    """With a gate in its feed-forward layers, and rotary positions of two dimensions."""
    return timm.models.Eva(
        **VIT, use_rot_pos_emb=True, swiglu_mlp=True, use_abs_pos_emb=False, mlp_ratio=2.0
    )


MODELS: dict[str, Callable[[], Any]] = {
    "vit": vit,
    "norms of q and k, scales": lambda: vit(qk_norm=True, init_values=0.5),
    "packed gates": lambda: vit(mlp_layer=timm.layers.GluMlp, act_layer=torch.nn.SiLU),
    "eva": eva,
}


def make(name: str) -> Any:
    """A model with random numbers of a size at which attention counts."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = (
            noise * parameter.shape[-1] ** -0.5
            if parameter.dim() > 1
            else (parameter.data + 0.1 * noise)
        )
    return model.train()


def run(model: Any) -> Results:
    """Logits and gradients."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    logits = model(images.to(next(model.parameters()).dtype))
    logits.square().mean().backward()
    return {"logits": logits.detach(), **gradients_of(model)}


@reference_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, dtype: torch.dtype):
    model = make(name).to(dtype)
    measured, before = measure(model, run, neighbours=4), run(model)
    kinds = [type(module) for module in model.modules()]
    report = fastattn.patch(model)
    bodies = {getattr(entry.ours, "body", None) for entry in report.replaced}
    assert {PatchedAttention, PatchedMLP, PatchedNorm} <= bodies
    assert breaches(run(model), measured) == []
    fastattn.unpatch(model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(same_bits(x, before[name]) for name, x in run(model).items())


@reference_only
def test_what_is_not_wanted_or_not_fused_stays():
    model = make("vit")
    kinds = {entry.theirs.__name__ for entry in fastattn.patch(model, attention=False).replaced}
    assert kinds == {"LayerNorm", "Mlp", "Dropout"}
    model = make("vit")
    for block in model.blocks:
        block.attn.fused_attn = False
    report = fastattn.patch(model)
    assert any("is not fused" in entry.reason for entry in report.left_alone)


@reference_only
def test_nothing_of_timm_is_touched():
    attention = timm.layers.Attention
    module, members = dict(attention.forward.__globals__), dict(vars(attention))
    torch_function = torch.nn.functional.scaled_dot_product_attention
    fastattn.patch(make("vit"))
    assert dict(attention.forward.__globals__) == module
    assert dict(vars(attention)) == members
    assert torch.nn.functional.scaled_dot_product_attention is torch_function


@pytest.mark.kernels
def test_on_kernels():
    model = make("vit")
    measured = measure(model, run, neighbours=4)
    fastattn.patch(model)
    with count_launches() as launches:
        assert breaches(run(model), measured) == []
    for kernel in ("attention_forward", "attention_queries_backward", "norm_forward"):
        assert any(kernel in launch for launch in launches), kernel
