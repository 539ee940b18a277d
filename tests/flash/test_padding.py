"""Padding is taken out and put back as flash_attn.bert_padding does it."""

import pytest
import torch

from fastattn.integrations.flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
)

MASK = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(3, 3), (3, 3, 4), (3, 3, 2, 5)])
def test_tokens_go_out_and_come_back(shape: tuple[int, ...], dtype: torch.dtype):
    x = torch.randn(shape, requires_grad=True)
    tokens, indices, ends, longest, used = unpad_input(x, MASK.to(dtype))
    assert torch.equal(tokens, x[MASK.bool()])
    assert indices.tolist() == [0, 1, 7, 8]
    assert ends.tolist() == [0, 2, 2, 4]
    assert ends.dtype is torch.int32
    assert (longest, used.tolist()) == (2, [2, 0, 2])
    back = pad_input(tokens, indices, 3, 3)
    kept = MASK.bool().view(3, 3, *[1] * (x.dim() - 2))
    assert torch.equal(back, x * kept)
    (back * x.detach()).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (x * kept).detach())


def test_unused_tokens_are_kept_and_not_counted():
    unused = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]])
    _, indices, ends, longest, used = unpad_input(torch.randn(3, 3, 2), MASK, unused)
    assert indices.tolist() == [0, 1, 2, 6, 7, 8]
    assert (ends.tolist(), longest, used.tolist()) == ([0, 3, 3, 6], 3, [2, 0, 2])


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask must have the shape \(3, 3\)"):
        unpad_input(torch.randn(3, 3, 2), MASK[:, :2])


def test_rows_are_taken_and_put_with_their_gradients():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([3, 1])
    assert torch.autograd.gradcheck(lambda x: index_first_axis(x, rows), x)
    values = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: index_put_first_axis(x, rows.int(), 4), values)
