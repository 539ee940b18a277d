"""A score function and a mask of one's own for fastattn, as its users write them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

import fastattn
from fastattn.terms import MaskFunctions, ScoreFunctions

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def distance_of(m, n, place):
    return tl.abs(m + place[3] - place[2] - n)


@triton.jit
def factor_of(m, n, place, args):
    return tl.exp2(-tl.load(args[0] + place[1]).to(tl.float32) * distance_of(m, n, place))


@triton.jit
def decayed(score, m, n, place, args):
    return score * factor_of(m, n, place, args)


@triton.jit
def decayed_backward(dscore, score, m, n, place, args):
    return dscore * factor_of(m, n, place, args)


@triton.jit
def of_rate(dscore, score, m, n, place, args):
    return -dscore * score * factor_of(m, n, place, args) * distance_of(m, n, place) * LN2


class Decay(fastattn.ScoreTerm):
    """score * 2^(-rate * distance), with a rate for each head that is learned."""

    learned = True

    def __init__(self, rate: torch.Tensor) -> None:
        self.tensors = (rate[None],)

    @classmethod
    def triton_functions(cls) -> Any:
        return ScoreFunctions(decayed, decayed_backward, of_rate)

    def score(self, score: torch.Tensor, m: Any, n: Any, queries: Any, keys: Any) -> torch.Tensor:
        rate = self.tensors[0][..., None, None].to(score.dtype)
        return score * torch.exp2(-rate * (m + keys - queries - n).abs())


@triton.jit
def in_prefix_or_before(m, n, place, args):
    return (n <= m) | (n < tl.load(args[0] + place[0]))


class Prefix(fastattn.MaskTerm):
    """Causal, but all see the first keys, whose number each batch element has."""

    def __init__(self, prefix: torch.Tensor) -> None:
        self.tensors = (prefix[:, None],)

    @classmethod
    def triton_functions(cls) -> Any:
        return MaskFunctions(in_prefix_or_before, hides_last_keys=True)

    def keep(self, m: Any, n: Any, queries: Any, keys: Any) -> torch.Tensor:
        return (n <= m) | (n < self.tensors[0][..., None, None])
