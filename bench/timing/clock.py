"""Seconds that calls take: between events on a GPU's stream, or by the wall clock on a CPU."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Cycles that a GPU idles before timed work, some half a millisecond, so that the host has queued
# all of it by then: the times are the device's alone. The host's own are bench.host_cost's.
HEAD_START = 1_000_000


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Run the calls one after another; the seconds of each."""
    if device.type == "cpu":
        seconds = []
        for call in calls:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls
    ]
    torch.cuda._sleep(HEAD_START * len(calls))
    for call, (start, end) in zip(calls, events, strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches on the two things that bound every kernel, measured in this run.

    Attributes:
        copy: Bytes a second, read and written, of a large copy.
        product: Floating-point operations a second of a large bfloat16 matrix product.
    """

    copy: float
    product: float

    def floor(self, least_bytes: int, flops: float) -> float:
        """The seconds below which nothing that moves and computes so much can be."""
        return max(least_bytes / self.copy, flops / self.product)


@functools.cache
def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure both on random numbers: zeros can be faster than data."""
    on_gpu = device.type != "cpu"
    source = torch.randn(2**28 if on_gpu else 2**24, device=device)
    target = torch.empty_like(source)
    copying = _median(lambda: target.copy_(source), device)
    side = 8192 if on_gpu else 256
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    multiplying = _median(lambda: a @ b, device)
    return Ceilings(2 * source.nbytes / copying, 2.0 * side**3 / multiplying)


def _median(call: Callable[[], Any], device: torch.device) -> float:
    for _ in range(3):
        call()
    return statistics.median(time_calls([call] * 15, device))
