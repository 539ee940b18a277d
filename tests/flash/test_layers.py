"""Losses, norms, rotary positions, products and multi-head attention by flash-attn's names."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flash_formula import BACKENDS, assert_accurate, attend, device_of

import fastattn
from fastattn.integrations.flash_attn.losses.cross_entropy import CrossEntropyLoss
from fastattn.integrations.flash_attn.modules.mha import MHA
from fastattn.integrations.flash_attn.ops.activations import swiglu
from fastattn.integrations.flash_attn.ops.fused_dense import FusedDense
from fastattn.integrations.flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from fastattn.integrations.flash_attn.ops.triton.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    rms_norm_fn,
)


def leaf(backend: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device_of(backend), dtype=dtype).requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_losses_of_rows(scale: float, dtype: torch.dtype, backend: str):
    logits = leaf(backend, dtype, 5, 33)
    labels = torch.tensor([3, -100, 32, 0, 9], device=logits.device)

    def formula(logits: torch.Tensor) -> torch.Tensor:
        x = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
        loss = F.cross_entropy(x, labels, reduction="none", label_smoothing=0.1)
        return loss + 1e-2 * x.logsumexp(-1).square() * (labels != -100)

    def function(logits: torch.Tensor) -> torch.Tensor:
        losses, z_losses = cross_entropy_loss(
            logits, labels, label_smoothing=0.1, logit_scale=scale, lse_square_scale=1e-2
        )
        assert losses.dtype is z_losses.dtype is torch.float32
        assert not z_losses.requires_grad
        expected = 1e-2 * (logits.float() * scale).logsumexp(-1).square()
        torch.testing.assert_close(z_losses, (expected * (labels != -100)).detach())
        return losses

    assert_accurate(function, formula, {"logits": logits}, backend)


def test_the_module_of_losses_reduces_them():
    logits, labels = torch.randn(4, 7), torch.tensor([1, -1, 6, 0])
    for reduction in ("mean", "sum", "none"):
        module = CrossEntropyLoss(ignore_index=-1, reduction=reduction)
        expected = F.cross_entropy(logits, labels, ignore_index=-1, reduction=reduction)
        torch.testing.assert_close(module(logits, labels), expected)
    module = CrossEntropyLoss(lse_square_scale=0.1, return_z_loss=True)
    loss, z_loss = module(logits, labels.abs())
    torch.testing.assert_close(z_loss, 0.1 * logits.logsumexp(-1).square().mean())
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels.abs()) + z_loss)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none"):
        CrossEntropyLoss(reduction="average")
    with pytest.raises(NotImplementedError, match="process_group is not supported"):
        CrossEntropyLoss(process_group=object())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_norms_of_a_sum(rms: bool, centered: bool, backend: str):
    shapes = {"x": (3, 5, 24), "residual": (3, 5, 24), "weight": (24,), "bias": (24,)}
    tensors = {name: leaf(backend, torch.float32, *shape) for name, shape in shapes.items()}

    def formula(
        x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        normed = total if rms else total - total.mean(-1, keepdim=True)
        normed = normed * (normed.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return normed * (weight + float(centered)) + bias, total

    def function(**given: torch.Tensor) -> Any:
        options: dict[str, Any] = {"eps": 1e-5, "prenorm": True, "zero_centered_weight": centered}
        x, weight, bias = given["x"], given["weight"], given["bias"]
        norm = rms_norm_fn if rms else layer_norm_fn
        return norm(x, weight, bias, residual=given["residual"], **options)

    assert_accurate(function, formula, tensors, backend)


@pytest.mark.parametrize("norm", [rms_norm_fn, layer_norm_fn])
def test_dtypes_of_norms(norm: Any):
    x, weight = torch.randn(2, 8).bfloat16(), torch.ones(8)
    y, total = norm(x, weight, None, prenorm=True)
    assert total is x
    assert y.dtype is torch.bfloat16
    _, total = norm(x, weight, None, prenorm=True, residual_in_fp32=True)
    assert total.dtype is torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        y, total = norm(x, weight, None, x.to(dtype), prenorm=True, residual_in_fp32=True)
        assert (y.dtype, total.dtype) == (torch.bfloat16, dtype)
    assert torch.equal(norm(x, weight, None, x), norm(2 * x, weight, None))


@pytest.mark.parametrize("residual", [False, True])
def test_dropout_before_a_norm(residual: bool):
    x, weight = torch.ones(4, 64), torch.ones(64)
    torch.manual_seed(1)
    given = torch.zeros_like(x) if residual else None
    y, total = rms_norm_fn(x, weight, None, given, dropout_p=0.5, prenorm=True)
    assert set(total.unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(y, rms_norm_fn(total, weight, None))


@pytest.mark.parametrize(
    "name",
    [
        "x1",
        "weight1",
        "bias1",
        "rowscale",
        "return_dropout_mask",
        "out",
        "residual_out",
    ],
)
def test_options_of_norms_that_are_not_there(name: str):
    x, weight = torch.randn(2, 8), torch.ones(8)
    value = True if name == "return_dropout_mask" else x
    for norm in (rms_norm_fn, layer_norm_fn):
        with pytest.raises(NotImplementedError, match=f"{norm.__name__}: {name} is not supported"):
            norm(x, weight, None, **{name: value})


@pytest.mark.parametrize("norm", [rms_norm_fn, layer_norm_fn])
@pytest.mark.parametrize("residual", [False, True])
def test_norms_have_a_dtype_of_their_own(norm, residual: bool):
    x, weight = torch.randn(2, 8, dtype=torch.bfloat16), torch.ones(8)
    given = torch.randn(2, 8) if residual else None
    y, total = norm(x, weight, None, given, prenorm=True, out_dtype=torch.float32)
    assert (y.dtype, total.dtype) == (torch.float32, torch.float32 if residual else torch.bfloat16)
    torch.testing.assert_close(y, norm(total.float(), weight, None))


def test_the_module_of_norms():
    module = RMSNorm(8, eps=1e-3, dropout_p=0.5, zero_centered_weight=True)
    assert list(module.state_dict()) == ["weight"]
    assert not module.weight.any()
    x = torch.randn(2, 8)
    torch.testing.assert_close(module.eval()(x), F.rms_norm(x, (8,), eps=1e-3))
    y, total = module(x, x, prenorm=True)
    torch.testing.assert_close(total, 2 * x)
    torch.testing.assert_close(y, F.rms_norm(2 * x, (8,), eps=1e-3))
    assert (module.train()(x, prenorm=True)[1] == 0).any()


def test_products_and_activations():
    layer = FusedDense(6, 4, return_residual=True)
    x = torch.randn(2, 3, 6)
    y, same = layer(x)
    assert same is x
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))
    assert isinstance(layer, torch.nn.Linear)
    with pytest.raises(NotImplementedError, match="FusedDense: process_group is not supported"):
        layer(x, process_group=object())
    torch.testing.assert_close(swiglu(x, y[..., :1] + x), F.silu(x) * (y[..., :1] + x))


@pytest.mark.parametrize("key_heads", [None, 2])
@pytest.mark.parametrize("options", [{}, {"window_size": (2, -1)}, {"use_alibi": True}], ids=str)
def test_multi_head_attention(options: dict[str, Any], key_heads: int | None):
    module = MHA(32, 4, key_heads, causal=True, use_flash_attn=True, **options)
    names = {"Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias"}
    assert module.state_dict().keys() == names
    x = torch.randn(2, 6, 32)
    kept = key_heads or 4
    q, k, v = module.Wqkv(x).split([32, 8 * kept, 8 * kept], -1)
    terms: dict[str, Any] = {"window_size": options.get("window_size", (-1, -1))}
    if "use_alibi" in options:
        terms["alibi_slopes"] = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    context, _ = attend(*(y.unflatten(-1, (-1, 8)) for y in (q, k, v)), causal=True, **terms)
    expected = module.out_proj(context.flatten(2))
    torch.testing.assert_close(module(x), expected)
    module.checkpointing = module.return_residual = True
    y, same = module(x)
    torch.testing.assert_close(y, expected)
    assert same is x
    ends = torch.tensor([0, 6, 12], dtype=torch.int32)
    packed, _ = module(x.flatten(0, 1), cu_seqlens=ends, max_seqlen=6)
    torch.testing.assert_close(packed, expected.flatten(0, 1))


@pytest.mark.parametrize("key_heads", [None, 2])
def test_multi_head_attention_with_rotary_positions(key_heads: int | None):
    module = MHA(32, 4, key_heads, causal=True, rotary_emb_dim=4)
    x = torch.randn(2, 6, 32, requires_grad=True)
    q, k, v = (
        y.unflatten(-1, (-1, 8))
        for y in module.Wqkv(x).split([32, *2 * [8 * (key_heads or 4)]], -1)
    )
    angles = torch.outer(torch.arange(6.0), 10000.0 ** -torch.tensor([0.0, 0.5]))
    q, k = (
        fastattn.apply_rotary(y.transpose(1, 2), angles.cos(), angles.sin()).transpose(1, 2)
        for y in (q, k)
    )
    expected = module.out_proj(attend(q, k, v, causal=True)[0].flatten(2))
    y = module(x)
    torch.testing.assert_close(y, expected)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
    torch.testing.assert_close(*gradients)


def test_multi_head_cross_attention():
    module = MHA(32, 4, cross_attn=True)
    assert {"Wq.weight", "Wkv.weight"} < module.state_dict().keys()
    x, context = torch.randn(2, 3, 32), torch.randn(2, 7, 32)
    k, v = module.Wkv(context).unflatten(-1, (2, 4, 8)).unbind(2)
    out, _ = attend(module.Wq(x).unflatten(-1, (4, 8)), k, v)
    torch.testing.assert_close(module(x, context), module.out_proj(out.flatten(2)))
    subset = module(x, context, mixer_subset=slice(0, 1))
    torch.testing.assert_close(subset, module(x, context)[:, :1])


def test_options_of_multi_head_attention_that_are_not_there():
    with pytest.raises(NotImplementedError, match="MHA: dwconv is not supported"):
        MHA(32, 4, dwconv=True)
    with pytest.raises(ValueError, match=r"num_heads must divide embed_dim.*got 32, 5 and 5"):
        MHA(32, 5)
    module, x = MHA(32, 4, rotary_emb_dim=4), torch.randn(1, 3, 32)
    for name, value in (("key_padding_mask", x), ("inference_params", x), ("x_kv", x)):
        with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
            module(x, **{name: value})
    with pytest.raises(NotImplementedError, match="rotary_emb_dim is not supported"):
        module(x[0], cu_seqlens=torch.tensor([0, 3], dtype=torch.int32), max_seqlen=3)
