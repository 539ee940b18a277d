"""PatchEmbedding beside the convolution that it is."""

from typing import Any

import pytest
import torch
from block_support import (
    assert_autocasts,
    assert_checkpoints,
    assert_compiles,
    assert_same_outcome,
    assert_survives_copies,
    assert_works_in_16_bits,
    numbers,
    place,
)

import fastattn
import fastattn.nn as nn
from support import assert_close

kernels = pytest.mark.kernels


def call(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module(x)


def small() -> nn.PatchEmbedding:
    return nn.PatchEmbedding((2, 3), 3, 10)


def check(backend: Any, size: Any, channels: int, bias: bool, image: tuple[int, int]) -> None:
    module = place(nn.PatchEmbedding(size, channels, 10, bias=bias))
    images = numbers(2, channels, *image)
    assert_same_outcome(
        lambda: module(images),
        lambda: module.projection(images).flatten(2).transpose(1, 2),
        {"images": images, **dict(module.named_parameters())},
        backend,
    )


SHAPES = [
    pytest.param(4, 3, True, (8, 12), id="square"),
    pytest.param((2, 3), 1, False, (4, 9), id="another height, one channel, no bias"),
    pytest.param(5, 2, True, (5, 5), id="one patch"),
]


@kernels
@pytest.mark.parametrize(("size", "channels", "bias", "image"), SHAPES)
def test_kernels_agree_with_a_convolution(size, channels, bias, image):
    check("triton", size, channels, bias, image)


@pytest.mark.parametrize(("size", "channels", "bias", "image"), SHAPES)
def test_reference_agrees_with_a_convolution(size, channels, bias, image):
    check("reference", size, channels, bias, image)


def test_any_layout_of_images():
    module = place(small())
    images = numbers(2, 3, 4, 9)
    for other in (
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        images.flip(0).flip(0),
    ):
        assert_close(module(other), module(images))


def test_checkpoints_of_vit_load_by_name():
    pytest.importorskip("transformers")
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTPatchEmbeddings

    theirs = ViTPatchEmbeddings(ViTConfig(image_size=12, patch_size=4, hidden_size=10))
    ours = nn.PatchEmbedding(4, 3, 10)
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    images = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(ours(images), theirs(images))


def test_it_starts_as_a_convolution():
    torch.manual_seed(5)
    expected = torch.nn.Conv2d(3, 10, (2, 3), stride=(2, 3))
    torch.manual_seed(5)
    module = small()
    assert torch.equal(module.projection.weight, expected.weight)
    assert torch.equal(module.projection.bias, expected.bias)


def test_what_stands_in_the_place_of_the_projection_is_called():
    module: Any = small()
    images = torch.randn(2, 3, 4, 9)
    expected = module(images)
    called = []
    handle = module.projection.register_forward_hook(lambda *_: called.append(True))
    torch.testing.assert_close(module(images), expected)
    assert called == [True]
    handle.remove()
    module.projection = torch.nn.Sequential(module.projection)
    torch.testing.assert_close(module(images), expected)


def test_copies_and_round_trips():
    assert_survives_copies(small, call, numbers(2, 3, 4, 9))


@kernels
@pytest.mark.slow
def test_compiles_without_graph_breaks():
    assert_compiles(place(small()), call, numbers(2, 3, 4, 9))


def test_compiles_without_graph_breaks_on_the_reference():
    with fastattn.backend("reference"):
        assert_compiles(place(small()), call, numbers(2, 3, 4, 9))


def test_checkpointing():
    assert_checkpoints(place(small()), call, numbers(2, 3, 4, 9))


def test_16_bits():
    assert_works_in_16_bits(place(small()), call, numbers(2, 3, 4, 9))


def test_autocast():
    assert_autocasts(place(small()), call, numbers(2, 3, 4, 9))


def test_no_images_give_no_tokens():
    assert small()(torch.randn(0, 3, 4, 9)).shape == (0, 6, 10)
    assert small()(torch.randn(2, 3, 0, 9)).shape == (2, 0, 10)


def test_bad_images_are_named():
    module = small()
    with pytest.raises(ValueError, match="whole multiples of patches of 2 x 3, got 4 x 10"):
        module(torch.randn(2, 3, 4, 10))
    with pytest.raises(ValueError, match="whole multiples of patches of 2 x 3, got 5 x 9"):
        module(torch.randn(2, 3, 5, 9))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, height, width\).*\(2, 1"):
        module(torch.randn(2, 1, 4, 9))
    with pytest.raises(ValueError, match=r"got the shape \(3, 4, 9\)"):
        module(torch.randn(3, 4, 9))
    for size in (0, (4, -1), (1, 2, 3)):
        with pytest.raises(ValueError, match="patch_size must be a positive number or a pair"):
            nn.PatchEmbedding(size)
