"""Models compile as one graph with our attention, and compute the same."""

import itertools
from typing import Any

import pytest
import torch

from against_eager import DOCUMENTS, PADS
from families import FAMILIES, LENGTH, make_model, tokens
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles the reference backend")

REAL = torch.arange(LENGTH) >= torch.tensor(PADS)[:, None]
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in DOCUMENTS])
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"attention_mask": REAL.long()},
    "packed": {"position_ids": POSITIONS},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "way"), list(itertools.product(["llama", "gemma2", "gpt_oss"], WAYS))
)
def test_one_graph(name: str, way: str):
    model = make_model(FAMILIES[name], "fastattn")
    if name == "gpt_oss":
        # Its usual experts are a loop over those that are hit, which is no one graph.
        model.set_experts_implementation("batched_mm")
    outputs, gradients = [], []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        logits = function(input_ids=tokens(), use_cache=False, **WAYS[way]).logits
        if way == "padded":
            logits = logits[REAL]
        logits.square().mean().backward()
        outputs.append(logits.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_layers_compile_one_by_one():
    model = make_model(FAMILIES["gemma2"], "fastattn")
    expected = model(tokens(), attention_mask=REAL.long(), use_cache=False).logits[REAL]
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    found = model(tokens(), attention_mask=REAL.long(), use_cache=False).logits[REAL]
    torch.testing.assert_close(found, expected)
