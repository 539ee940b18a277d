"""What is special about the norms: the models they agree with, extreme values, distant rows."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastattn
import fastattn.functional
from fastattn.checking import check_sample
from fastattn.ops.core.backends import INTERPRETED
from fastattn.ops.core.catalog import OPERATIONS, Sample
from support import DEVICE, same_bits

HALVES = (torch.float16, torch.bfloat16)

both_backends = pytest.mark.parametrize(
    "device", ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
)

WIDTHS = pytest.mark.parametrize("cols", [100, 16500], ids=["narrow", "wide"])


def hugging_face_norms() -> dict[str, tuple[type, dict[str, Any]]]:
    """Norm classes of Hugging Face's models, and the options that make rms_norm one of them."""
    pytest.importorskip("transformers")
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    return {
        "llama": (LlamaRMSNorm, {"casting": "llama"}),
        "gemma": (GemmaRMSNorm, {"casting": "gemma", "weight_offset": 1.0}),
        "gpt_oss": (GptOssRMSNorm, {"casting": "float32"}),
        "t5": (T5LayerNorm, {"casting": "t5"}),
    }


def with_hugging_face(
    name: str, dtype: torch.dtype, device: str, weight_dtype: torch.dtype | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(output, dx, dweight) of rms_norm, and those of the module it stands for."""
    kind, options = hugging_face_norms()[name]
    module = kind(96, eps=1e-6)
    with torch.no_grad():
        module.weight.normal_()
    module.to(device=device, dtype=weight_dtype or dtype)
    x = torch.randn(40, 96, device=device).to(dtype).requires_grad_()
    theirs = module(x)
    ours = fastattn.rms_norm(x, module.weight, 1e-6, **options, out_dtype=theirs.dtype)
    dy = torch.randn(40, 96, device=device).to(theirs.dtype)
    return tuple(  # type: ignore[return-value]
        [output, *torch.autograd.grad(output, [x, module.weight], dy)] for output in (ours, theirs)
    )


FOUR = ["llama", "gemma", "gpt_oss", "t5"]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FOUR)
def test_reference_has_the_bits_of_hugging_face(name, dtype):
    (output, dx, dweight), (their_output, their_dx, their_dweight) = with_hugging_face(
        name, dtype, "cpu"
    )
    assert same_bits(output, their_output)
    # Their gradients pass through a rounding more, ours through none.
    for ours, theirs in ((dx, their_dx), (dweight, their_dweight)):
        assert (ours - theirs).abs().max() <= 8 * torch.finfo(dtype).eps * theirs.abs().max()


PAIRS = [(x, w) for x in (torch.bfloat16, torch.float32) for w in (torch.bfloat16, torch.float32)]


@both_backends
@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("name", FOUR)
def test_out_dtype_gives_the_dtype_of_hugging_face(name, dtype, weight_dtype, device):
    (output, *gradients), (their_output, *their_gradients) = with_hugging_face(
        name, dtype, str(device), weight_dtype
    )
    expected = {"llama": torch.promote_types(dtype, weight_dtype), "t5": weight_dtype}
    assert output.dtype is their_output.dtype is expected.get(name, dtype)
    if device == "cpu" and not INTERPRETED:
        assert same_bits(output, their_output)
    # Where another order of sums flips a rounding to 16 bits, what follows is off by one of those.
    eps = max(torch.finfo(dtype).eps, torch.finfo(weight_dtype).eps)
    for ours, theirs in zip((output, *gradients), (their_output, *their_gradients), strict=True):
        assert ours.dtype is theirs.dtype
        assert (ours - theirs).abs().max() <= 8 * eps * theirs.abs().max()


@both_backends
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"])
@pytest.mark.parametrize("cols", [40, 16500], ids=["narrow", "wide"])
def test_out_dtype_leaves_out_the_last_rounding(name, cols, device):
    x = torch.randn(3, cols, device=device).bfloat16()
    weight = torch.rand(cols, device=device)
    arguments = (x, torch.zeros_like(x), weight) if name.startswith("add") else (x, weight)
    function = getattr(fastattn, name)
    rounded, wide = (function(*arguments, **o) for o in ({}, {"out_dtype": torch.float32}))
    if name.startswith("add"):
        assert same_bits(rounded[1], wide[1])
        rounded, wide = rounded[0], wide[0]
    assert (rounded.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert same_bits(wide.bfloat16(), rounded)
    assert not torch.equal(wide, rounded.float())


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FOUR)
def test_kernels_have_the_bits_of_hugging_face_but_for_ties(name, dtype):
    (output, dx, dweight), (their_output, their_dx, their_dweight) = with_hugging_face(
        name, dtype, str(DEVICE)
    )
    # Sums in another order move a statistic by its last bit in float32, which flips a rounding to
    # 16 bits once in thousands of elements. A wrong casting would differ in a third of them.
    assert (output == their_output).float().mean() >= 0.998
    for ours, theirs in ((output, their_output), (dx, their_dx), (dweight, their_dweight)):
        assert (ours - theirs).abs().max() <= 8 * torch.finfo(dtype).eps * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param(DEVICE, marks=pytest.mark.kernels, id="kernels")]
)
def test_eps_none_is_that_of_torch(dtype, device):
    # Small numbers, beside which every epsilon counts.
    x = (torch.randn(5, 32, device=device) * 1e-3).to(dtype)
    expected = F.rms_norm(x, (32,))
    found = fastattn.rms_norm(x)
    added, _ = fastattn.add_rms_norm(x, torch.zeros_like(x))
    tolerance = 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() <= tolerance
    assert (added - expected).abs().max() <= tolerance


def outputs_and_gradients(function: Callable, *arguments: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of a call, and its gradients for the same incoming gradient in every row."""
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    row = torch.linspace(-1.0, 2.0, leaves[0].shape[-1]).to(leaves[0])
    gradients = torch.autograd.grad(outputs, leaves, [row.expand_as(leaves[0])] * len(outputs))
    return [*outputs, *gradients]


NORMS = {
    "rms_norm": lambda x: fastattn.rms_norm(x, None, 1e-6),
    "layer_norm": lambda x: fastattn.layer_norm(x, eps=1e-6),
}
every_norm = pytest.mark.parametrize("name", NORMS)


@pytest.mark.kernels
@WIDTHS
@every_norm
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-20])
def test_constant_rows(name, value, cols):
    # LayerNorm has nothing left of them but eps; RMSNorm of zeros likewise.
    rows = torch.full((2, cols), value, device=DEVICE)
    found = outputs_and_gradients(NORMS[name], rows)
    with fastattn.backend("reference"):
        expected = outputs_and_gradients(NORMS[name], rows.cpu().double())
    for a, b in zip(found, expected, strict=True):
        assert (a.cpu() - b).abs().max() <= 2e-6 * b.abs().max() + 1e-12


