"""What a kernel's predicted cost may be. What does not keep it stands in known.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..measure import Row
from .l2 import Traffic

FLOORS = {
    "attention_forward_kernel": 0.40,
    "attention_queries_backward_kernel": 0.45,
    "attention_keys_backward_kernel": 0.40,
    "attention_bias_backward_kernel": 0.25,
    "matmul_kernel": 0.45,
    "gated_linear_forward_kernel": 0.60,
    "gated_linear_backward_kernel": 0.45,
}
"""The least share of the tensor cores' peak that is predicted, with latency, by kernel."""

MOST_TRAFFIC = 2.0
"""The bytes from and to HBM, as a multiple of the least."""


@dataclass(frozen=True, order=True)
class Problem:
    """One check that one kernel of one case does not pass."""

    target: str
    op: str
    kernel: str
    shape: tuple[int, ...]
    check: str


def problems(row: Row) -> list[Problem]:
    """The checks that a predicted row does not pass."""
    cost = row.cost
    if cost is None:
        return []
    found = []
    if any(loop.serialized for loop in cost.loops):
        found.append("serialized")
    ahead = [loop.steps_ahead for loop in cost.loops if loop.steps_ahead is not None]
    # Where several CTAs share an SM, one works while another waits.
    if cost.occupancy.blocks == 1 and min(ahead, default=1.0) < 1.0:
        found.append("copies awaited in the next step")
    if any(loop.hazards for loop in cost.loops):
        found.append("hazard")
    share = cost.main_loop.tensor_share
    if share is not None and share[0] < FLOORS.get(row.kernel, 0.0):
        found.append("share")
    return [Problem(row.target, row.op, row.kernel, tuple(row.shape), check) for check in found]


def traffic_problems(traffic: Traffic) -> list[Problem]:
    """Whether the grid's order lets too much come from HBM."""
    if traffic.moved <= MOST_TRAFFIC * traffic.least:
        return []
    return [Problem(traffic.target, traffic.op, traffic.kernel, traffic.shape, "bytes from HBM")]


def judge(
    rows: Iterable[Row], traffics: Iterable[Traffic], known: Iterable[Problem]
) -> tuple[set[Problem], set[Problem]]:
    """The problems that are not known, and the known ones of these kernels that are gone."""
    rows, traffics = list(rows), list(traffics)
    found = {problem for row in rows for problem in problems(row)}
    found |= {problem for traffic in traffics for problem in traffic_problems(traffic)}
    cases = {(x.target, x.op, x.kernel, tuple(x.shape)) for x in (*rows, *traffics)}
    expected = {p for p in known if (p.target, p.op, p.kernel, p.shape) in cases}
    return found - expected, expected - found
