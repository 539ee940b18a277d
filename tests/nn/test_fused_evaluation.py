"""torch's fused functions in the place of our modules: when they are called, and what they give."""

from typing import Any

import pytest
import torch
from torch import nn

import fastattn
from fastattn.nn.fused_attention import FEW_MASKED_PAIRS, FEW_PAIRS

B, H, E, HIDDEN = 2, 4, 8, 12

FUSED = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")

# What attention calls its masks, and a layer.
MASKS = ("attn_mask", "key_padding_mask")
LAYER_MASKS = ("src_mask", "src_key_padding_mask")


@pytest.fixture
def fused(monkeypatch):
    """The names of torch's fused functions in the order in which they were called."""
    called: list[str] = []
    for name in FUSED:
        original = getattr(torch, name)

        def call(*args: Any, name: str = name, original: Any = original) -> Any:
            called.append(name)
            return original(*args)

        monkeypatch.setattr(torch, name, call)
    return called


def attention(**options: Any) -> fastattn.nn.MultiheadAttention:
    torch.manual_seed(0)
    return randomised(fastattn.nn.MultiheadAttention(E, H, **{"batch_first": True} | options))


def layer(**options: Any) -> fastattn.nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    options = {"batch_first": True} | options
    return randomised(fastattn.nn.TransformerEncoderLayer(E, H, HIDDEN, **options))


def randomised(module: Any) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double().eval()


def evaluate(module: Any, x: torch.Tensor, **masks: Any) -> torch.Tensor:
    with torch.no_grad(), fastattn.backend("reference"):
        if isinstance(module, nn.MultiheadAttention):
            return module(x, x, x, need_weights=False, **masks)[0]
        return module(x, **masks)


def the_long_way(module: Any, x: torch.Tensor, **masks: Any) -> torch.Tensor:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return evaluate(module, x, **masks)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def inputs(length: int = 5, batch: int = B) -> torch.Tensor:
    return torch.randn(batch, length, E, dtype=torch.float64)


both = pytest.mark.parametrize(
    ("make", "name", "masks"),
    [(attention, FUSED[0], MASKS), (layer, FUSED[1], LAYER_MASKS)],
    ids=["attention", "layer"],
)


@both
@pytest.mark.parametrize("floats", [False, True], ids=["booleans", "floats"])
@pytest.mark.parametrize("shape", [None, (B, 5), (5, 5), (B * H, 5, 5)], ids=str)
def test_small_inputs_are_one_call(make, name, masks, shape, floats, fused):
    module, x = make(), inputs()
    given = {}
    if shape is not None:
        mask = torch.rand(shape) < 0.5
        mask[..., 2] = False
        if floats:
            mask = torch.zeros(shape).double().masked_fill(mask, -torch.inf)
        given[masks[shape == (B, 5)]] = mask
    found = evaluate(module, x, **given)
    assert fused == [name]
    torch.testing.assert_close(found, the_long_way(module, x, **given), rtol=1e-10, atol=1e-10)
    assert fused == [name]


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_weights_are_torchs(masked, averaged, fused):
    """Also NaN, for a query without keys."""
    module, x = attention(), inputs()
    theirs = nn.MultiheadAttention(E, H, batch_first=True).double().eval()
    theirs.load_state_dict(module.state_dict())
    mask = None
    if masked:
        mask = torch.rand(5, 5) < 0.5
        mask[3] = True
    arguments = {"attn_mask": mask, "average_attn_weights": averaged}
    with torch.no_grad(), fastattn.backend("reference"):
        found = module(x, x, x, **arguments)
        expected = theirs(x, x, x, **arguments)
    assert fused == [FUSED[0]] * 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert found[1].isnan().any() == masked


@both
def test_many_pairs_go_the_long_way(make, name, masks, fused):
    module = make()
    for pairs, masked in ((FEW_PAIRS, False), (FEW_MASKED_PAIRS, True)):
        for length, calls in ((int(pairs**0.5), [name]), (1 + int(pairs**0.5), [])):
            fused.clear()
            x = inputs(length, batch=1)
            mask = torch.zeros(length, length, dtype=torch.bool) if masked else None
            evaluate(module, x, **{masks[0]: mask})
            assert fused == calls


