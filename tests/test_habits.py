"""What people bring along from other libraries: other words, other names, editors."""

import doctest
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional

import fastattn
from fastattn.ops.attention import checkpointing

x = torch.ones(1, 2, 4, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True}, "attention has causal, not is_causal"),
        ({"softmax_scale": 1.0}, "attention has scale, not softmax_scale"),
        ({"window_size": (3, 0)}, "attention has window, not window_size"),
        (
            {"attn_mask": None},
            r"has mask \(booleans\) or bias \(numbers\), not attn_mask",
        ),
        ({"key_padding_mask": None}, "attention has mask, or kv_lengths, not key_padding_mask"),
        ({"deterministic": True}, "attention has no deterministic: its gradients have the same"),
        ({"rhubarb": 1}, r"attention\(\) got an unexpected keyword argument 'rhubarb'"),
    ],
)
def test_an_option_of_others_names_ours(options, message):
    with pytest.raises(TypeError, match=message):
        fastattn.attention(x, x, x, **options)


def test_every_kind_of_attention_names_ours():
    cumulative = torch.tensor([0, 4], dtype=torch.int32)
    packed = (x[0].transpose(0, 1),) * 3
    with pytest.raises(TypeError, match="attention_varlen has scale, not softmax_scale"):
        fastattn.attention_varlen(*packed, cumulative, cumulative, 4, 4, softmax_scale=1.0)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="attention_weights has causal, not is_causal"):
        fastattn.attention_weights(x, x, x[..., 0], is_causal=True)


@pytest.mark.parametrize("window", [-1, (-1, -1), (3, -1)])
def test_a_window_without_a_limit_is_none(window):
    with pytest.raises(ValueError, match="a side without a limit is None"):
        fastattn.attention(x, x, x, window=window)


def test_editors_see_torchs_names_too():
    for ours, theirs in (
        (fastattn.nn, torch.nn),
        (fastattn.functional, torch.nn.functional),
    ):
        names = {name for name in dir(theirs) if not name.startswith("_")}
        assert names <= set(dir(ours))
    assert fastattn.functional.gelu is torch.nn.functional.gelu
    assert fastattn.functional.softmax is not torch.nn.functional.softmax
    with pytest.raises(AttributeError, match="rhubarb"):
        _ = fastattn.functional.rhubarb


class TimmsNorm(torch.nn.LayerNorm):
    """As in timm.layers."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)
        self._fast_norm = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._fast_norm:
            raise AssertionError
        return torch.nn.functional.layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps
        )


def test_timms_norm_is_patched():
    model = torch.nn.Sequential(TimmsNorm(32))
    expected = model(torch.linspace(-1.0, 2.0, 64).reshape(2, 32))
    fastattn.patch(model)
    assert type(model[0]) is not TimmsNorm
    found = model(torch.linspace(-1.0, 2.0, 64).reshape(2, 32))
    torch.testing.assert_close(found, expected)


def test_the_package_may_have_another_name():
    folder = Path(fastattn.__file__).parent
    spec = importlib.util.spec_from_file_location(
        "renamed", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["renamed"] = module
    try:
        spec.loader.exec_module(module)
        assert module.attention is not fastattn.attention
        assert torch.equal(module.attention(x, x, x), fastattn.attention(x, x, x))
        y = torch.ones(3, 8)
        meta = torch.compile(module.rms_norm, backend="eager", fullgraph=True)
        assert torch.equal(meta(y), fastattn.rms_norm(y))
        assert module.models.__name__ == "renamed.models"
        launcher = importlib.import_module("renamed.ops.attention.function").forward
        assert launcher.__name__ == "renamed.kernels.attention.forward"
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "renamed"]:
            del sys.modules[name]


def test_the_example_of_checkpointing_runs():
    assert doctest.testmod(checkpointing).failed == 0


def test_terms_that_are_remembered_are_told_apart_by_type_and_value():
    """1, 1.0 and True are equal, but a window is an integer."""
    near, far = (fastattn.attention(x, x, x, window=w, return_lse=True)[1] for w in (1, 3))
    assert not torch.equal(near, far)
    assert torch.equal(near, fastattn.attention(x, x, x, window=1, return_lse=True)[1])
    for window in (True, 1.0):
        with pytest.raises(TypeError, match="window must be an integer"):
            fastattn.attention(x, x, x, window=window)
    capped = fastattn.attention(x, x, x, softcap=2.0, return_lse=True)[1]
    assert not torch.equal(capped, fastattn.attention(x, x, x, softcap=1.0, return_lse=True)[1])
    assert torch.equal(capped, fastattn.attention(x, x, x, softcap=2.0, return_lse=True)[1])