@both_backends
@pytest.mark.parametrize("cols", [1, 5, 1000])
@pytest.mark.parametrize("value", [1e6, -0.1, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_of_constant_rows_layer_norm_leaves_the_bias(device, cols, value, dtype):
    x = torch.full((3, cols), value).to(dtype if value != 1e6 else torch.bfloat16).to(dtype)
    x = x.clamp(max=torch.finfo(dtype).max).to(device).requires_grad_()
    weight = torch.ones(cols, device=device, dtype=dtype).requires_grad_()
    bias = torch.full_like(weight, 3.0)
    residual = torch.zeros_like(x)
    found = [
        fastattn.layer_norm(x, weight, bias),
        fastattn.layer_norm(x, weight.float(), bias.float()),
        fastattn.add_layer_norm(x, residual, weight, bias)[0],
    ]
    if cols == 1:
        found.append(fastattn.functional.layer_norm(x, (1,), weight, bias))
    for y in found:
        assert torch.equal(y, torch.full_like(y, 3.0))
        dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
        assert not dweight.any()
        # Nothing comes of adding one number to all of a row.
        assert not dx.any()


@pytest.mark.kernels
@WIDTHS
@every_norm
@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e15])
def test_tiny_and_large_values(name, scale, cols):
    # Exact up to rounding wherever the squares stay in float32's range; PyTorch's own gradients,
    # which pass through rstd cubed, are off by a percent at 1e15.
    rows = torch.randn(2, cols, device=DEVICE) * scale
    found = outputs_and_gradients(NORMS[name], rows)
    with fastattn.backend("reference"):
        expected = outputs_and_gradients(NORMS[name], rows.cpu().double())
    for a, b in zip(found, expected, strict=True):
        assert (a.cpu() - b).abs().max() <= 2e-6 * b.abs().max()


@pytest.mark.kernels
@WIDTHS
@every_norm
# The interpreter computes with numpy, which warns of the overflow that is wanted here.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_squares_beyond_float32_give_zeros_as_in_torch(name, cols):
    rows = torch.randn(2, cols, device=DEVICE) * 1e30
    found = outputs_and_gradients(NORMS[name], rows)
    with fastattn.backend("reference"):
        expected = outputs_and_gradients(NORMS[name], rows)
    for a, b in zip(found, expected, strict=True):
        assert not b.any()
        assert not a.any()


