"""Experts of Hugging Face's models by name: logits and gradients of their own loop."""

from typing import Any

import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from against_eager import changed
from against_unpatched import breaches, gradients_of, measure
from families import FAMILIES, make_model, tokens
from fastattn.checking import Change, measure_reference
from fastattn.integrations.transformers import experts_forward
from fastattn.ops.core.backends import INTERPRETED
from support import count_launches

WITH_EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]


def results_of(model: Any) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every parameter."""
    model.zero_grad()
    ids = tokens()
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    return {"logits": output.logits.detach(), **gradients_of(model)}


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_model_computes_what_its_own_experts_do(name: str) -> None:
    model = make_model(FAMILIES[name], "eager").eval()
    model.set_experts_implementation("eager")
    measured = measure(model, results_of)
    model.set_experts_implementation("fastattn")
    with count_launches() as launches:
        found = results_of(model)
    assert ("experts_forward_kernel" in launches) == INTERPRETED
    assert breaches(found, measured) == []


class Plain(torch.nn.Module):
    """Experts as transformers decorates them, of every layout."""

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__()
        count, hidden, inside = 3, 8, 6
        width = 2 * inside if options.get("has_gate", True) else inside
        up, down = (width, hidden), (hidden, inside)
        if options.get("is_transposed"):
            up, down = up[::-1], down[::-1]
        self.num_experts = count
        first = "gate_up_proj" if options.get("has_gate", True) else "up_proj"
        self.register_parameter(first, torch.nn.Parameter(0.4 * torch.randn(count, *up)))
        self.down_proj = torch.nn.Parameter(0.4 * torch.randn(count, *down))
        if options.get("has_bias"):
            self.register_parameter(f"{first}_bias", torch.nn.Parameter(torch.randn(count, width)))
            self.down_proj_bias = torch.nn.Parameter(torch.randn(count, hidden))
        self.act_fn = options.pop("act_fn", torch.nn.SiLU())
        if options.get("has_post_expert_norm"):
            self.post_expert_norm = torch.nn.RMSNorm(hidden, eps=1e-6)

    def forward(self, *_: Any) -> Any:
        raise AssertionError("the loop is not there")


LAYOUTS: dict[str, dict[str, Any]] = {
    "as most": {},
    "gelu": {"act_fn": ACT2FN["gelu_pytorch_tanh"]},
    "an activation of its own": {"act_fn": torch.nn.Mish()},
    "transposed, biases": {"is_transposed": True, "has_bias": True},
    "no gate": {"has_gate": False, "has_bias": True},
    "a norm behind": {"has_post_expert_norm": True},
}


@pytest.mark.skipif(INTERPRETED, reason="shown by models there")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_sentinels(layout: str) -> None:
    from transformers.integrations.moe import use_experts_implementation

    options = dict(LAYOUTS[layout])
    flags = {name: value for name, value in options.items() if name != "act_fn"}
    kind = use_experts_implementation(**flags)(type("Decorated", (Plain,), {}))
    torch.manual_seed(0)
    experts = kind(transformers.PretrainedConfig(), **options)
    x, weights = torch.randn(7, 8), torch.rand(7, 2)
    ids = torch.arange(14).view(7, 2) % 4

    def run(forward: Any, change: Change) -> dict[str, torch.Tensor]:
        leaves = [change(tensor).requires_grad_() for tensor in (x, weights)]
        module = changed(experts, change)
        output = forward(module, leaves[0], ids, leaves[1])
        output.square().sum().backward()
        gradients = {"dx": leaves[0].grad, "dweights": leaves[1].grad, **gradients_of(module)}
        return {"output": output.detach(), **gradients}

    measured = measure_reference(lambda change: run(one_by_one, change))
    assert breaches(run(experts_forward, Change()), measured) == []


def one_by_one(
    experts: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """What experts give, by a loop over tokens."""
    output = torch.zeros_like(x)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    for token in range(ids.shape[0]):
        for slot in range(ids.shape[1]):
            expert = ids[token, slot]
            # The number of experts stands for one that is elsewhere.
            if expert == 3:
                continue
            up, down = getattr(experts, first)[expert], experts.down_proj[expert]
            up, down = (up.t(), down.t()) if experts.is_transposed else (up, down)
            h = up @ x[token]
            if experts.has_bias:
                h = h + getattr(experts, f"{first}_bias")[expert]
            if experts.has_gate:
                gate, above = h.chunk(2)
                h = experts.act_fn(gate) * above
            else:
                h = experts.act_fn(h)
            y = down @ h
            y = y + experts.down_proj_bias[expert] if experts.has_bias else y
            y = experts.post_expert_norm(y) if experts.has_post_expert_norm else y
            place = torch.tensor([token])
            output = output.index_add(0, place, (weights[token, slot] * y)[None])
    return output
