"""Logits that are asked for after a call with labels: those of the call, or an error."""

from typing import Any

import pytest
import torch
from small_models import CLASSES, LANGUAGE_MODELS, batch_of, small, unlabelled

from fastattn import models
from fastattn.models import Output
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
language_models = pytest.mark.parametrize("name", LANGUAGE_MODELS)
BODIES = [n for n in CLASSES if n.endswith("Model") and n not in LANGUAGE_MODELS]
STEPPED = "the head has changed since the model was called with labels"
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "one by one": lambda parameters: torch.optim.AdamW(parameters, foreach=False),
    "of one's own": lambda parameters: OfOnesOwn(parameters, {}),
}


class OfOnesOwn(torch.optim.Optimizer):
    """Writes behind PyTorch's back, as many optimizers of others do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(0.1 * parameter.grad)


def without_labels(model: Any) -> torch.Tensor:
    return model(**unlabelled(model, batch_of(model))).logits


@language_models
def test_they_are_those_of_a_call_without_labels(name: str) -> None:
    model = small(name)
    output = model(**batch_of(model))
    assert output.computed is None
    torch.testing.assert_close(output.logits, without_labels(model))
    output.logits.sum().backward()
    assert all(tensor.grad is not None for tensor in model.head_tensors() if tensor.requires_grad)


@language_models
@pytest.mark.parametrize("enabled", [False, True])
def test_they_have_the_autocast_of_the_call(name: str, enabled: bool) -> None:
    model = small(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        output, expected = model(**batch_of(model)), without_labels(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=not enabled):
        found = output.logits
    assert found.dtype is (torch.bfloat16 if enabled else torch.float32)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@language_models
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradients(name: str, mode: Any) -> None:
    model = small(name)
    with mode():
        output, expected = model(**batch_of(model)), without_labels(model)
    torch.testing.assert_close(output.logits.clone().detach(), expected.clone())


@language_models
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_a_step_there_are_none(name: str, optimizer: str) -> None:
    model = small(name)
    chosen = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    asked, not_asked = model(**batch_of(model)), model(**batch_of(model))
    kept = asked.logits.detach().clone()
    (asked.loss + not_asked.loss).backward()
    torch.testing.assert_close(model(**batch_of(model)).logits, kept)
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    chosen.step()
    assert torch.equal(asked.logits, kept)
    with pytest.raises(RuntimeError, match=STEPPED):
        _ = not_asked.logits
    again = model(**batch_of(model))
    torch.testing.assert_close(again.logits, without_labels(model))
    assert not torch.allclose(again.logits, kept)


@language_models
def test_a_step_that_leaves_the_head_alone_does_not_matter(name: str) -> None:
    model = small(name, tie_word_embeddings=False)
    head = {id(tensor) for tensor in model.head_tensors()}
    for tensor in model.head_tensors():
        tensor.requires_grad_(False)
    everything = torch.optim.SGD(model.parameters(), lr=0.1)
    others = torch.optim.SGD([p for p in model.parameters() if id(p) not in head], lr=0.1)
    output, expected = model(**batch_of(model)), without_labels(model)
    output.loss.backward()
    everything.step()
    others.step()
    torch.testing.assert_close(output.logits, expected)
    assert not torch.allclose(without_labels(model), expected)


@language_models
def test_a_head_that_is_written_to_or_replaced(name: str) -> None:
    model = small(name)
    output = model(**batch_of(model))
    with torch.no_grad():
        model.head_tensors()[0].mul_(2)
    with pytest.raises(RuntimeError, match=STEPPED):
        _ = output.logits
    output = model(**batch_of(model))
    owner, _, attribute = model.head_layer.rpartition(".")
    layer: Any = model.get_submodule(model.head_layer)
    other = torch.nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
    setattr(model.get_submodule(owner), attribute, other)
    with pytest.raises(RuntimeError, match=STEPPED):
        _ = output.logits


def test_the_bias_of_the_logits_counts() -> None:
    model: Any = small("BartForConditionalGeneration")
    output = model(**batch_of(model))
    model.final_logits_bias.add_(1.0)
    with pytest.raises(RuntimeError, match=STEPPED):
        _ = output.logits


@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_model(fused: bool) -> None:
    model: Any = small("LlamaForCausalLM")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            output = compiled(**batch_of(model))
            with torch.no_grad():
                torch.testing.assert_close(output.logits, without_labels(model))
            output = compiled(**batch_of(model))
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with pytest.raises(RuntimeError, match=STEPPED):
                _ = output.logits


@pytest.mark.parametrize("name", BODIES)
def test_a_body_has_none(name: str) -> None:
    model = small(name)
    with pytest.raises(AttributeError, match="has no head, and so no logits"):
        _ = model(**batch_of(model)).logits


def test_outputs_of_heads_of_ones_own() -> None:
    class Doubling:
        def head(self, features: torch.Tensor) -> torch.Tensor:
            return 2 * features

    features = torch.randn(1, 2, 3)
    assert torch.equal(Output(head=Doubling(), features=features).logits, 2 * features)
    assert torch.equal(models.Output(computed=features).logits, features)


@language_models
def test_outputs_are_read_as_those_of_transformers(name: str) -> None:
    model = small(name)
    output = model(**batch_of(model))
    rest = ["encoder_last_hidden_state"] if output.encoder_last_hidden_state is not None else []
    assert list(output) == output.keys() == ["loss", "logits", *rest]
    assert output["loss"] is output[0] is output.loss
    # Trainer reads the loss of every step, which is to leave the logits alone.
    assert output.computed is None
    assert output["logits"] is output[1] is output.to_tuple()[1] is output[1:][0]
    assert dict(output) == dict(output.items())
    assert "logits" in output
    assert "pooler_output" not in output
    with pytest.raises(KeyError, match="'attentions' is none of loss, logits"):
        output["attentions"]
    with pytest.raises(IndexError):
        output[len(output.keys())]
    plain = model(**unlabelled(model, batch_of(model)))
    assert plain.keys() == ["logits", *rest]


@pytest.mark.parametrize("name", BODIES)
def test_outputs_without_a_head_have_hidden_states(name: str) -> None:
    model = small(name)
    output = model(**unlabelled(model, batch_of(model)))
    assert output.keys()[0] == "last_hidden_state"
    assert output[0] is output.last_hidden_state
    assert ("pooler_output" in output) == (output.pooler_output is not None)
