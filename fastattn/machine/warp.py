"""One warp of a CTA, run by itself: a group of 32 threads that waits when it must.

A warp runs one block at a time, and after each somebody else may go on. An instruction that has to
wait is the last of its block and says for what; the warp goes on behind it when that has come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from .arithmetic import Array
from .clocks import Clock
from .group import ENDED, Group
from .memory import Accesses
from .parser import Instruction
from .shared import SharedMemory, Span
from .translator import Read, Step, Translator, not_here
from .warpgroup import Product, carry_out

if TYPE_CHECKING:
    from .cta import CTA

LANES = 32


class Wait(NamedTuple):
    """What a warp waits for.

    Attributes:
        instruction: Where it waits.
        ready: Whether it has come.
        describe: What it is, and what is missing.
        leave: What happens when the warp goes on.
    """

    instruction: Instruction
    ready: Callable[[], bool]
    describe: Callable[[], str]
    leave: Callable[[], None]


class Warp(Group):
    """A warp.

    Attributes:
        index: Its number in the CTA.
        clock: What it knows to have happened.
        place: The block in which it is, or its threads are; see `Group.advance`.
        waiting: What it waits for.
        leader: The thread that `elect.sync` chooses, which is for the GPU to say.
        held: How many registers each of its threads has.
        stores: Its bulk stores.
        begun: How many products it has begun.
        latest: The latest of them.
    """

    def __init__(self, cta: CTA, index: int) -> None:
        self.cta, self.index = cta, index
        self.clock = Clock(cta.agents)
        self.clock.tick(index)
        members = range(LANES * index, LANES * (index + 1))
        super().__init__(cta.launch, np.array([cta.number]), members, WarpShared(self))
        self.place: int | Array = 0
        self.waiting: Wait | None = None
        self.leader = cta.chooser.draw(list(range(LANES)))
        self.held = self.program.kernel.register_limit
        self.stores = BulkStores()
        self.begun = 0
        self.latest: Product | None = None

    @property
    def ended(self) -> bool:
        """Whether it has come to the end."""
        return self.waiting is None and isinstance(self.place, int) and self.place == ENDED

    @property
    def ready(self) -> bool:
        """Whether it can go on."""
        return not self.ended and (self.waiting is None or self.waiting.ready())

    def step(self) -> None:
        """Go on by a block."""
        if self.waiting is not None:
            leave, self.waiting = self.waiting.leave, None
            leave()
        if self.ended:
            return
        place = self.advance(self.place)
        if not isinstance(place, int) and (place == place[0, 0]).all():
            place = int(place[0, 0])
        self.place = place

    def wait(self, wait: Wait) -> None:
        """Go on no sooner than something has come."""
        self.waiting = wait

    def report(self, i: Instruction, what: str) -> None:
        """Note a fault of an instruction."""
        self.launch.report(i, what)

    # Its products.

    def announce(self, product: Product) -> None:
        """A product begins, which must be the same in all four warps of the warpgroup."""
        i = product.instruction
        tiles = [int(tile.descriptors[0, 0]) for tile in product.tiles]
        self.begun, self.latest = self.begun + 1, product
        same = self.cta.products.setdefault((self.index // 4, self.begun), (i.line, tiles))
        if same != (i.line, tiles):
            where = f"line {same[0]} with descriptors {same[1]}"
            self.report(i, f"product: another warp of the warpgroup is at {where}, not {tiles}")

    @property
    def next_product(self) -> Product | None:
        """The product that tensor cores come to next."""
        return next((product for product in self.products.running() if not product.done), None)

    def multiply(self) -> None:
        """Have the next product carried out."""
        product = self.next_product
        assert product is not None
        carry_out(self, product)

    # Barriers.

    def barrier(self, i: Instruction, active: Array | None) -> None:
        """All threads of the CTA wait for each other."""
        self.barrier_of_some(i, active, [0])

    def barrier_of_some(self, i: Instruction, active: Array | None, operands: list[int]) -> None:
        """Come to the barrier of a number, with so many threads as are given, or all."""
        if not self.lanes(active).all():
            raise not_here(i, "a barrier that some threads of a warp do not come to")
        threads = operands[1] if len(operands) > 1 else self.program.kernel.threads
        barrier = self.cta.barrier_number(operands[0])
        turn = barrier.arrive(self, i, threads)
        if "arrive" not in i.modifiers:
            self.wait(
                Wait(
                    i,
                    lambda: barrier.turn > turn,
                    barrier.describe,
                    lambda: self.clock.join(barrier.opened[turn]),
                )
            )

    # Threads that act for all.

    def lanes(self, active: Array | None) -> Array:
        """Which of the 32 threads take part."""
        return np.ones(LANES, bool) if active is None else self.spread(active)[0]

    def agreed(self, i: Instruction, values: Array, lanes: Array) -> int:
        """What the threads that take part have in common."""
        chosen = self.spread(values)[0, lanes]
        if (chosen != chosen[0]).any():
            raise not_here(i, "the threads of a warp do not agree")
        return int(chosen[0])


def once(t: Translator, i: Instruction, act: Callable[..., None], *reads: Read) -> Step:
    """A step by which a warp acts for those of its threads that execute an instruction, if any.

    `act` gets the warp, how many threads take part, and the operands, on which they must agree.
    """
    active = t.active(i)

    def step(warp: Warp) -> None:
        lanes = warp.lanes(active(warp))
        if lanes.any():
            operands = (warp.agreed(i, read(warp), lanes) for read in reads)
            act(warp, int(lanes.sum()), *operands)

    return cast(Step, step)


class BulkStore(NamedTuple):
    """A bulk store, and what happens when it ends."""

    instruction: Instruction
    end: Callable[[], None]


class BulkStores:
    """Bulk stores under way.

    Attributes:
        begun: How many there have been.
        groups: Those to be waited for together, oldest first.
        current: Those not in a group yet.
    """

    def __init__(self) -> None:
        self.begun = 0
        self.groups: list[list[BulkStore]] = []
        self.current: list[BulkStore] = []

    def commit(self) -> None:
        """The stores started since the last time become a group to wait for."""
        self.groups.append(self.current)
        self.current = []

    def wait(self, pending: int) -> None:
        """Carry out all groups but the last few."""
        while len(self.groups) > pending:
            for store in self.groups.pop(0):
                store.end()


class WarpShared(SharedMemory):
    """The shared memory of a CTA as one of its warps sees it, held against what others do."""

    def __init__(self, warp: Warp) -> None:
        cta = warp.cta
        self.size, self.granule, self.report = cta.size, cta.granule, cta.launch.report
        self.stride, self.bytes = cta.stride, cta.bytes
        self.cta, self.warp, self.clock, self.agents = cta, warp.index, warp.clock, cta.agents
        self._copies = self._products = 0

    def fence(self) -> None:
        """What was written becomes visible to what reads asynchronously."""
        self.clock.fence()
        self.clock.tick(self.warp)

    def read(self, what: Accesses | Span) -> None:
        """The warp reads."""
        span = self._span(what)
        now = int(self.clock.seen[self.warp])
        self.cta.history.read(span.instruction, span.granules, self.clock, self.warp, now)

    def write(self, span: Span, changed: Array) -> None:
        """The warp writes."""
        self.cta.forget_mbarriers(span.instruction, span.granules)
        now = int(self.clock.seen[self.warp])
        self.cta.history.write(
            span.instruction, span.granules, self.clock, self.warp, now,
            ordinary=True, changed=changed,
        )  # fmt: skip

    def expect(self, accesses: Accesses) -> None:
        """A copy sets out."""
        span = self._span(accesses)
        self._copies += 1
        self.cta.forget_mbarriers(span.instruction, span.granules)
        self.cta.history.write(
            span.instruction, span.granules, self.clock, self.agents.copies_of(self.warp),
            self._copies, ordinary=True,
        )  # fmt: skip

    def deliver(self, accesses: Accesses, values: Array) -> None:
        """The copy that set out first has arrived."""
        self.clock.tick(self.agents.copies_of(self.warp))
        values = np.ascontiguousarray(values)
        at = self._bytes(accesses)[:, None] + np.arange(accesses.nbytes)
        self.bytes.reshape(-1)[at] = values.view(np.uint8).reshape(at.shape)

    def begin_product(self, span: Span) -> None:
        """A product begins to read."""
        self._products += 1
        self.cta.history.read(
            span.instruction, span.granules, self.clock, self.agents.products_of(self.warp),
            self._products, asynchronous=True,
        )  # fmt: skip

    def end_product(self, span: Span) -> None:
        """The product that began first has been waited for."""
        self.clock.tick(self.agents.products_of(self.warp))
