"""The second name: transformers finds flash-attn's functions by it, and vision towers pack."""

import pytest
import torch
import transformers
from transformers import modeling_flash_attention_utils

import fastattn
from against_unpatched import breaches, gradients_of, measure
from families import FAMILIES, make_model, tokens
from fastattn.checking import measure_reference
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
    calls = []
    forward = transformers.AttentionInterface()[PACKING_NAME]

    def counted(*args, **kwargs):
        calls.append(kwargs["cu_seq_lens_q"])
        return forward(*args, **kwargs)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, PACKING_NAME, counted)
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    tower = transformers.AutoModel.from_config(config)

    def run(model):
        model.zero_grad()
        output = model(patches.to(model.dtype), grid_thw=grids).last_hidden_state
        output.square().mean().backward()
        return {"output": output.detach(), **gradients_of(model)}

    measured = measure(tower, run)
    tower.set_attn_implementation(PACKING_NAME)
    assert breaches(run(tower), measured) == []
    assert len(calls) == 2


@pytest.mark.parametrize("window", [(-1, -1), (3, -1), (2, 1)])
def test_functions_of_flash_attn(window: tuple[int, int]):
    options = {"softcap": 3.0, "softmax_scale": 0.4, "causal": True, "window_size": window}
    sides = tuple(None if reach < 0 else reach for reach in window)
    heads = [torch.randn(2, 7, count, 8) for count in (4, 2, 2)]

    def formula(change):
        q, k, v = (change(x).transpose(1, 2) for x in heads)
        terms = {"causal": True, "softcap": 3.0, "scale": 0.4, "window": sides}
        return {"output": fastattn.attention(q, k, v, **terms).transpose(1, 2)}

    measured = measure_reference(formula)
    assert breaches({"output": flash_attn_func(*heads, **options)}, measured) == []
    ends = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in heads), ends, ends, torch.tensor(7), 7, **options
    )
    assert breaches({"output": packed.view(2, 7, 4, 8)}, measured) == []
