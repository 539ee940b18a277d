"""The loss of a patched language model: without logits, and whatever is asked of these."""

from typing import Any

import pytest
import torch

import fastattn
from against_unpatched import LOSS_NEIGHBOURS, breaches, gradients_of, measure
from families import FAMILIES, make_model, tokens
from fastattn.checking import Results
from fastattn.integrations.transformers.logits import DeferredLogits
from fastattn.integrations.transformers.loss import find_scale_and_softcap
from fastattn.ops.core.backends import INTERPRETED
from support import same_bits

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")

LLAMA = FAMILIES["llama"]
IGNORED = torch.where(torch.arange(14) < 3, -100, tokens())


def both(name: str = "llama") -> tuple[Any, Any]:
    """A model as it is, and patched in nothing but its loss."""
    plain, patched = make_model(FAMILIES[name]), make_model(FAMILIES[name])
    fastattn.patch(patched, norms=False, mlp=False, rotary=False, attention=False)
    return plain, patched


@pytest.mark.parametrize(
    "given",
    [
        {"labels": tokens()},
        {"labels": IGNORED},
        {"labels": IGNORED, "num_items_in_batch": torch.tensor(37)},
        {"labels": IGNORED, "num_items_in_batch": 37},
        {"labels": tokens(), "ignore_index": 7},
        {"labels": tokens(), "shift_labels": IGNORED.roll(-1, 1)},
        {"labels": tokens(), "not_known": True},
    ],
    ids=["plain", "ignored", "counted", "counted by int", "index", "shifted", "other words"],
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2", "granite"])
def test_loss_without_logits(name: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    plain, patched = both(name)
    output = patched(tokens(), use_cache=False, **given)
    assert isinstance(output.logits, DeferredLogits)
    assert output.logits.computed is None

    def run(model: Any) -> Results:
        model.zero_grad()
        output = model(tokens(), use_cache=False, **given)
        output.loss.backward()
        logits = output.logits
        logits = logits.compute() if isinstance(logits, DeferredLogits) else logits
        return {"loss": output.loss.detach(), "logits": logits.detach(), **gradients_of(model)}

    assert breaches(run(patched), measure(plain, run, neighbours=4)) == []


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([], (1.0, None)),
        ([("float", 0.0), ("divide", 4.0)], (0.25, None)),
        ([("divide", 30.0), ("tanh", 0.0), ("multiply", 30.0)], (1.0, 30.0)),
        ([("multiply", 0.5), ("divide", 8.0), ("tanh", 0.0), ("multiply", 8.0)], (0.5, 8.0)),
        ([("divide", 30.0), ("tanh", 0.0), ("multiply", 20.0)], None),
        ([("divide", 8.0), ("tanh", 0.0), ("multiply", 8.0), ("multiply", 2.0)], None),
        ([("multiply", -1.0)], None),
        ([("multiply", 0.0)], None),
    ],
)
def test_steps_that_the_loss_knows(steps: list[Any], found: Any):
    logits = DeferredLogits(torch.ones(1, 2, 3), torch.ones(4, 3), None, tuple(steps))
    assert find_scale_and_softcap(logits) == found


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_loss_is_float32(autocast: bool):
    plain, patched = both()
    if not autocast:
        plain.bfloat16()
        patched.bfloat16()

    def run(model: Any) -> Results:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(tokens(), labels=IGNORED)
        logits = output.logits
        logits = logits.compute() if isinstance(logits, DeferredLogits) else logits
        return {"loss": output.loss.detach(), "logits": logits.detach()}

    found = run(patched)
    assert (found["loss"].dtype, found["logits"].dtype) == (torch.float32, torch.bfloat16)
    assert breaches(found, measure(plain, run, LOSS_NEIGHBOURS)) == []


def test_float64_is_theirs():
    plain, patched = both()
    plain.double()
    patched.double()
    output, expected = patched(tokens(), labels=IGNORED), plain(tokens(), labels=IGNORED)
    assert type(output.logits) is torch.Tensor
    assert same_bits(output.loss, expected.loss)


def test_logits_are_there_where_there_are_no_gradients():
    _, patched = both()
    assert type(patched(tokens()).logits) is torch.Tensor
    with torch.no_grad():
        assert type(patched(tokens(), labels=tokens()).logits) is torch.Tensor


def test_logits_by_position():
    _, patched = both()
    assert isinstance(patched(tokens(), None, None, None, None, tokens()).logits, DeferredLogits)


def test_whatever_is_asked_of_logits_computes_them():
    plain, patched = both("gemma2")
    logits = plain(tokens()).logits
    asked = {
        "index": lambda x: x[:, -1],
        "argmax": lambda x: x.argmax(-1),
        "softmax": lambda x: torch.softmax(x, -1),
        "keyword": lambda x: torch.nn.functional.softmax(input=x, dim=-1),
        "sum": lambda x: x + 1.0 - x,
        "list": lambda x: torch.cat([x, x]),
        "division": lambda x: x / torch.tensor(2.0),
        "view": lambda x: x.view(-1, x.size(-1)),
        "comparison": lambda x: x > 0.0,
        "detach": lambda x: x.detach(),
        "scaled": lambda x: (2 * x / 3).compute() if isinstance(x, DeferredLogits) else 2 * x / 3,
    }
    for question, ask in asked.items():
        deferred = patched(tokens(), labels=tokens()).logits
        assert (deferred.shape, deferred.dtype) == (logits.shape, logits.dtype)
        torch.testing.assert_close(ask(deferred), ask(logits), msg=question)


def test_logits_of_changed_weights_are_refused():
    _, patched = both()
    output = patched(tokens(), labels=tokens())
    output.loss.backward()
    torch.optim.SGD(patched.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match="weights of the head have changed since"):
        output.logits.argmax(-1)


def test_a_loss_function_of_the_users_own_stays():
    model = make_model(LLAMA)
    model.loss_function = lambda logits, labels, **_: logits.sum()
    report = fastattn.patch(model)
    assert any("its loss function is <lambda>" in left.reason for left in report.left_alone)
    assert type(model.lm_head) is torch.nn.Linear
    fastattn.unpatch(model)
    assert model.loss_function.__name__ == "<lambda>"


def test_a_loss_function_set_later_is_called():
    _, patched = both()
    patched.loss_function = lambda logits, labels, **_: logits.sum()
    output = patched(tokens(), labels=tokens())
    torch.testing.assert_close(output.loss, output.logits.compute().sum())


def test_hooks_of_the_head_are_called():
    _, patched = both()
    seen = []
    patched.lm_head.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    patched(tokens(), labels=tokens())
    assert seen == [torch.Tensor]


def test_another_head_is_called():
    plain, patched = both()
    for model in (plain, patched):
        model.set_output_embeddings(torch.nn.Linear(32, 64, dtype=torch.float32))
        torch.nn.init.zeros_(model.lm_head.weight)
    output = patched(tokens(), labels=tokens())
    assert type(output.logits) is torch.Tensor


def test_an_error_leaves_the_head_as_it_was():
    _, patched = both()
    with pytest.raises(IndexError):
        patched(tokens() + 1000, labels=tokens())
    assert type(patched.lm_head(torch.zeros(1, 32))) is torch.Tensor
