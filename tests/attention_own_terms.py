"""Terms as users write them, beside options of the library that mean the same."""

from typing import Any

import torch
import triton
import triton.language as tl
from attention_support import random_mask

from fastattn.terms import MaskFunctions, MaskTerm, ScoreFunctions, ScoreTerm
from support import DEVICE

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def slope_score(score, m, n, place, args):
    slope = tl.load(args[0] + place[1]).to(score.dtype)
    return score - slope * args[1] * tl.abs(m + place[3] - place[2] - n)


@triton.jit
def same(dscore, score, m, n, place, args):
    return dscore


@triton.jit
def squashed_score(score, m, n, place, args):
    e = tl.exp2(score * (2.0 * LOG2E / args[0]))
    return args[0] - 2.0 * args[0] / (e + 1.0)


@triton.jit
def squashed_backward(dscore, score, m, n, place, args):
    e = tl.exp2(tl.abs(score) * (-2.0 * LOG2E / args[0]))
    return dscore * (4.0 * e / ((1.0 + e) * (1.0 + e)))


@triton.jit
def square_score(score, m, n, place, args):
    return score * score * args[0]


@triton.jit
def square_backward(dscore, score, m, n, place, args):
    return 2.0 * dscore * score * args[0]


@triton.jit
def band_keep(m, n, place, args):
    at = m + place[3] - place[2]
    return (n >= at - args[0]) & (n <= at + args[1])


@triton.jit
def band_key_range(first, last, place, args):
    shift = place[3] - place[2]
    return (
        first + shift - args[0],
        last + shift + args[1] + 1,
        last + shift - args[0],
        first + shift + args[1] + 1,
    )


@triton.jit
def band_query_range(first, last, place, args):
    shift = place[3] - place[2]
    return (
        first - shift - args[1],
        last - shift + args[0] + 1,
        last - shift - args[1],
        first - shift + args[0] + 1,
    )


@triton.jit
def chosen_keep(m, n, place, args):
    row = args[0] + place[0] * args[1]
    return tl.load(row + n, n < place[3], other=0) != 0


class Slope(ScoreTerm):
    """ALiBi, with a tensor (1, H) and a float."""

    def __init__(self, slopes: torch.Tensor, factor: float) -> None:
        self.tensors = (slopes[None],)
        self.floats = (factor,)

    @classmethod
    def triton_functions(cls) -> Any:
        return ScoreFunctions(slope_score, same)

    def score(self, score: torch.Tensor, m: Any, n: Any, queries: Any, keys: Any) -> torch.Tensor:
        slopes = self.tensors[0][..., None, None].to(score.dtype)
        return score - slopes * self.floats[0] * (m + keys - queries - n).abs()


class Squashed(ScoreTerm):
    """A softcap."""

    def __init__(self, cap: float) -> None:
        self.floats = (cap,)

    @classmethod
    def triton_functions(cls) -> Any:
        return ScoreFunctions(squashed_score, squashed_backward)

    def score(self, score: torch.Tensor, m: Any, n: Any, queries: Any, keys: Any) -> torch.Tensor:
        return self.floats[0] * torch.tanh(score / self.floats[0])


class Square(ScoreTerm):
    """What the library has not: the square of the score, times a float."""

    floats = (0.5,)

    @classmethod
    def triton_functions(cls) -> Any:
        return ScoreFunctions(square_score, square_backward)

    def score(self, score: torch.Tensor, m: Any, n: Any, queries: Any, keys: Any) -> torch.Tensor:
        return score.square() * self.floats[0]


class Scattered(MaskTerm):
    """A window to both sides that says nothing of ranges, by integers."""

    def __init__(self, left: int, right: int) -> None:
        self.integers = (left, right)

    @classmethod
    def triton_functions(cls) -> Any:
        return MaskFunctions(band_keep)

    def keep(self, m: Any, n: Any, queries: Any, keys: Any) -> torch.Tensor:
        at = m + keys - queries
        left, right = self.integers
        return (n >= at - left) & (n <= at + right)


class Band(Scattered):
    """The same with its ranges."""

    @classmethod
    def triton_functions(cls) -> Any:
        return MaskFunctions(
            band_keep,
            band_key_range,
            band_query_range,
            hides_first_keys=True,
            hides_last_keys=True,
        )


class Chosen(MaskTerm):
    """Keys by a table (B, N) of bytes."""

    def __init__(self, table: torch.Tensor) -> None:
        self.tensors = (table[:, None],)
        self.integers = (table.stride(0),)

    @classmethod
    def triton_functions(cls) -> Any:
        return MaskFunctions(chosen_keep)

    def keep(self, m: Any, n: Any, queries: Any, keys: Any) -> torch.Tensor:
        return self.tensors[0][:, :, None] != 0


def pairs_of_terms() -> dict[str, tuple[Any, Any]]:
    """For B 2, H 2 and N 40: options of the library, and terms of one's own that mean the same."""
    slopes, table = torch.tensor([0.5, 0.1], device=DEVICE), random_mask(2, 40)
    own_table = table.to(torch.uint8)
    return {
        "tensor and float": ({"alibi_slopes": slopes}, [Slope(slopes / 2, 2.0)]),
        "float": ({"softcap": 0.75}, [Squashed(0.75)]),
        "in order": (
            {"softcap": 0.75, "alibi_slopes": slopes},
            [Squashed(0.75), Slope(slopes, 1.0)],
        ),
        "mask with ranges": ({"window": (9, 4)}, [Band(9, 4)]),
        "mask without ranges": ({"window": (9, 4)}, [Scattered(9, 4)]),
        "mask by a tensor": ({"mask": table[:, None, None]}, [Chosen(own_table)]),
        "everything": (
            {
                "softcap": 0.75,
                "alibi_slopes": slopes,
                "window": (9, 4),
                "mask": table[:, None, None],
            },
            [Chosen(own_table), Squashed(0.75), Band(9, 4), Slope(slopes, 1.0)],
        ),
    }
