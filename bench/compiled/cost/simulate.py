"""The warps of one sub-partition of an SM, going through a loop side by side.

Not exact to a cycle. An instruction issues when its warp's stall is over, the barriers it waits for
are free, and its pipe is; one of the sub-partition issues in a clock. Products run on the tensor
core in order, and those of a warpgroup also take the shared memory that their operands are read
from. What is not known is left as two ends: how the tensor core chooses between warps, and how long
a load from global memory takes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .hardware import SUB_PARTITIONS, Hardware
from .hazards import awaited_copies, awaited_products
from .listing import Step
from .pipes import cycles_of, kind_of, operand_cycles, pipe_of

LATENCY = {
    "MUFU": 24,
    "convert": 24,
    "LDS": 30,
    "LDSM": 33,
    "STS": 20,
    "SHFL": 26,
    "spill": 40,
    "uniform": 12,
    "STG": 20,
    "TMA": 30,
    "cp.async": 30,
}
"""Cycles from a pipe's end to the result, by kind; 20 where none stands here."""

SHORTEST_LOAD = 30
READ_OPERANDS = 8
HMMA_LATENCY = 18
HGMMA_LATENCY = 30
BARRIER = 20
"""Cycles of a CTA's barrier after the last warp is there."""


@dataclass(frozen=True)
class Assumption:
    """One end of what is not known.

    Attributes:
        greedy: Whether a warp keeps the scheduler, and the tensor core, as long as it can;
            otherwise warps take turns.
        latency: Cycles that a load from global memory takes.
    """

    greedy: bool
    latency: int

    @property
    def queue(self) -> int:
        """How many products may be issued ahead of the tensor core."""
        return 64 if self.greedy else 2


ASSUMPTIONS = tuple(Assumption(greedy, latency) for latency in (0, 600) for greedy in (False, True))


class Turn(NamedTuple):
    """Instructions of a loop, by number: the wait for one's turn, and what hands it on."""

    awaited: int
    passed: int


@dataclass(frozen=True)
class Timing:
    """An instruction as the simulation needs it, worked out once a loop."""

    step: Step
    kind: str
    pipe: str
    cycles: float
    operand_cycles: float
    left: int
    """For a wait, how many groups may still run."""


@dataclass
class Warp:
    """Where a warp is, and what it has started."""

    block: int
    at: int = 0
    passes: int = 0
    ready: float = 0
    barriers: list[float] = field(default_factory=lambda: [0.0] * 6)
    products: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)
    copy: float = 0
    product: float = 0
    arrived: int = 0
    at_barrier: bool = False
    ends: list[float] = field(default_factory=list)


def simulate(
    body: Sequence[Step],
    hardware: Hardware,
    warps: int,
    blocks: int,
    assumption: Assumption,
    passes: int = 9,
    stages: int = 3,
    turn: Turn | None = None,
) -> float:
    """Cycles in which `blocks` CTAs of `warps` warps each pass the loop once, side by side.

    `stages` is how many buffers bulk copies go round in. With a `turn` CTAs wait for each other,
    each for the one before.
    """
    simulation = Simulation(body, hardware, warps, blocks, assumption, passes, stages, turn)
    simulation.run()
    first, last = passes // 3, passes - 1
    spans = [(w.ends[last] - w.ends[first]) / (last - first) for w in simulation.warps]
    return sum(spans) / len(spans)