@pytest.mark.parametrize("length", [5, 1 + int(FEW_MASKED_PAIRS**0.5)])
def test_a_padded_stack_of_many_pairs_goes_through_nested_tensors(length, fused, monkeypatch):
    stacks = []
    for library in (fastattn.nn, nn):
        one = library.TransformerEncoderLayer(E, H, HIDDEN, batch_first=True)
        stacks.append(library.TransformerEncoder(one, 2).double().eval())
    ours, theirs = stacks
    theirs.load_state_dict(ours.state_dict())
    x = inputs(length)
    padding = torch.zeros(B, length, dtype=torch.bool)
    padding[1, -2:] = True
    expected = evaluate(theirs, x, src_key_padding_mask=padding)
    nested = []
    original = torch._nested_tensor_from_mask  # type: ignore[attr-defined]

    def nest(*args: Any, **options: Any) -> Any:
        nested.append(args)
        return original(*args, **options)

    monkeypatch.setattr(torch, "_nested_tensor_from_mask", nest)
    fused.clear()
    found = evaluate(ours, x, src_key_padding_mask=padding)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert bool(nested) == (length > 5)
    assert fused == [FUSED[1]] * 2


@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"batch_first": False}, {"add_bias_kv": True}, {"add_zero_attn": True}],
    ids=str,
)
def test_unusual_attention_goes_the_long_way(options, fused):
    evaluate(attention(**options), inputs())
    assert fused == []


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"batch_first": False},
        {"activation": nn.functional.silu},
        {"activation": nn.GELU("tanh")},
    ],
    ids=["no biases", "batch second", "other activation", "approximate activation"],
)
def test_unusual_layers_go_the_long_way(options, fused):
    evaluate(layer(**options), inputs())
    assert FUSED[1] not in fused


@both
def test_what_else_goes_the_long_way(make, name, masks, fused):
    module, x = make(), inputs()
    closed = torch.zeros(5, 5, dtype=torch.bool)
    closed[3] = True
    added = torch.randn(5, 5, dtype=torch.float64)
    mask, padding = masks
    for given in ({mask: closed}, {mask: added}, {mask: closed, padding: closed[:B]}):
        assert evaluate(module, x, **given).isfinite().all()
    with torch.autocast("cpu"):
        evaluate(module, x)
    with fastattn.backend("reference"):
        module(*(x, x, x) if make is attention else (x,))
    evaluate(module.train(), x)
    assert fused == []


@pytest.mark.parametrize(
    ("make", "masks"), [(attention, MASKS), (layer, LAYER_MASKS)], ids=["attention", "layer"]
)
def test_a_mask_of_a_wrong_shape_is_an_error(make, masks):
    with pytest.raises(RuntimeError, match=r"attn_mask must have the shape \(5, 5\)"):
        evaluate(make(), inputs(), **{masks[0]: torch.zeros(5, 6, dtype=torch.bool)})


PARTS = ("self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2")


@pytest.mark.parametrize("name", PARTS)
def test_hooks_of_a_layers_parts_are_called(name, fused):
    module, x = layer(), inputs()
    expected = evaluate(module, x)
    seen: list[nn.Module] = []
    getattr(module, name).register_forward_hook(lambda part, *_: seen.append(part))
    fused.clear()
    torch.testing.assert_close(evaluate(module, x), expected, rtol=1e-10, atol=1e-10)
    assert seen == [getattr(module, name)]
    assert FUSED[1] not in fused


def test_a_part_of_another_class_is_called(fused):
    module, x = layer(), inputs()
    before = evaluate(module, x)
    module.linear1 = nn.Sequential(module.linear1, nn.Tanh())  # type: ignore[assignment]
    fused.clear()
    after = evaluate(module, x)
    assert FUSED[1] not in fused
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, the_long_way(module, x), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_under_vmap():
    module = layer()
    x = torch.randn(3, B, 5, E, dtype=torch.float64)
    mask = torch.zeros(B, 5, dtype=torch.bool)
    mask[:, -1] = True
    with torch.no_grad():
        found = torch.vmap(lambda x: module(x, src_key_padding_mask=mask))(x)
        for one, expected in zip(found, x, strict=True):
            torch.testing.assert_close(one, module(expected, src_key_padding_mask=mask))
