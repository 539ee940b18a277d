"""Models compile as one graph with our attention, and compute what eager attention does."""

import itertools

import pytest
import torch

from against_eager import SCENARIOS, faults
from families import FAMILIES
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles the reference backend")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "scenario"), list(itertools.product(["llama", "gemma2", "gpt_oss"], SCENARIOS))
)
def test_one_graph(name: str, scenario: str):
    # gpt-oss's usual experts are a loop over those that are hit, which is no one graph.
    found = faults(
        FAMILIES[name],
        scenario,
        torch.float32,
        prepare=lambda model: model.compile(fullgraph=True, backend="aot_eager"),
        experts="batched_mm" if name == "gpt_oss" else "eager",
    )
    assert found == []


def test_layers_compile_one_by_one():
    def compile_layers(model):
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend="aot_eager")

    assert faults(FAMILIES["gemma2"], "padded", torch.float32, prepare=compile_layers) == []
