"""Weights of a tensor subclass with a behaviour of its own: the layers that have them are called.

Quantizers put such weights into linear layers. They know PyTorch's functions, and no kernels.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_module import CASES, called
from torch.utils._python_dispatch import return_and_correct_aliasing

import fastattn
import fastattn.nn as nn
from fastattn.nn.mlp import is_only_linear
from support import DEVICE, WIDEST, assert_close

BACKENDS = [pytest.param("triton", marks=pytest.mark.kernels), "reference"]


class Quantized(torch.Tensor):
    """A weight (out, in) as 8-bit integers and a scale a row, which knows linear layers alone."""

    whole: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, whole: torch.Tensor, scale: torch.Tensor) -> "Quantized":
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, whole.shape, dtype=scale.dtype, device=whole.device
        )
        made.whole, made.scale = whole, scale
        return made

    @classmethod
    def of(cls, weight: torch.Tensor) -> "Quantized":
        scale = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    def dequantized(self) -> torch.Tensor:
        return self.whole * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dequantized(), *bias, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            made = cls(args[0].whole, args[0].scale)
            return return_and_correct_aliasing(func, args, kwargs or {}, made)
        raise NotImplementedError(f"Quantized: {func}")


def quantize(model: torch.nn.Module) -> list[str]:
    """Quantize all linear layers that are called, and tell which."""
    names = []
    for name, layer in model.named_modules():
        # torch.nn's attention itself computes with the weight of its output, and so does LoRA.
        if isinstance(layer, torch.nn.Linear) and not isinstance(
            layer, torch.nn.modules.linear.NonDynamicallyQuantizableLinear
        ):
            quantized = Quantized.of(layer.weight)
            layer.weight = torch.nn.Parameter(quantized, requires_grad=False)
            names.append(name)
    return names


def plain_twin(model: torch.nn.Module) -> None:
    """Make the weights that `quantize` would change those that it gives."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and not isinstance(
            layer, torch.nn.modules.linear.NonDynamicallyQuantizableLinear
        ):
            whole = Quantized.of(layer.weight).dequantized()
            layer.weight = torch.nn.Parameter(whole, requires_grad=False)


def results(name: str, module: Any, device: str) -> list[torch.Tensor]:
    """Outputs, and the gradients of all parameters that have one."""
    outputs = called(CASES[name], module, WIDEST, device)
    total: Any = sum(output.sin().sum() for output in outputs)
    wanted = [p for p in module.parameters() if p.requires_grad]
    if not (wanted and total.requires_grad):
        return outputs
    gradients = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return [*outputs, *gradients]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_layers_with_quantized_weights_are_called(name, backend):
    device = str(DEVICE) if backend == "triton" else "cpu"
    module = CASES[name].make().to(device, WIDEST)
    # Dropout would draw other numbers.
    module.eval()
    plain_twin(module)
    with fastattn.backend(backend):
        expected = results(name, module, device)
        quantize(module)
        found = results(name, module, device)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_with_quantized_weights_are_adapted(backend):
    device = str(DEVICE) if backend == "triton" else "cpu"
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)).to(device, WIDEST)
    plain_twin(model)
    x = torch.randn(3, 8, dtype=WIDEST, device=device)
    with fastattn.backend(backend):
        expected = model(x)
        assert quantize(model) == ["0", "1"]
        nn.apply_lora(model, ["0", "1"], rank=2)
        found = model(x)
    assert_close(found, expected)
    found.sum().backward()
    adapted: Any = model[1]
    assert adapted.lora_B.grad.abs().sum() > 0


def test_patched_modules_take_weights_that_are_quantized_later():
    module = torch.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    plain_twin(module)
    x = torch.randn(2, 5, 8)
    expected = module(x)
    fastattn.patch(module, linear=True)
    assert quantize(module) == ["linear1", "linear2"]
    torch.testing.assert_close(module(x), expected)


def test_a_subclass_without_a_behaviour_of_its_own_is_fused():
    class Named(torch.nn.Parameter):
        pass

    layer = nn.Linear(8, 4)
    assert is_only_linear(layer)
    layer.weight = Named(layer.weight.detach())
    assert is_only_linear(layer)
    quantize(layer)
    assert not is_only_linear(layer)