class Simulation:
    """See `simulate`."""

    def __init__(
        self,
        body: Sequence[Step],
        hardware: Hardware,
        warps: int,
        blocks: int,
        assumption: Assumption,
        passes: int,
        stages: int,
        turn: Turn | None = None,
    ) -> None:
        self.body = [_timing(step, hardware) for step in body]
        self.assumption = assumption
        self.passes = passes
        self.stages = stages
        self.together = max(1, warps // SUB_PARTITIONS)
        count = max(1, warps * blocks // SUB_PARTITIONS)
        self.warps = [Warp(block=i // self.together, ready=float(i)) for i in range(count)]
        self.free: dict[str, float] = defaultdict(float)
        self.tensor = 0.0
        self.arrivals: dict[tuple[int, int], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
        bulk = [i for i, timing in enumerate(self.body) if timing.kind == "TMA"]
        polls = [i for i, t in enumerate(self.body) if "PHASECHK" in t.step.opcode]
        self.bulk_of = {i: number for number, i in enumerate(bulk)}
        # The first wait is for what is copied first; further ones hand buffers back.
        self.poll_of = dict(zip(polls, range(len(bulk)), strict=False))
        self.landed: dict[tuple[int, int], list[float]] = defaultdict(list)
        self.turn = turn
        self.granted: list[list[float]] = [[] for _ in range(blocks)]
        self.granted[0].append(0.0)

    def run(self) -> None:
        """Issue one instruction after another until every warp has made its passes."""
        now, last = 0.0, 0
        count = len(self.warps)
        while True:
            soonest = None
            for turn in range(count):
                warp = self.warps[(last + turn) % count]
                if warp.passes == self.passes:
                    continue
                ready = warp.ready if warp.ready > now else self.ready(warp)
                if ready is None:
                    continue
                if ready <= now:
                    self.issue(warp, now)
                    last = (last + turn + (not self.assumption.greedy)) % count
                    now += 1
                    break
                soonest = ready if soonest is None else min(soonest, ready)
            else:
                if soonest is None:
                    return
                now = soonest

    def ready(self, warp: Warp) -> float | None:
        """When the warp's instruction may issue; None while others keep its barrier."""
        timing = self.body[warp.at]
        step = timing.step
        ready = warp.ready
        if warp.at_barrier:
            arrived, latest = self.arrivals[warp.block, warp.arrived]
            if arrived < self.together:
                return None
            ready = max(ready, latest + BARRIER)
        for barrier in step.waits:
            ready = max(ready, warp.barriers[barrier])
        if timing.kind == "await products" and len(warp.products) > timing.left:
            ready = max(ready, warp.products[len(warp.products) - 1 - timing.left])
        elif timing.kind == "await copies" and len(warp.copies) > timing.left:
            ready = max(ready, *warp.copies[: len(warp.copies) - timing.left])
        elif warp.at in self.poll_of:
            landed = self.landed[warp.block, self.poll_of[warp.at]]
            before = warp.passes - (self.stages - 1)
            if 0 <= before < len(landed):
                ready = max(ready, landed[before])
        elif self.turn is not None and warp.at == self.turn.awaited:
            granted = self.granted[warp.block]
            if len(granted) <= warp.passes:
                return None
            ready = max(ready, granted[warp.passes])
        if timing.pipe == "tensor":
            return max(ready, self.tensor - self.assumption.queue * timing.cycles)
        return max(ready, self.free[timing.pipe])

    def issue(self, warp: Warp, now: float) -> None:
        """Let the warp's instruction take its pipe, and move the warp on."""
        timing = self.body[warp.at]
        step = timing.step
        warp.at_barrier = False
        warp.ready = now + max(1, step.stall)
        if timing.kind == "HGMMA":
            self.free["shared"] = max(now, self.free["shared"]) + timing.operand_cycles
            self.tensor = max(max(now, self.tensor) + timing.cycles, self.free["shared"])
            if "gsb0" in step.operands:
                warp.products.append(self.tensor + HGMMA_LATENCY)
        elif timing.kind == "HMMA":
            self.tensor = max(now, self.tensor) + timing.cycles
            self._set(warp, step.done, self.tensor + HMMA_LATENCY)
        else:
            self._issue_other(warp, timing, now)
        if self.turn is not None and warp.at == self.turn.passed:
            self.granted[(warp.block + 1) % len(self.granted)].append(now + BARRIER)
        warp.at += 1
        if warp.at == len(self.body):
            warp.at = 0
            warp.passes += 1
            warp.ends.append(now)

    def _issue_other(self, warp: Warp, timing: Timing, now: float) -> None:
        step, latency = timing.step, self.assumption.latency
        self.free[timing.pipe] = max(now, self.free[timing.pipe]) + timing.cycles
        after = LATENCY.get(timing.kind, 20)
        if timing.kind == "LDG":
            after = max(SHORTEST_LOAD, latency)
        elif timing.kind == "cp.async":
            warp.copy = now + latency
        elif step.name == "LDGDEPBAR":
            warp.copies.append(warp.copy)
        elif timing.kind == "TMA":
            landed = self.landed[warp.block, self.bulk_of[warp.at]]
            # One warp of a CTA starts it for all.
            if len(landed) <= warp.passes:
                landed.append(now + latency)
        elif timing.kind == "BAR" and "SYNC" in step.opcode:
            warp.arrived += 1
            arrived, latest = self.arrivals[warp.block, warp.arrived]
            self.arrivals[warp.block, warp.arrived] = arrived + 1, max(latest, now)
            warp.at_barrier = True
        self._set(warp, step.done, now + timing.cycles + after)
        self._set(warp, step.read, now + timing.cycles + READ_OPERANDS)

    def _set(self, warp: Warp, barrier: int | None, until: float) -> None:
        if barrier is not None:
            warp.barriers[barrier] = max(warp.barriers[barrier], until)


def _timing(step: Step, hardware: Hardware) -> Timing:
    kind, left = kind_of(step), 0
    if (products := awaited_products(step)) is not None:
        kind, left = "await products", products
    elif (copies := awaited_copies(step)) is not None:
        kind, left = "await copies", copies
    return Timing(step, kind, pipe_of(kind), cycles_of(step, hardware), operand_cycles(step), left)
