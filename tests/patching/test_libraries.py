"""Models of other libraries are patched by what integrations know of them."""

import sys
import types

import pytest
import torch
from torch import nn

import fastattn
from fastattn.patching import Changed, LeftAlone, Rule, libraries, make_twin


class TheirBlock(nn.Linear):
    """A class of a library of that name."""


TheirBlock.__module__ = "some_library.models"


class Body(nn.Module):
    """What computes in the place of it."""

    mark: str

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return -super().forward(input)


class Integration(types.ModuleType):
    """A module of ours for that library."""

    restored = 0

    @staticmethod
    def make_finders(model, wanted):
        def find(module, kind):
            if kind is TheirBlock and wanted.mlp:
                return Rule(kind, make_twin(kind, Body), lambda _: {"mark": "ours"})
            return "too odd" if isinstance(module, nn.ReLU) else None

        return [find]

    @staticmethod
    def change_settings(model, wanted):
        return [Changed("", "speed", "low", "high"), LeftAlone(("",), type(model), "its colour")]

    def restore_settings(self, model):
        self.restored += 1


@pytest.fixture
def integration(monkeypatch: pytest.MonkeyPatch) -> Integration:
    """The module, found by its name."""
    module = Integration("fastattn.some_library")
    monkeypatch.setitem(sys.modules, "fastattn.some_library", module)
    monkeypatch.setattr(libraries, "MODULES", {"some_library": "some_library"})
    return module


def test_a_library_has_rules_of_its_own(integration: Integration):
    model = nn.Sequential(TheirBlock(4, 4), nn.ReLU(), nn.LayerNorm(4))
    x = torch.randn(2, 4)
    expected = model[0](x)
    report = fastattn.patch(model)
    assert [entry.theirs for entry in report.replaced] == [TheirBlock, nn.LayerNorm]
    assert [(left.kind, left.reason) for left in report.left_alone] == [
        (nn.ReLU, "too odd"),
        (nn.Sequential, "its colour"),
    ]
    assert torch.equal(model[0](x), -expected)
    assert (type(model[0]).__name__, type(model[0]).__module__) == (
        "TheirBlock",
        "some_library.models",
    )
    assert "speed low  high       1  (the model)" in str(report)
    assert f"{Body.__module__}.Body" in str(report)
    fastattn.unpatch(model)
    assert integration.restored == 1
    assert type(model[0]) is TheirBlock
    assert torch.equal(model[0](x), expected)


def test_what_is_not_wanted_is_told(integration: Integration):
    model = nn.Sequential(TheirBlock(4, 4))
    assert fastattn.patch(model, mlp=False).replaced == ()


def test_other_models_have_nothing_to_do_with_it(integration: Integration):
    report = fastattn.patch(nn.Sequential(nn.LayerNorm(4)))
    assert report.changed == ()


def test_a_rule_of_the_users_comes_first(integration: Integration):
    class Own(TheirBlock):
        pass

    model = nn.Sequential(TheirBlock(4, 4))
    fastattn.patch(model, rules=[Rule(TheirBlock, Own)])
    assert type(model[0]) is Own


def test_a_version_that_is_not_known_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(libraries, "MODULES", {"some_library": "integrations.some_library"})
    model = nn.Sequential(TheirBlock(4, 4), nn.LayerNorm(4))
    with pytest.warns(UserWarning, match="this version of some_library is not known"):
        report = fastattn.patch(model)
    assert [entry.theirs for entry in report.replaced] == [nn.LayerNorm]


def test_a_class_with_a_metaclass_has_no_twin():
    class Meta(type):
        pass

    class Odd(nn.Module, metaclass=Meta):
        pass

    with pytest.raises(TypeError, match="Odd has a metaclass of its own"):
        make_twin(Odd, Body)
