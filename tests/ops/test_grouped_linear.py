"""grouped_linear: spreads of rows, what experts without rows get, and bad inputs."""

import pytest
import torch

import fastattn
from support import DEVICE, WIDEST, assert_close, same_bits


def offsets(*places: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(places, dtype=dtype, device=DEVICE or "cpu")


@pytest.mark.kernels
def test_gradients_of_an_expert_without_rows_are_zeros():
    x = torch.randn(5, 20, device=DEVICE, requires_grad=True)
    weight = torch.randn(4, 7, 20, device=DEVICE, requires_grad=True)
    bias = torch.randn(4, 7, device=DEVICE, requires_grad=True)
    y = fastattn.grouped_linear(x, weight, offsets(0, 2, 2, 4, 4), bias)
    dx, dweight, dbias = torch.autograd.grad(y.sum(), (x, weight, bias))
    # The last row has no expert.
    assert not y[4].any()
    assert not dx[4].any()
    for gradient in (dweight, dbias):
        assert not gradient[1].any()
        assert not gradient[3].any()
        assert gradient[0].any()
        assert gradient[2].any()


@pytest.mark.kernels
def test_a_row_has_the_same_bits_among_any_others(products_by_element):
    x, weight = torch.randn(40, 70, device=DEVICE), torch.randn(3, 9, 70, device=DEVICE)
    with fastattn.batch_invariant():
        alone = fastattn.grouped_linear(x[:1], weight, offsets(0, 0, 1, 1))
        first = fastattn.grouped_linear(x, weight, offsets(0, 0, 20, 40))
        rolled = fastattn.grouped_linear(x.roll(17, 0), weight, offsets(0, 3, 40, 40))
    assert same_bits(first[:1], alone)
    assert same_bits(rolled[17:18], alone)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_of_either_width(dtype):
    x = torch.randn(6, 4, device=DEVICE, dtype=WIDEST)
    weight = torch.randn(2, 3, 4, device=DEVICE, dtype=WIDEST)
    y = fastattn.grouped_linear(x, weight, offsets(0, 2, 6, dtype=dtype))
    assert_close(y, torch.cat([x[:2] @ weight[0].t(), x[2:] @ weight[1].t()]))


@pytest.mark.kernels
def test_offsets_that_do_not_rise_reach_nothing_outside():
    """Where they cannot be looked at, as on a GPU, no access leaves a tensor."""
    from fastattn.ops.core.grouped_launchers import (
        grouped_bias_gradient,
        grouped_linear_forward,
        grouped_weight_gradient,
    )

    x, weight = torch.randn(6, 4, device=DEVICE), torch.randn(3, 5, 4, device=DEVICE)
    for places in ((0, 9, 2, 7), (5, -3, 2**31 - 1, -(2**31)), (0, 6, 0, 6)):
        wrong = offsets(*places)
        y = grouped_linear_forward(x, weight, wrong, None, None, 1, 0, False)
        assert y.shape == (6, 5)
        assert grouped_weight_gradient(y, x, wrong, None, None, 0).shape == (3, 5, 4)
        assert grouped_bias_gradient(y, wrong, None, None, None).shape == (3, 5)


def test_bad_inputs_are_named():
    x, weight, places = torch.ones(4, 3), torch.ones(2, 5, 3), torch.tensor([0, 1, 4])

    def call(**changed):
        return fastattn.grouped_linear(**{"x": x, "weight": weight, "offsets": places, **changed})

    with pytest.raises(ValueError, match="grouped_linear: x must have the shape"):
        call(x=x[0])
    with pytest.raises(ValueError, match=r"grouped_linear: weight must have the shape \(E, N, 3\)"):
        call(weight=weight.mT)
    with pytest.raises(ValueError, match="at least one expert"):
        call(weight=weight[:0], offsets=places[:1])
    with pytest.raises(TypeError, match="grouped_linear: weight must have x's dtype"):
        call(weight=weight.half())
    with pytest.raises(ValueError, match=r"grouped_linear: bias must have shape \(2, 5\)"):
        call(bias=torch.ones(5))
    with pytest.raises(TypeError, match="grouped_linear: offsets must be int32 or int64"):
        call(offsets=places.float())
    with pytest.raises(ValueError, match=r"grouped_linear: offsets must have shape \(3,\)"):
        call(offsets=places[:2])
    for wrong in ([0, 3, 2], [1, 2, 4], [0, 1, 5]):
        with pytest.raises(ValueError, match="grouped_linear: offsets must rise from 0"):
            call(offsets=torch.tensor(wrong))
