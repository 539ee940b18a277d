"""Libraries that import flash_attn find ours under its name, and nothing that is not there."""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from fastattn.integrations import flash_attn as ours
from fastattn.integrations.flash_attn import install as module
from fastattn.integrations.flash_attn import install_as_flash_attn, uninstall_as_flash_attn

MODULES = [
    "flash_attn",
    "flash_attn.bert_padding",
    "flash_attn.flash_attn_interface",
    "flash_attn.layers",
    "flash_attn.layers.rotary",
    "flash_attn.losses",
    "flash_attn.losses.cross_entropy",
    "flash_attn.modules",
    "flash_attn.modules.mha",
    "flash_attn.ops",
    "flash_attn.ops.activations",
    "flash_attn.ops.fused_dense",
    "flash_attn.ops.triton",
    "flash_attn.ops.triton.cross_entropy",
    "flash_attn.ops.triton.layer_norm",
]


@pytest.fixture
def installed() -> Iterator[ModuleType]:
    install_as_flash_attn()
    yield sys.modules["flash_attn"]
    uninstall_as_flash_attn()


def test_modules_of_flash_attn_are_found(installed: ModuleType):
    assert sorted(name for name in sys.modules if name.startswith("flash_attn")) == MODULES
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.name == name
        assert importlib.import_module(name) is sys.modules[name]
    assert installed.__version__ == "2.8.4+fastattn"
    assert installed.flash_attn_func is ours.flash_attn_func


def test_imports_of_callers(installed: ModuleType):
    call = """
import flash_attn, flash_attn.layers.rotary
from flash_attn import flash_attn_func, flash_attn_varlen_func, __version__
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_varlen_forward
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb_qkv_
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.modules.mha import MHA
from flash_attn.ops.activations import swiglu
from flash_attn.ops.fused_dense import FusedDense
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn
assert flash_attn.layers.rotary.RotaryEmbedding is RotaryEmbedding
"""
    exec(call, {})
    q, k, v = torch.randn(3, 1, 4, 2, 8)
    assert installed.flash_attn_func(q, k, v).shape == (1, 4, 2, 8)


@pytest.mark.parametrize(
    "name", ["flash_attn.ops.layer_norm", "flash_attn.install", "flash_attn_3"]
)
def test_what_is_not_there_is_no_module(name: str, installed: ModuleType):
    with pytest.raises(ModuleNotFoundError, match=name):
        importlib.import_module(name)


def test_a_second_call_changes_nothing(installed: ModuleType):
    install_as_flash_attn()
    assert sys.modules["flash_attn"] is installed


def test_uninstalling_leaves_nothing():
    uninstall_as_flash_attn()
    install_as_flash_attn()
    first = sys.modules["flash_attn"]
    uninstall_as_flash_attn()
    assert not [name for name in sys.modules if name.startswith("flash_attn")]
    assert importlib.util.find_spec("flash_attn") is None
    install_as_flash_attn()
    assert sys.modules["flash_attn"] is not first
    uninstall_as_flash_attn()


def test_flash_attn_itself_is_not_replaced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "version", lambda name: "2.8.3" if name == "flash-attn" else "0")
    with pytest.raises(RuntimeError, match=r"flash-attn 2\.8\.3 is installed"):
        install_as_flash_attn()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    with pytest.raises(RuntimeError, match="another module flash_attn has been imported"):
        install_as_flash_attn()


def test_no_distribution_is_made_up(installed: ModuleType):
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")


def test_transformers_is_not_told_of_another_flash_attn():
    pytest.importorskip("transformers")
    program = """
from fastattn.integrations.flash_attn import install_as_flash_attn
install_as_flash_attn()
from transformers.utils import is_flash_attn_2_available
assert not is_flash_attn_2_available()
from transformers import LlamaConfig, LlamaForCausalLM
"""
    subprocess.run([sys.executable, "-c", program], check=True)
