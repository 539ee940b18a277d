"""What patching a model changes, what it does not, and that it can be undone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastattn
from fastattn.patching import LeftAlone, Rule
from support import same_bits


class OwnNorm(nn.LayerNorm):
    """A subclass that no rule names."""


class OddNorm(nn.LayerNorm):
    """A subclass that computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(input)


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2.0 * weight


def small_model() -> Any:
    """Something of each kind, with a norm that is used in two places."""
    torch.manual_seed(3)
    shared = nn.LayerNorm(6)
    model = nn.Sequential(
        nn.Embedding(9, 6), shared, nn.Linear(6, 6), shared, nn.RMSNorm(6), nn.Dropout(0.5)
    )
    return model.append(nn.Linear(6, 9, bias=False)).append(nn.LogSoftmax(-1))


def state_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """All that a module consists of, by identity where that is what counts."""
    return [
        (name, module, type(module), *((key, id(value)) for key, value in vars(module).items()))
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def reasons(report: fastattn.patching.Report) -> dict[str, str]:
    return {place: left.reason for left in report.left_alone for place in left.places}


def test_modules_become_ours_and_stay_the_same_objects():
    model = small_model()
    before = list(model.modules())
    report = fastattn.patch(model, linear=True)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    replaced = {place: entry for entry in report.replaced for place in entry.places}
    assert list(replaced) == ["1", "3", "2", "4", "5", "6", "7"]
    for place, entry in replaced.items():
        name = type(model[int(place)]).__name__
        assert type(model[int(place)]) is entry.ours is getattr(fastattn.nn, name)
        assert entry.theirs is getattr(nn, name)
    assert replaced["1"] is replaced["3"]
    assert reasons(report) == {"0": "a lookup, which PyTorch does as fast as memory"}


def test_unpatching_undoes_it_exactly():
    model = small_model()
    model[2].mark = "the user's own"
    before = state_of(model)
    fastattn.patch(model, linear=True)
    assert state_of(model) != before
    fastattn.unpatch(model)
    assert state_of(model) == before
    fastattn.unpatch(model)
    assert state_of(model) == before


def test_parameters_and_state_dict_are_the_same_objects():
    model = small_model().eval()
    model[2].weight.requires_grad_(False)
    model[1].bfloat16()
    model[6].weight = nn.Parameter(model[0].weight)
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    fastattn.patch(model, linear=True)
    after = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    assert after == before
    assert not any(module.training for module in model.modules())
    assert not model[2].weight.requires_grad
    assert model[1].weight.dtype is torch.bfloat16


def test_an_optimizer_goes_on_with_a_patched_model():
    losses = []
    for patched in (False, True):
        model = small_model().eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        losses.append([])
        for step in range(6):
            if patched and step == 2:
                fastattn.patch(model, linear=True)
            loss = nn.functional.nll_loss(model(torch.arange(9)), torch.arange(9))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0] / 2


def test_buffers_survive():
    loss = nn.CrossEntropyLoss(weight=torch.rand(5), ignore_index=2, label_smoothing=0.1)
    loss.register_buffer("seen", torch.zeros(1), persistent=False)
    weight, seen = loss.weight, loss.seen
    fastattn.patch(loss)
    assert type(loss) is fastattn.nn.CrossEntropyLoss
    assert loss.weight is weight
    assert loss.seen is seen
    assert list(loss.state_dict()) == ["weight"]
    assert (loss.ignore_index, loss.label_smoothing) == (2, 0.1)


def test_forward_hooks_are_a_reason_to_leave_a_module_alone():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: -output)
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[2].forward = lambda input: 3 * input
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model[3])
    x = torch.randn(2, 4)
    expected = model(x)
    report = fastattn.patch(model, linear=True)
    assert report.replaced == ()
    hooked = "it has forward hooks"
    assert reasons(report) == {
        "0": hooked,
        "1": hooked,
        "2": "its forward was replaced",
        "3": hooked,
    }
    assert same_bits(model(x), expected)


