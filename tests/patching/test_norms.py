"""Norms of other libraries are known by what they compute, and by nothing else."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.ops.core.backends import INTERPRETED
from fastattn.patching.norms import PatchedNorm

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the trials run on the reference backend")

COLUMNS = 24


class LlamaNorm(nn.Module):
    """The text of most classes."""

    def __init__(self, columns: int = COLUMNS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(columns))
        self.variance_epsilon = 1e-6

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        """x over its root mean square, in float32."""
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self.scale(x).to(x.dtype)


class GemmaNorm(LlamaNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.scale(x) * (1.0 + self.weight.float())).type_as(x)


class GptOssNorm(LlamaNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * self.scale(x)).to(x.dtype)


class T5Norm(LlamaNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scale(x)
        return self.weight * (x.to(self.weight.dtype) if self.weight.dtype.itemsize == 2 else x)


class PlainNorm(LlamaNorm):
    """Without a weight."""

    def __init__(self) -> None:
        super().__init__()
        del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale(x).type_as(x)


class TimmNorm(nn.LayerNorm):
    """A subclass that computes what LayerNorm does, as timm's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class CenteredNorm(LlamaNorm):
    """Cohere's: a LayerNorm without a bias, in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (self.weight.float() * self.scale(wide - wide.mean(-1, keepdim=True))).to(x.dtype)


class DetachedNorm(LlamaNorm):
    """The same numbers with another gradient."""

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        mean = x.detach().pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + self.variance_epsilon)


class ChannelNorm(nn.LayerNorm):
    """timm's LayerNorm2d: over the channels of images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FourthNorm(TimmNorm):
    """Another norm for four dimensions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.dim() < 4 else x


class AddedNorm(LlamaNorm):
    """eps in another place."""

    def scale(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class OtherArgumentNorm(LlamaNorm):
    def forward(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return factor * super().forward(x)


class FlagNorm(LlamaNorm):
    """What it computes hangs on an attribute."""

    def __init__(self, doubled: bool) -> None:
        super().__init__()
        self.doubled = doubled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if self.doubled else 1)


FORMS = {
    LlamaNorm: ("llama", 0.0, True, True),
    GemmaNorm: ("float32", 1.0, True, True),
    GptOssNorm: ("float32", 0.0, True, True),
    T5Norm: ("t5", 0.0, True, False),
    PlainNorm: ("float32", 0.0, True, True),
}


@pytest.mark.parametrize("kind", FORMS)
def test_forms(kind: Any):
    norm = kind()
    assert [entry.theirs for entry in fastattn.patch(norm).replaced] == [kind]
    assert isinstance(norm, PatchedNorm)
    form = norm._fastattn_norm
    found = (form.casting, form.weight_offset, form.narrow_x, form.wide_x)
    assert found == FORMS[kind]
    assert (form.centered, form.eps) == (False, "variance_epsilon")


@pytest.mark.parametrize("kind", [LlamaNorm, GemmaNorm, GptOssNorm, T5Norm, CenteredNorm])
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("x", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_numbers_stay(kind: Any, weight: torch.dtype, x: torch.dtype):
    norm = kind().to(weight)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    rows = torch.randn(5, COLUMNS).to(x)
    expected = norm(rows)
    fastattn.patch(norm)
    assert norm(rows).dtype is expected.dtype
    torch.testing.assert_close(norm(rows), expected)


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"bias": False}])
def test_subclasses_of_layer_norm(options: dict[str, bool]):
    norm = TimmNorm(COLUMNS, **options)
    x = torch.randn(5, COLUMNS)
    expected = norm(x)
    fastattn.patch(norm)
    assert isinstance(norm, PatchedNorm)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize(
    "norm",
    [
        DetachedNorm(),
        ChannelNorm(COLUMNS),
        FourthNorm(COLUMNS),
        AddedNorm(),
        OtherArgumentNorm(),
        FlagNorm(True),
        LlamaNorm(1),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_others_are_left_alone(norm: nn.Module):
    kind = type(norm)
    (left,) = fastattn.patch(norm).left_alone
    assert left.reason == "a norm that computes otherwise than ours"
    assert type(norm) is kind


def test_attributes_are_part_of_what_is_tried():
    model = nn.Sequential(FlagNorm(True), FlagNorm(False), FlagNorm(True))
    report = fastattn.patch(model)
    assert [entry.places for entry in report.replaced] == [("1",)]


def test_norms_over_several_dimensions_are_left_alone():
    (left,) = fastattn.patch(TimmNorm((3, COLUMNS))).left_alone
    assert left.reason == "a norm over more than the last dimension"


def test_a_trial_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    fastattn.patch(GptOssNorm(7))
    assert torch.equal(torch.rand(3), expected)


def test_norms_can_be_declined():
    model = nn.Sequential(LlamaNorm(), nn.LayerNorm(4))
    report = fastattn.patch(model, norms=False)
    assert report.replaced == ()
    assert report.left_alone[1].reason == "not asked for: patch(model, norms=False)"
