"""What ops as a whole are predicted to reach, by the products that they count themselves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...op import BACKWARD, FORWARD
from ..measure import Row
from .hardware import HARDWARE

PRODUCTS = {
    "attention_forward_kernel": 2,
    "attention_queries_backward_kernel": 3,
    "attention_keys_backward_kernel": 4,
    "attention_bias_backward_kernel": 2,
    "matmul_kernel": 1,
    "gated_linear_forward_kernel": 2,
    "gated_linear_backward_kernel": 2,
}
"""The products that a kernel does, each of as many operations."""

COUNTED = {FORWARD: 2, BACKWARD: 5}
"""The products that attention counts; its two backward kernels recompute two of theirs."""


@dataclass(frozen=True)
class Total:
    """One op at one shape in one direction: low and high."""

    target: str
    op: str
    shape: tuple[int, ...]
    phase: str
    share: tuple[float, float]
    teraflops: tuple[float, float]


def total_all(rows: Iterable[Row]) -> list[Total]:
    """The ops whose kernels with products are all known here, a direction each.

    What is left out: launches, prologues and epilogues, blocks with masks, kernels without
    products, and products that PyTorch does.
    """
    cases: dict[tuple[str, str, tuple[int, ...], str], list[Row]] = {}
    for row in rows:
        if row.cost is not None and row.cost.main_loop.tensor_share is not None:
            key = (row.target, row.op, tuple(row.shape), row.phase)
            cases.setdefault(key, []).append(row)
    return [
        _total(*case, found)
        for case, found in cases.items()
        if all(row.kernel in PRODUCTS for row in found)
    ]


def _total(target: str, op: str, shape: tuple[int, ...], phase: str, rows: list[Row]) -> Total:
    done = sum(PRODUCTS[row.kernel] for row in rows)
    attention = all(row.kernel.startswith("attention_") for row in rows)
    counted = min(done, COUNTED[phase]) if attention else done

    def share(end: int) -> float:
        shares = [
            (PRODUCTS[row.kernel], row.cost.main_loop.tensor_share[end])
            for row in rows
            if row.cost is not None and row.cost.main_loop.tensor_share is not None
        ]
        return counted / sum(products / reached for products, reached in shares)

    low, high = share(0), share(1)
    peak = HARDWARE[target].teraflops
    return Total(target, op, shape, phase, (low, high), (low * peak, high * peak))
