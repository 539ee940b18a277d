"""The second name: transformers finds flash-attn's functions by it, and vision towers pack."""

import pytest
import torch
import transformers
from transformers import modeling_flash_attention_utils

import fastattn
from families import FAMILIES, make_model, tokens
from fastattn.integrations.transformers import NAME, PACKING_NAME
from fastattn.integrations.transformers.flash import flash_attn_func, flash_attn_varlen_func
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")


def test_the_private_function_is_still_there():
    assert modeling_flash_attention_utils._lazy_imports.__name__ == "_lazy_imports"
    found, _ = modeling_flash_attention_utils.lazy_import_flash_attention(PACKING_NAME)
    assert found[:2] == (flash_attn_func, flash_attn_varlen_func)


def test_language_models_compute_the_same_by_both_names():
    model = make_model(FAMILIES["gemma2"], NAME)
    expected = model(tokens(), use_cache=False).logits
    model.set_attn_implementation(PACKING_NAME)
    assert torch.equal(model(tokens(), use_cache=False).logits, expected)


def test_a_vision_tower_attends_to_all_images_in_one_call(monkeypatch):
    config = transformers.Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32,
        patch_size=4, window_size=16, fullatt_block_indexes=[1], in_channels=3,
    )  # fmt: skip
    grids = torch.tensor([[1, 4, 4], [1, 6, 4], [1, 2, 2]])
    patches = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4)
    outputs, gradients, calls = [], [], []
    forward = transformers.AttentionInterface()[PACKING_NAME]

    def counted(*args, **kwargs):
        calls.append(kwargs["cu_seq_lens_q"])
        return forward(*args, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, PACKING_NAME, counted)
    for name in ("eager", PACKING_NAME):
        torch.manual_seed(0)
        config._attn_implementation = name
        tower = transformers.AutoModel.from_config(config)
        output = tower(patches, grid_thw=grids).last_hidden_state
        output.square().mean().backward()
        outputs.append(output)
        learned = [p for p in tower.parameters() if p.grad is not None]
        gradients.append(torch.cat([p.grad.flatten() for p in learned]))
    assert len(calls) == 2
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("window", [(-1, -1), (3, -1), (2, 1)])
def test_functions_of_flash_attn(window: tuple[int, int]):
    q, k, v = (torch.randn(2, 7, heads, 8) for heads in (4, 2, 2))
    options = {"softcap": 3.0, "softmax_scale": 0.4, "causal": True, "window_size": window}
    sides = tuple(None if reach < 0 else reach for reach in window)
    expected = fastattn.attention(
        *(x.transpose(1, 2) for x in (q, k, v)), causal=True, softcap=3.0, scale=0.4, window=sides
    ).transpose(1, 2)
    torch.testing.assert_close(flash_attn_func(q, k, v, **options), expected)
    ends = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), ends, ends, torch.tensor(7), 7, **options
    )
    torch.testing.assert_close(packed.view_as(expected), expected)
