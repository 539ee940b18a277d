"""The models that are timed beside ours compute what ours compute."""

import pytest
import torch

from bench.inputs import random_arguments, results_of
from bench.registry.models import OPS, SMALL
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
CPU = torch.device("cpu")


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
def test_all_contenders_compute_the_same(op):
    pytest.importorskip("transformers")
    arguments = random_arguments(op, SMALL, torch.float32, CPU)
    incoming = [torch.ones(())]
    ours = results_of(op.call, arguments, incoming)
    for other in (op.torch, op.timing.rivals["transformers"]()):
        for name, expected in results_of(other, arguments, incoming).items():
            # The keys' biases have a gradient of rounding errors where no positions turn them.
            scale = max(expected.abs().max().item(), 1e-3)
            error = (ours[name] - expected).abs().max().item()
            assert error <= 1e-4 * scale, f"{name}: {error:.1e}, largest {scale:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS])
def test_what_ours_is_compared_with_compiles_as_one_graph(op):
    arguments = random_arguments(op, SMALL, torch.float32, CPU)
    expected = op.torch(**arguments)
    torch.compiler.reset()
    compiled = torch.compile(op.torch, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), expected)