@pytest.mark.kernels
@WIDTHS
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_bad_row_spoils_no_other(name, bad, cols):
    function = getattr(fastattn, name)
    arguments = [torch.randn(3, cols, device=DEVICE) for _ in range(1 + name.startswith("add"))]
    arguments[0][1, cols // 2] = bad
    found = outputs_and_gradients(function, *arguments)
    assert not found[0][1].isfinite().all()
    expected = outputs_and_gradients(function, *(argument[::2] for argument in arguments))
    for a, b in zip(found, expected, strict=True):
        assert same_bits(a[::2], b)


@pytest.mark.kernels
def test_gradient_through_the_new_residual_alone_is_passed_on_unchanged():
    x, residual = (torch.randn(4, 24, device=DEVICE).requires_grad_() for _ in range(2))
    weight = torch.randn(24, device=DEVICE).requires_grad_()
    _, new_residual = fastattn.add_rms_norm(x, residual, weight, 1e-6)
    incoming = torch.randn_like(new_residual)
    dx, dresidual, dweight = torch.autograd.grad(
        new_residual, [x, residual, weight], incoming, materialize_grads=True
    )
    assert same_bits(dx, incoming)
    assert same_bits(dresidual, incoming)
    assert not dweight.any()


@pytest.mark.kernels
@pytest.mark.parametrize("cols", [40, 8200, 16500], ids=["narrow", "wide backward", "wide"])
@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
def test_dropout_on_the_branch_is_the_mask_of_its_seed(name, cols):
    seed = torch.tensor([2**40 + 11], device=DEVICE)
    keep = fastattn.dropout_mask(seed, (2, cols), 0.3)
    x = torch.randn(2, cols, device=DEVICE, requires_grad=True)
    residual = torch.zeros(2, cols, device=DEVICE)
    _, new_residual = getattr(fastattn, name)(x, residual, dropout_p=0.3, seed=seed)
    scale = 1.0 / (1.0 - 0.3)
    by_hand = torch.where(keep, x.detach() * scale, 0.0)
    torch.testing.assert_close(new_residual.detach(), by_hand, rtol=2e-7, atol=0.0)
    assert torch.equal(new_residual != 0.0, keep)

    (dx,) = torch.autograd.grad(new_residual, x, torch.ones_like(x))
    assert torch.equal(dx != 0.0, keep)
    torch.testing.assert_close(dx[keep], torch.full_like(dx[keep], scale), rtol=2e-7, atol=0.0)


@pytest.mark.kernels
def test_dropout_on_the_branch_draws_its_seed_from_torch():
    x = torch.ones(50, 64, device=DEVICE)
    residuals = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        residuals.append(fastattn.add_layer_norm(x, torch.zeros_like(x), dropout_p=0.5)[1])
    assert same_bits(residuals[0], residuals[1])
    assert not torch.equal(residuals[0], residuals[2])


@pytest.mark.kernels
@pytest.mark.parametrize("cols", [40, 16500], ids=["narrow", "wide"])
@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
def test_rows_more_than_two_billion_elements_apart(name, cols, monkeypatch):
    # Of these four gigabytes only the pages of the rows are ever touched, and not filled either.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    distance = 2**30
    memory = torch.empty(2 * distance + 3 * cols, dtype=torch.bfloat16, device=DEVICE)

    def distant(offset: int) -> torch.Tensor:
        rows = memory.as_strided((3, cols), (distance, 1), offset)
        return rows.copy_(torch.randn(3, cols, device=DEVICE))

    function = getattr(fastattn, name)
    x, residual, dy = (distant(place * cols) for place in range(3))
    results = []
    for tensors in ((x, residual, dy), (x.clone(), residual.clone(), dy.clone())):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:2]]
        y, new_residual = function(*leaves)
        gradients = torch.autograd.grad((y, new_residual), leaves, (tensors[2], tensors[2]))
        results.append([y, new_residual, *gradients])
    for far, near in zip(*results, strict=True):
        assert same_bits(far, near)


@pytest.mark.gpu
@pytest.mark.kernels
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_tensors_of_more_than_two_billion_elements(name):
    rows, cols = 2**21 + 5, 1024
    if torch.cuda.mem_get_info()[0] < 8 * rows * cols * 2:
        pytest.skip("needs memory for eight tensors of 4 GiB")
    x = torch.randn(rows, cols, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    function = getattr(fastattn, name)
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    last = x[-5:].detach().clone().requires_grad_()
    y_last = function(last)
    (dx_last,) = torch.autograd.grad(y_last, last, dy[-5:].clone())
    assert same_bits(y[-5:], y_last)
    assert same_bits(dx[-5:], dx_last)


@pytest.mark.kernels
@pytest.mark.slow
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_a_row_of_262144_columns(name):
    sample = Sample("widest", x=(1, 262_144), weight=(262_144,), bias=(262_144,), eps=1e-6)
    for comparison in check_sample(OPERATIONS[name], sample, torch.bfloat16, str(DEVICE)):
        assert comparison.passed, comparison
