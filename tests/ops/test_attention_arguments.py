"""What attention says of arguments that are bad."""

from typing import Any

import pytest
import torch

import fastattn


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": 1.0}, TypeError, "q must be a tensor, got float"),
        ({"q": torch.ones(2, 4, 5, 8).int()}, TypeError, "q must be float16, .* got torch.int32"),
        ({"k": [1]}, TypeError, "k must be a tensor, got list"),
        ({"q": torch.randn(4, 5, 8)}, ValueError, r"q must have 4 dimensions \(B, H, N, D\)"),
        ({"v": torch.randn(2, 6, 8)}, ValueError, "v must have 4 dimensions"),
        ({"k": torch.randn(2, 2, 6, 8).half()}, TypeError, "k must have q's dtype torch.float32"),
        ({"v": torch.randn(2, 2, 6, 8).double()}, TypeError, "v is torch.float64 beside"),
        ({"k": torch.randn(2, 2, 6, 8, device="meta")}, ValueError, "k must be on cpu, got meta"),
        ({"q": torch.randn(3, 4, 5, 8)}, ValueError, "q and k must have the same batch"),
        ({"v": torch.randn(3, 2, 6, 8)}, ValueError, "k and v must have the same length and batch"),
        ({"v": torch.randn(2, 2, 7, 8)}, ValueError, "k and v must have the same length"),
        ({"v": torch.randn(2, 1, 6, 8)}, ValueError, "the same number of heads, .* got 4, 2 and 1"),
        ({"q": torch.randn(2, 3, 5, 8)}, ValueError, "one that divides that of q, got 3, 2 and 2"),
        ({"q": torch.randn(2, 4, 5, 9)}, ValueError, "q and k must have the same head dimension"),
        (
            {"q": torch.randn(2, 4, 5, 0), "k": torch.randn(2, 2, 6, 0)},
            ValueError,
            r"the head dimension of q must be in \[1, 1024\], got 0",
        ),
        (
            {"v": torch.randn(2, 2, 6, 1025)},
            ValueError,
            r"the head dimension of v must be in \[1, 1024\], got 1025",
        ),
        ({"window": -1}, ValueError, "window must not be negative, got -1"),
        ({"window": (3, -2)}, ValueError, r"window must not be negative, got \(3, -2\)"),
        ({"window": (3,)}, TypeError, r"window must be an integer, a pair .* got \(3,\)"),
        ({"window": 2.5}, TypeError, "window must be an integer, .* got 2.5"),
        ({"window": (1.5, 2)}, TypeError, "window must be an integer, a pair of them, or None"),
        ({"window": "ab"}, TypeError, "window must be an integer, a pair of them, or None"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
        ({"softcap": float("nan")}, ValueError, "softcap must be positive, got nan"),
        ({"mask": [True]}, TypeError, "mask must be a tensor, got list"),
        ({"mask": torch.ones(5, 6)}, TypeError, "mask must be boolean, .* got torch.float32"),
        (
            {"mask": torch.ones(6, 5, dtype=torch.bool)},
            ValueError,
            r"mask must broadcast to \(2, 4, 5, 6\), got \(6, 5\)",
        ),
        (
            {"mask": torch.ones(2, 2, 5, 6, dtype=torch.bool)},
            ValueError,
            r"mask must broadcast to \(2, 4, 5, 6\), got \(2, 2, 5, 6\)",
        ),
        (
            {"mask": torch.ones(1, 1, 1, 5, 6, dtype=torch.bool)},
            ValueError,
            r"mask must broadcast to \(2, 4, 5, 6\), got \(1, 1, 1, 5, 6\)",
        ),
        (
            {"mask": torch.ones(5, 6, dtype=torch.bool, device="meta")},
            ValueError,
            "mask must be on cpu, got meta",
        ),
        (
            {"alibi_slopes": torch.ones(2)},
            ValueError,
            r"alibi_slopes must have shape \(4,\) or \(2",
        ),
        ({"alibi_slopes": torch.ones(4, 2)}, ValueError, "alibi_slopes must have shape"),
        ({"alibi_slopes": 1.0}, TypeError, "alibi_slopes must be a tensor, got float"),
        (
            {"alibi_slopes": torch.ones(4, requires_grad=True)},
            ValueError,
            "alibi_slopes must not require a gradient",
        ),
        (
            {"kv_lengths": torch.ones(2)},
            TypeError,
            "kv_lengths must be int32 or int64, got torch.f",
        ),
        ({"kv_lengths": torch.ones(3).int()}, ValueError, r"kv_lengths must have shape \(2,\)"),
        ({"kv_lengths": 3}, TypeError, "kv_lengths must be a tensor, got int"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments: dict[str, Any] = {
        "q": torch.randn(2, 4, 5, 8),
        "k": torch.randn(2, 2, 6, 8),
        "v": torch.randn(2, 2, 6, 8),
    }
    with pytest.raises(error, match=message):
        fastattn.attention(**{**arguments, **change})


def test_slopes_that_learn_are_fine_where_nothing_is_recorded():
    x = torch.randn(1, 2, 5, 8)
    with torch.no_grad():
        fastattn.attention(x, x, x, alibi_slopes=torch.ones(2, requires_grad=True))
