"""The gated norm: the bits of Hugging Face's models, groups by themselves, slices, bad inputs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastattn
import fastattn.nn
from fastattn.ops.core.backends import INTERPRETED
from support import DEVICE, WIDEST, assert_close, same_bits

both_backends = pytest.mark.parametrize(
    "device", ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
)
COLS, GROUP = 96, 24


def hugging_face_norms() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Gated norms of Hugging Face's models, and the options that make ours one of them."""
    pytest.importorskip("transformers")
    from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
    from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

    mamba = {"group_size": GROUP, "gate_first": True, "casting": "llama"}
    falcon = {"group_size": GROUP, "casting": "float32"}
    return {
        "mamba2": (MambaRMSNormGated(COLS, GROUP), mamba),
        "bamba": (BambaRMSNormGated(COLS, COLS), {**mamba, "group_size": None}),
        "zamba2": (Zamba2RMSNormGated(COLS, GROUP), mamba),
        "nemotron_h": (NemotronHRMSNormGated(COLS, GROUP), mamba),
        "falcon_h1": (FalconH1RMSNormGated(COLS, 1e-6, COLS // GROUP, True), falcon),
        "falcon_h1, gate first": (
            FalconH1RMSNormGated(COLS, 1e-6, COLS // GROUP, False),
            {**falcon, "gate_first": True},
        ),
        "qwen3_next": (Qwen3NextRMSNormGated(COLS), {"casting": "llama"}),
        "kimi_linear": (KimiLinearRMSNormGated(COLS), {"activation": "sigmoid"}),
    }


NAMES = ["mamba2", "bamba", "zamba2", "nemotron_h", "falcon_h1", "falcon_h1, gate first"]
NAMES += ["qwen3_next", "kimi_linear"]
PAIRS = [(x, w) for x in (torch.bfloat16, torch.float32) for w in (torch.bfloat16, torch.float32)]


@both_backends
@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_that_of_hugging_face(name, dtype, weight_dtype, device):
    module, options = hugging_face_norms()[name]
    with torch.no_grad():
        module.weight.normal_()
    module.to(device=device, dtype=weight_dtype)
    tensors = [torch.randn(2, 20, COLS, device=device).to(dtype).requires_grad_() for _ in "xg"]
    theirs = module(*tensors)
    ours = fastattn.gated_rms_norm(*tensors, module.weight, 1e-6, **options, out_dtype=theirs.dtype)
    assert ours.dtype is theirs.dtype
    if device == "cpu" and not INTERPRETED:
        assert same_bits(ours, theirs)
    leaves = [*tensors, module.weight]
    dy = torch.randn_like(theirs)
    found = [ours, *torch.autograd.grad(ours, leaves, dy)]
    expected = [theirs, *torch.autograd.grad(theirs, leaves, dy)]
    # Their gradients pass through more roundings to 16 bits than ours do.
    eps = max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 8 * eps * b.abs().max()
    if device != "cpu" or INTERPRETED:
        # A wrong place of a rounding would differ in a third of the numbers.
        same = ours == theirs
        assert torch.finfo(theirs.dtype).eps < 1e-4 or same.float().mean() >= 0.995


@both_backends
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("cols", [96, 9000], ids=["narrow", "wide"])
def test_groups_are_normalized_by_themselves(gate_first, cols, device):
    x, gate = (torch.randn(3, 2 * cols, dtype=WIDEST, device=device) for _ in range(2))
    weight = torch.randn(2 * cols, dtype=WIDEST, device=device)
    together = fastattn.gated_rms_norm(
        x, gate, weight, 1e-6, group_size=cols, gate_first=gate_first
    )
    for part in (slice(cols), slice(cols, None)):
        alone = fastattn.gated_rms_norm(
            x[:, part], gate[:, part], weight[part], 1e-6, gate_first=gate_first
        )
        assert_close(together[:, part], alone)


@both_backends
@pytest.mark.parametrize("gate_first", [False, True])
def test_it_is_rms_norm_and_a_product(gate_first, device):
    x, gate = (torch.randn(4, 50, dtype=WIDEST, device=device) for _ in range(2))
    weight = torch.randn(50, dtype=WIDEST, device=device)
    found = fastattn.gated_rms_norm(x, gate, weight, 1e-6, gate_first=gate_first)
    if gate_first:
        expected = fastattn.rms_norm(x * F.silu(gate), weight, 1e-6)
    else:
        expected = fastattn.rms_norm(x, weight, 1e-6) * F.silu(gate)
    assert_close(found, expected)


@pytest.mark.kernels
def test_slices_of_one_product_are_read_in_place(monkeypatch):
    product = torch.randn(2, 7, 3 * COLS, device=DEVICE)
    weight = torch.ones(COLS, device=DEVICE)
    x, gate = product[..., :COLS], product[..., COLS : 2 * COLS]
    expected = fastattn.gated_rms_norm(x.clone(), gate.clone(), weight, 1e-6, group_size=GROUP)
    contiguous = torch.Tensor.contiguous

    def refuse(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        assert tensor.dim() == 1
        return contiguous(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    found = fastattn.gated_rms_norm(x, gate, weight, 1e-6, group_size=GROUP)
    monkeypatch.undo()
    assert same_bits(found, expected)


@both_backends
def test_the_module_has_the_parameters_of_the_models(device):
    module = fastattn.nn.GatedRMSNorm(COLS, 1e-5, group_size=GROUP, gate_first=True, device=device)
    assert list(module.state_dict()) == ["weight"]
    assert "96, eps=1e-05, group_size=24, gate_first=True" in repr(module)
    x, gate = torch.randn(2, 5, COLS, device=device), torch.randn(2, 5, COLS, device=device)
    expected = fastattn.gated_rms_norm(
        x, gate, module.weight, 1e-5, group_size=GROUP, gate_first=True
    )
    assert same_bits(module(x, gate), expected)


ROWS = torch.randn(3, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 1.0}, TypeError, "x must be a tensor"),
        ({"gate": None}, TypeError, "gate must be a tensor, got NoneType"),
        ({"gate": torch.ones(3, 7)}, ValueError, r"gate must have shape \(3, 8\), got \(3, 7\)"),
        ({"gate": ROWS.double()}, TypeError, "float64 mixes with no other dtype"),
        ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(8,\), got \(4,\)"),
        ({"eps": -1.0}, ValueError, "eps must be non-negative"),
        ({"group_size": 3}, ValueError, "group_size must divide the 8 columns of x, got 3"),
        ({"group_size": 0}, ValueError, "group_size must divide the 8 columns of x, got 0"),
        ({"activation": "gelu"}, ValueError, "activation must be one of silu, sigmoid"),
        ({"casting": "t5"}, ValueError, "casting must be one of float32, llama"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be float16"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        fastattn.gated_rms_norm(**{"x": ROWS, "gate": ROWS, "weight": torch.ones(8), **change})
