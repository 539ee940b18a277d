"""What attention says of arguments that are bad."""

from typing import Any

import pytest
import torch

import fastattn
from fastattn import BlockMask, RelativeBias


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
        ({"window": (3, -2)}, ValueError, "window must not be negative, got -2"),
        ({"window": (3,)}, TypeError, r"window must be an integer, a pair .* got \(3,\)"),
        ({"window": 2.5}, TypeError, "window must be an integer, .* got 2.5"),
        ({"window": (1.5, 2)}, TypeError, "window must be an integer, a pair of them, or None"),
        ({"window": True}, TypeError, "window must be an integer, .* got True"),
        ({"window": (2, False)}, TypeError, "window must be an integer, a pair of them, or None"),
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
        ({"bias": torch.ones(5, 5)}, ValueError, r"bias must broadcast to \(2, 4, 5, 6\), got"),
        ({"bias": torch.ones(5, 6).long()}, TypeError, "bias must be float16, bfloat16, float32"),
        ({"bias": torch.ones(5, 6, device="meta")}, ValueError, "bias must be on cpu, got meta"),
        ({"relative_bias": torch.ones(8, 4)}, TypeError, "relative_bias must be a fastattn.Rel"),
        (
            {"relative_bias": RelativeBias(torch.ones(8, 3))},
            ValueError,
            "relative_bias must have a table for 4 heads, got 3",
        ),
        ({"sinks": torch.ones(2)}, ValueError, r"sinks must have shape \(4,\), got \(2,\)"),
        ({"sinks": torch.ones(4).long()}, TypeError, "sinks must be float16, bfloat16, float32"),
        ({"sinks": 1.0}, TypeError, "sinks must be a tensor, got float"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
        (
            {"dropout_p": 0.5, "dropout_seed": torch.ones(1)},
            TypeError,
            "seed must be an int64 tensor of one element",
        ),
        (
            {"document_ids": torch.ones(2, 5).long()},
            ValueError,
            r"document_ids must be \(2, 5\) for queries and \(2, 6\) for keys, got \(2, 5\)",
        ),
        ({"document_ids": torch.ones(2, 5)}, TypeError, "document_ids must be int32 or int64"),
        ({"document_ids": (torch.ones(2, 5),)}, ValueError, "must be a tensor or a pair, got 1"),
        ({"block_mask": torch.ones(1, 1)}, TypeError, "block_mask must be a fastattn.BlockMask"),
        (
            {"block_mask": BlockMask(torch.ones(2, 1, dtype=torch.bool), 16)},
            ValueError,
            r"block_mask must have an entry for each of \(1, 1\) blocks",
        ),
        (
            {"block_mask": BlockMask(torch.ones(3, 1, 1, 1, dtype=torch.bool), 16)},
            ValueError,
            r"as many batch elements and heads as \(2, 4\) or 1, got the table \(3, 1, 1, 1\)",
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


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RelativeBias(torch.ones(8)), ValueError, r"table must be \(buckets, H\)"),
        (lambda: RelativeBias(torch.ones(8, 2).int()), ValueError, "of a float dtype"),
        (lambda: RelativeBias(torch.ones(7, 2)), ValueError, "4 buckets or more, an even number"),
        (lambda: RelativeBias(torch.ones(1, 2), bidirectional=False), ValueError, "2 buckets or"),
        (
            lambda: RelativeBias(torch.ones(32, 2), max_distance=8),
            ValueError,
            "max_distance must be more than 8",
        ),
        (lambda: BlockMask(torch.ones(2, 2)), TypeError, "table must be a boolean tensor"),
        (
            lambda: BlockMask(torch.ones(2, dtype=torch.bool)),
            ValueError,
            "table must have the shape",
        ),
        (
            lambda: BlockMask(torch.ones(2, 2, dtype=torch.bool), 24),
            ValueError,
            "block_size must be multiples of 16, got 24",
        ),
        (
            lambda: BlockMask(torch.ones(2, 2, dtype=torch.bool), 16.0),  # type: ignore[arg-type]
            TypeError,
            "block_size must be integers, got 16.0",
        ),
        (
            lambda: BlockMask(torch.ones(2, 2, dtype=torch.bool), (16, 2**31)),
            ValueError,
            "block_size must be at most 1073741824",
        ),
        (
            lambda: RelativeBias(torch.ones(32, 2), max_distance=2**24 + 1),
            ValueError,
            "max_distance must be at most 16777216, got 16777217",
        ),
        (
            lambda: BlockMask(torch.ones(2, 2, dtype=torch.bool), (16, 0)),
            ValueError,
            "block_size must be multiples of 16",
        ),
    ],
)
def test_bad_terms_of_the_library_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_integers_of_ones_own_terms_have_64_bits():
    class Far(fastattn.MaskTerm):
        integers = (2**63,)

    x = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="score_mods: Far: integers must have 64 bits, got 922"):
        fastattn.attention(x, x, x, score_mods=[Far()])