def test_other_hooks_go_on_working():
    norm = nn.LayerNorm(4)
    calls = []
    norm.register_full_backward_hook(lambda *_: calls.append("backward"))
    norm.register_full_backward_pre_hook(lambda *_: calls.append("before backward"))
    norm.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    norm.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    norm.weight.register_hook(lambda gradient: calls.append("gradient"))
    assert len(fastattn.patch(norm).replaced) == 1
    norm(torch.randn(2, 4, requires_grad=True)).sum().backward()
    norm.load_state_dict(norm.state_dict())
    assert sorted(calls) == ["backward", "before backward", "gradient", "loaded", "saved"]


def test_what_is_unknown_is_left_alone():
    class Quantized(torch.Tensor):
        pass

    model = nn.Sequential(
        OddNorm(4),
        nn.Linear(4, 4, dtype=torch.complex64),
        nn.Linear(4, 4),
        nn.Linear(4, 4),
        nn.LazyLinear(4),
        nn.ReLU(),
    )
    model[2].weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Quantized))
    model[3].activation = "the user's own"
    before = state_of(model)
    report = fastattn.patch(model, linear=True)
    assert reasons(report) == {
        "0": "a norm that computes otherwise than ours",
        "1": "its parameters are torch.complex64",
        "2": "its parameters are Quantized",
        "3": "it has an attribute 'activation', which means something in ours",
        "4": "a subclass of Linear without a rule",
        "5": "no rule",
    }
    assert state_of(model) == before


def test_linear_is_replaced_on_request():
    model = nn.Sequential(nn.Linear(4, 4))
    assert reasons(fastattn.patch(model)) == {"0": "on request: patch(model, linear=True)"}
    assert type(model[0]) is nn.Linear


def test_patching_twice_is_harmless():
    model = small_model()
    fastattn.patch(model[1])
    assert type(model[1]) is fastattn.nn.LayerNorm
    assert type(model[4]) is nn.RMSNorm
    fastattn.patch(model)
    once = state_of(model)
    report = fastattn.patch(model)
    assert report.replaced == ()
    assert reasons(report)["3"] == "already ours"
    assert state_of(model) == once
    fastattn.unpatch(model[1])
    assert type(model[1]) is nn.LayerNorm
    assert type(model[4]) is fastattn.nn.RMSNorm


def test_modules_that_were_ours_from_the_start_stay():
    model = nn.Sequential(fastattn.nn.LayerNorm(4), fastattn.nn.Linear(4, 4, activation="relu"))
    report = fastattn.patch(model, linear=True)
    assert reasons(report) == {"0": "already ours", "1": "already ours"}
    fastattn.unpatch(model)
    assert type(model[0]) is fastattn.nn.LayerNorm
    assert model[1].activation == "relu"


