"""Export to ONNX: with the reference it computes the same at other lengths; kernels are refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastattn
from fastattn import nn
from support import DEVICE

pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript, which is not installed")
onnx: Any = pytest.importorskip("onnx.reference", reason="onnx is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch.onnx tells of packages that are not there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def block() -> torch.nn.Module:
    return nn.TransformerBlock(
        nn.Attention(16, 4, 2, causal=True, rotary=nn.RotaryEmbedding(4), qk_norm=nn.RMSNorm),
        nn.GatedMLP(16, 24),
        lambda: nn.RMSNorm(16),
    )


def encoder_layer() -> torch.nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, activation="gelu")


CASES: dict[str, Callable[[], torch.nn.Module]] = {
    "block": block,
    "encoder layer": encoder_layer,
}


def exported(module: torch.nn.Module, x: torch.Tensor) -> Any:
    shapes: Any = ({0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2)},)
    return torch.onnx.export(module.eval(), (x,), dynamo=True, verbose=False, dynamic_shapes=shapes)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_the_reference_is_exported_with_an_open_length(name):
    module = CASES[name]()
    with fastattn.backend("reference"), torch.no_grad():
        program = exported(module, torch.randn(2, 5, 16))
        session = onnx.ReferenceEvaluator(program.model_proto)
        for sizes in ((2, 5), (3, 9)):
            x = torch.randn(*sizes, 16)
            (found,) = session.run(None, {session.input_names[0]: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(found), module(x))


@pytest.mark.kernels
@pytest.mark.slow
def test_kernels_are_no_functions_of_onnx():
    with (
        fastattn.backend("triton"),
        pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"Failed to convert") as raised,
    ):
        exported(nn.LayerNorm(16).to(DEVICE), torch.randn(2, 5, 16, device=DEVICE))
    assert "fastattn" in str(raised.value.__cause__)
