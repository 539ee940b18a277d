"""Runs a contender on a feature, and says what came out.

"right" is what the rule of fastattn/checking.py allows: an error against float64 of at most twice
(gradients: three times) that of PyTorch's plain computation in the same dtype, and rounding.
"imprecise" is an error of less than IMPRECISION times as much: the right formula, computed less
exactly, or bad luck with the largest element. Beyond that it is "wrong".
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import fastattn
from fastattn.checking import (
    Change,
    Comparison,
    Measured,
    Results,
    compare_results,
    measure_reference,
)

from .case import Absent, Case
from .contenders import Answer, Attention, of_fastattn
from .features import DROPOUT, REPEATED, SECOND, VALUES, Feature

RIGHT, IMPRECISE, WRONG = "right", "imprecise", "wrong"
REFUSED, ABSENT = "refused", "absent"
CRASHED, NOT_TRIED = "crashed", "not tried"

IMPRECISION = 4.0

SEEDS = 8
MEAN_BOUND = 1.5
"""How far the mean of SEEDS dropped outputs may be from the output without dropout: this times the
standard deviation that a mean of so many has, in the root mean square over all elements."""
SPREAD_BOUND = 1.25
"""By what factor the outputs' standard deviation may differ from that of dropping weights."""

REPEATS = 3

LONGEST_MESSAGE = 200

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Verdict:
    """What came out.

    Attributes:
        kind: RIGHT, IMPRECISE, WRONG, REFUSED, ABSENT, CRASHED or NOT_TRIED.
        of_allowed: the largest error of all tensors as a share of what the rule allows.
        of_reference: that error as a multiple of the error of PyTorch's plain computation.
        tensor: which tensor that was.
        message: of the library, or what is wrong.
        how: in what roundabout way it was asked for.
    """

    kind: str
    of_allowed: float | None = None
    of_reference: float | None = None
    tensor: str = ""
    message: str = ""
    how: str = ""


Pair = dict[str, Verdict]
"""Verdicts on "forward" and "gradients"; one of them may be missing."""

FORWARD, GRADIENTS = "forward", "gradients"


def judge(
    feature: Feature, attention: Attention, device: torch.device, dtype: torch.dtype
) -> dict[str, Pair]:
    """The verdicts on a feature by variant: plain, with GQA, and with causal."""
    judges = {VALUES: values, DROPOUT: dropout, SECOND: second_derivatives, REPEATED: repeated}
    found = {}
    for variant in feature.variants:
        case = feature.case(variant, device.type != "cpu").to(device, feature.dtype or dtype)
        found[variant] = judges[feature.judged](attention, case)
    return found


def reference(case: Case) -> Answer:
    """PyTorch's plain computation, which is fastattn's reference."""
    with fastattn.backend("reference"):
        return of_fastattn(case)