def test_parametrizations_survive():
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parametrizations.weight_norm(model[0])
    parametrize.register_parametrization(model[1], "weight", Scaled())
    parametrize.register_parametrization(model[1], "bias", Scaled())
    x = torch.randn(3, 4)
    expected = model(x)
    keys = list(model.state_dict())
    report = fastattn.patch(model, linear=True)
    assert [entry.theirs for entry in report.replaced] == [nn.Linear, nn.Linear]
    for patched in (model, copy.deepcopy(model)):
        assert all(isinstance(module, fastattn.nn.Linear) for module in patched)
        assert all(parametrize.is_parametrized(module, "weight") for module in patched)
        assert list(patched.state_dict()) == keys
        torch.testing.assert_close(patched(x), expected)
        patched(x).sum().backward()
        assert patched[1].parametrizations.weight.original.grad is not None
    # One that comes later, and one that goes, find what they expect.
    parametrize.register_parametrization(model[0], "bias", Scaled())
    parametrize.remove_parametrizations(model[1], "weight")
    parametrize.remove_parametrizations(model[1], "bias")
    expected = model(x)
    fastattn.unpatch(model)
    assert type(model[0]).__bases__ == (nn.Linear,)
    assert type(model[0]).__name__ == "ParametrizedLinear"
    assert type(model[1]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_meta_modules():
    with torch.device("meta"):
        model = small_model()
    assert len(fastattn.patch(model, linear=True).replaced) == 6
    assert model[1].weight.is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(small_model().state_dict())
    expected = small_model().eval()(torch.arange(9))
    torch.testing.assert_close(model.eval()(torch.arange(9)), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_patched_and_can_be_unpatched(how):
    model = small_model().eval()
    x = torch.arange(9)
    expected = model(x)
    fastattn.patch(model, linear=True)
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert [type(module) for module in copied] == [type(module) for module in model]
    torch.testing.assert_close(copied(x), expected)
    fastattn.unpatch(copied)
    assert [type(module) for module in copied] == [type(module) for module in small_model()]
    assert same_bits(copied(x), expected)
    assert type(model[1]) is fastattn.nn.LayerNorm


def test_unpatching_stops_at_a_class_that_it_does_not_know():
    model: Any = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    fastattn.patch(model)
    model[1].__class__ = type("WrappedLayerNorm", (fastattn.nn.LayerNorm,), {})
    before = state_of(model)
    with pytest.raises(RuntimeError, match="1 was made a LayerNorm and has become a WrappedLayerN"):
        fastattn.unpatch(model)
    assert state_of(model) == before


class FastOwnNorm(OwnNorm):
    """What a user puts in the place of OwnNorm."""

    doubled: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return fastattn.layer_norm(input, self.weight, self.bias, self.doubled / 2)


def twice_eps(norm: Any) -> dict[str, float]:
    return {"doubled": 2 * norm.eps}


def no_large_norms(norm: Any) -> str | None:
    return "too large" if norm.normalized_shape[0] > 8 else None


def test_a_rule_of_ones_own():
    model = nn.Sequential(OwnNorm(8, 1e-2), OwnNorm(9), nn.LayerNorm(8))
    x = torch.randn(3, 8)
    expected = model[0](x)
    rule = Rule(OwnNorm, FastOwnNorm, twice_eps, no_large_norms)
    report = fastattn.patch(model, rules=[rule])
    assert [entry.ours for entry in report.replaced] == [FastOwnNorm, fastattn.nn.LayerNorm]
    assert report.left_alone == (LeftAlone(("1",), OwnNorm, "too large"),)
    torch.testing.assert_close(model[0](x), expected)
    fastattn.unpatch(model)
    assert type(model[0]) is OwnNorm
    assert not hasattr(model[0], "doubled")


def test_a_rule_of_ones_own_comes_before_the_built_in_one():
    model = nn.Sequential(nn.LayerNorm(4))
    fastattn.patch(model, rules=[Rule(nn.LayerNorm, OwnNorm)])
    assert type(model[0]) is OwnNorm


@pytest.mark.parametrize("ours", [nn.LayerNorm, nn.RMSNorm])
def test_a_rule_wants_a_subclass(ours):
    with pytest.raises(TypeError, match="ours must be a subclass of theirs"):
        Rule(nn.LayerNorm, ours)


@pytest.mark.parametrize("model", [nn.LayerNorm, [nn.LayerNorm(3)], None])
def test_only_modules_can_be_patched(model):
    for change in (fastattn.patch, fastattn.unpatch):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
            change(model)


def test_the_printed_report():
    blocks: Any = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.ReLU()) for _ in range(12))
    model = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(4, 4), "norm": blocks[0][0]})
    assert str(fastattn.patch(model)).splitlines() == [
        "12 modules replaced, 13 left alone",
        "",
        "replaced   by                          modules  where",
        "LayerNorm  fastattn.nn.norm.LayerNorm       12  blocks.*.*, norm",
        "",
        "left alone  because                                modules  where",
        "ReLU        no rule                                     12  blocks.*.*",
        "Linear      on request: patch(model, linear=True)        1  head",
    ]
    assert str(fastattn.patch(nn.Sequential())) == "0 modules replaced, 0 left alone"