def failure(error: Exception) -> Verdict:
    """What an exception says."""
    if isinstance(error, Absent):
        return Verdict(ABSENT, message=str(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    return Verdict(REFUSED, message=textwrap.shorten(message, LONGEST_MESSAGE, placeholder=" ..."))


def outputs_of(answer: Answer) -> dict[str, torch.Tensor]:
    return {"o": answer.o} | ({} if answer.lse is None else {"lse": answer.lse})


def incoming(outputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The same gradients of the same outputs for everyone, rounded to the tested dtype first."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype).to(output)
        for output in outputs.values()
    ]


def gradients_of(
    outputs: Mapping[str, torch.Tensor], case: Case, dtype: torch.dtype
) -> dict[str, torch.Tensor | None]:
    inputs = case.differentiable()
    found = torch.autograd.grad(
        list(outputs.values()),
        list(inputs.values()),
        incoming(outputs, dtype),
        allow_unused=True,
    )
    return {f"d{name}": gradient for name, gradient in zip(inputs, found, strict=True)}


def compared(
    actual: Mapping[str, torch.Tensor | None], measured: Sequence[Measured], how: str = ""
) -> Verdict:
    """The verdict on the worst of some tensors."""
    if missing := without_gradient(actual):
        return Verdict(ABSENT, message=missing, how=how)
    plain = {name: measured[0].reference[name] for name in actual}
    pairs = zip(compare_results(actual, measured), compare_results(plain, measured), strict=True)
    found, reference = max(pairs, key=lambda pair: _share(pair[0]))
    share = _share(found)
    kind = RIGHT if found.passed else IMPRECISE if share < IMPRECISION else WRONG
    multiple = found.error / reference.error if reference.error > 0.0 else None
    return Verdict(kind, share, multiple, found.name, how=how)


def _share(comparison: Comparison) -> float:
    """How much of what the rule allows an error takes; NaN takes more than anything."""
    if comparison.allowed == 0.0 or math.isnan(comparison.error):
        return math.inf
    return comparison.error / comparison.allowed


def without_gradient(found: Mapping[str, torch.Tensor | None]) -> str:
    """What to say of inputs that got no gradient; "" if all did."""
    missing = [name.removeprefix("d") for name, x in found.items() if x is None]
    return f"gives {' and '.join(missing)} no gradient" if missing else ""


def values(attention: Attention, case: Case) -> Pair:
    """Outputs and gradients by the rule."""
    return by_the_rule(attention, reference, case)


def by_the_rule(attention: Attention, plain: Callable[[Case], Answer], case: Case) -> Pair:
    """Outputs and gradients beside a plain computation in the same dtype and in float64.

    The outputs are asked for once more without gradients where nothing can be had with them.
    """
    gradients: Verdict | None = None
    try:
        answer = attention(case)
    except Exception as error:
        gradients = failure(error)
        try:
            answer = attention(case.detached())
        except Exception as also:
            return {FORWARD: failure(also), GRADIENTS: gradients}
    measured = measure_reference(lambda change: outputs_and_gradients(plain, case, change))
    outputs = outputs_of(answer)
    forward = compared(outputs, measured, answer.how)
    if gradients is None:
        gradients = verdict_on_gradients(answer, case, measured)
    return {FORWARD: forward, GRADIENTS: gradients}


def outputs_and_gradients(
    plain: Callable[[Case], Answer], case: Case, change: Change
) -> dict[str, torch.Tensor]:
    """What a plain computation makes of a changed case."""
    own = case.changed(change)
    outputs = outputs_of(plain(own))
    gradients = gradients_of(outputs, own, case.q.dtype)
    return outputs | {name: x for name, x in gradients.items() if x is not None}


def verdict_on_gradients(answer: Answer, case: Case, measured: Sequence[Measured]) -> Verdict:
    """The gradients by the rule."""
    outputs = outputs_of(answer)
    if unlinked := [name for name, x in outputs.items() if not x.requires_grad]:
        return Verdict(ABSENT, message=f"no gradient of {' and '.join(unlinked)}", how=answer.how)
    try:
        actual = gradients_of(outputs, case, case.q.dtype)
    except Exception as error:
        return replace(failure(error), how=answer.how)
    return compared(actual, measured, answer.how)


def second_derivatives(attention: Attention, case: Case) -> Pair:
    """The gradients of a sum of the gradients by the rule."""

    def twice(function: Callable[[Case], Answer], own: Case) -> tuple[Answer, dict[str, Any]]:
        inputs = list(own.differentiable().values())
        answer = function(own)
        outputs = outputs_of(answer)
        directions = incoming(outputs, case.q.dtype)
        first = torch.autograd.grad(list(outputs.values()), inputs, directions, create_graph=True)
        firsts = {f"d{name}": x for name, x in zip(own.differentiable(), first, strict=True)}
        # A gradient that depends on nothing would count as one that is constant.
        found = torch.autograd.grad(first, inputs, incoming(firsts, case.q.dtype))
        return answer, dict(zip((f"{name}, second" for name in firsts), found, strict=True))

    try:
        answer, actual = twice(attention, case)
    except Exception as error:
        return {GRADIENTS: failure(error)}

    def run(change: Change) -> Results:
        return twice(reference, case.changed(change))[1]

    return {GRADIENTS: compared(actual, measure_reference(run), answer.how)}


def repeated(attention: Attention, case: Case) -> Pair:
    """Whether outputs and gradients of the same call have the same bits."""

    try:
        answers = [attention(case) for _ in range(REPEATS)]
    except Exception as error:
        refused = failure(error)
        try:
            answers = [attention(case.detached()) for _ in range(REPEATS)]
        except Exception as also:
            return {FORWARD: failure(also), GRADIENTS: refused}
        gradients: Any = refused
    else:
        gradients = None
    how = answers[0].how
    outputs = [outputs_of(answer) for answer in answers]
    if gradients is None:
        try:
            found = [gradients_of(own, case, case.q.dtype) for own in outputs]
        except Exception as error:
            gradients = failure(error)
        else:
            gradients = differing(found, how)
    return {FORWARD: differing(outputs, how), GRADIENTS: gradients}


def differing(runs: Sequence[Mapping[str, Any]], how: str) -> Verdict:
    """The verdict on whether all runs have the same bits."""
    if missing := without_gradient(runs[0]):
        return Verdict(ABSENT, message=missing, how=how)
    others = {
        name for run in runs[1:] for name, x in run.items() if not torch.equal(x, runs[0][name])
    }
    if not others:
        return Verdict(RIGHT, how=how)
    return Verdict(WRONG, message=f"{', '.join(sorted(others))} differ from call to call", how=how)


def dropout(attention: Attention, case: Case) -> Pair:
    """Dropout: its mean and spread over seeds, the same after the same seed, and by the rule.

    Values that are the identity, which this asks as many of as their dimension, show what is kept
    after a seed. With it PyTorch's plain computation has the same outputs and gradients.
    """

    def seeded(seed: int, own: Case) -> Answer:
        torch.manual_seed(seed)
        return attention(own)

    apart = case.detached()
    try:
        outputs = torch.stack([seeded(seed, apart).o.double().cpu() for seed in range(SEEDS)])
        again = seeded(0, apart).o.double().cpu()
        identity = torch.eye(case.v.shape[2], dtype=case.v.dtype, device=case.v.device)
        kept = seeded(0, replace(apart, v=identity.expand_as(case.v).contiguous())).o != 0
    except Exception as error:
        return {FORWARD: failure(error), GRADIENTS: failure(error)}

    def plain(own: Case) -> Answer:
        return Answer(dropped(own, kept.to(own.q.device)))

    pair = by_the_rule(lambda own: seeded(0, own), plain, case)
    fault = "" if torch.equal(again, outputs[0]) else "another result after the same seed; "
    fault += statistical_fault(outputs, apart.to(CPU, torch.float64))
    if fault:
        pair[FORWARD] = replace(pair[FORWARD], kind=WRONG, message=fault)
    return pair


def dropped(case: Case, kept: torch.Tensor | None) -> torch.Tensor:
    """Attention of which these weights are kept; without dropout if None."""
    k, v = (x.repeat_interleave(case.group, 1) for x in (case.k, case.v))
    weights = weights_of(case, k)
    if kept is not None:
        weights = torch.where(kept, weights / (1.0 - case.dropout_p), 0.0)
    return weights.to(v.dtype) @ v


def weights_of(case: Case, k: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(case.q.dtype, torch.float32)
    scores = case.q.to(wide) @ k.to(wide).mT * case.q.shape[-1] ** -0.5
    keep = case.keep()
    return (scores if keep is None else scores.masked_fill(~keep, float("-inf"))).softmax(-1)


def statistical_fault(outputs: torch.Tensor, case: Case) -> str:
    """What is wrong with the outputs (SEEDS, B, H, M, Dv) of different seeds; "" if nothing."""
    p = case.dropout_p
    k, v = (x.repeat_interleave(case.group, 1) for x in (case.k, case.v))
    deviation = root_mean_square(
        ((weights_of(case, k).square() @ v.square()) * (p / (1.0 - p))).sqrt()
    )
    off = root_mean_square(outputs.mean(0) - dropped(case, None)) * SEEDS**0.5 / deviation
    spread = root_mean_square(outputs.std(0)) / deviation
    if not off <= MEAN_BOUND:
        return f"the mean of {SEEDS} seeds is {off:.1f} standard deviations off"
    if not 1.0 / SPREAD_BOUND <= spread <= SPREAD_BOUND:
        return f"the spread over {SEEDS} seeds is {spread:.2f} of what dropping weights gives"
    return ""


def root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()
