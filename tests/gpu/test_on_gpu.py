"""What only a GPU can show: races, captured graphs, waiting, streams, tensors past 2^31 elements.

Each property is a function of a device and of sizes. The tests marked `kernels` run those that can
run anywhere at small sizes, and show that they see what they are there to see.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from bench.inputs import (
    Arguments,
    incoming_like,
    outputs_of,
    random_arguments,
    results_of,
    seeded,
    tensors_of,
)
from bench.op import Op, Shape, shape_name
from bench.registry import OPS
from fastattn.checking import check_sample
from fastattn.ops.core.catalog import OPERATIONS, Sample, make_seed
from support import DEVICE, same_bits

REPEATS = 200

TIMED = [op for op in OPS if op.benchmark is not None]
EVERY_OP = [pytest.param(op, id=op.name) for op in TIMED]
RANDOM_OPS = [pytest.param(op, id=op.name) for op in TIMED if op.timing.random]


def by_rows(op: Op) -> bool:
    """Whether an op treats each row of two-dimensional tensors alike, wherever it stands.

    Dropout does not: its numbers depend on the place.
    """
    arguments = random_arguments(op, op.small, torch.float32, torch.device("cpu"))
    if op.timing.random and "dropout_p" not in arguments:
        return False
    rows, *rest = op.small
    return len(rest) == 1 and all(
        output.dim() == 2 and output.shape[0] == rows
        for output in outputs_of(op.reference, arguments)
    )


ROW_OPS = [pytest.param(op, id=op.name) for op in TIMED if by_rows(op)]


def at_shapes(shapes: Callable[[Op], Iterable[Shape]]) -> list[Any]:
    """(op, shape) parameters."""
    return [
        pytest.param(op, shape, id=f"{op.name}-{shape_name(shape)}")
        for op in TIMED
        for shape in dict.fromkeys(shapes(op))
    ]


MIDDLE = at_shapes(lambda op: op.timing.small_sizes)


class Call:
    """An op on fixed inputs: calling it runs forward and backward."""

    def __init__(
        self, op: Op, shape: Shape, device: Any, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        device = torch.device(device)
        self.op = op
        self.arguments = random_arguments(op, shape, dtype, device)
        with torch.no_grad():
            self.incoming = incoming_like(outputs_of(op.call, self.arguments))

    @classmethod
    def with_seed(cls, op: Op, shape: Shape, device: Any) -> "Call":
        """Random ops draw the same numbers in every call."""
        call = cls(op, shape, device)
        call.arguments = seeded(op, call.arguments)
        return call

    def __call__(self) -> dict[str, torch.Tensor]:
        return results_of(self.op.call, self.arguments, self.incoming)

    def renew(self) -> None:
        """Write new numbers over all inputs, where they are."""
        with torch.no_grad():
            for tensor in (*tensors_of(self.arguments), *self.incoming):
                tensor.normal_()
            if "seed" in self.arguments:
                self.arguments["seed"].random_(2**62)


def assert_same_results(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str = ""
) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert same_bits(found[name], expected[name]), f"{name} {what}"
        assert not expected[name].isnan().any(), f"{name} {what}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


# Races


def differing_repeats(
    run: Callable[[], dict[str, torch.Tensor]],
    repeats: int,
    load: Callable[[], Any] = lambda: None,
) -> int:
    """How often a run's results differ from the first in any bit; waits only at the end."""
    expected = {name: bits(value) for name, value in run().items()}
    differing: Any = 0
    for _ in range(repeats):
        load()
        for name, value in run().items():
            differing = differing + (bits(value) != expected[name]).any().long()
    return int(differing)


class Load:
    """Products of changing size on another stream, so that programs never meet alike."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.factors = itertools.cycle(
            [torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for n in (512, 1536, 3072)]
        )

    def __call__(self) -> None:
        factor = next(self.factors)
        with torch.cuda.stream(self.stream):
            torch.mm(factor, factor)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "shape"), at_shapes(lambda op: [*op.quick_shapes, *op.timing.sizes])
)
def test_no_races_under_load(op, shape):
    torch.cuda.empty_cache()
    load = Load()
    torch.cuda.synchronize()
    assert differing_repeats(Call.with_seed(op, shape, "cuda"), REPEATS, load) == 0
    torch.cuda.synchronize()


@pytest.mark.kernels
@pytest.mark.parametrize("op", EVERY_OP)
def test_repeats_of_an_op_do_not_differ(op):
    # The interpreter has one order of everything.
    repeats = 3 if DEVICE == "cuda" else 1
    assert differing_repeats(Call.with_seed(op, op.small, DEVICE), repeats) == 0


@pytest.mark.kernels
def test_differing_repeats_are_seen():
    number = itertools.count()
    run = lambda: {"x": torch.tensor([0.0, float(next(number) == 2)], device=DEVICE)}  # noqa: E731
    assert differing_repeats(run, 5) == 1


# Real sizes against the accuracy rule


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "shape"), at_shapes(lambda op: op.shapes))
def test_real_widths_obey_the_accuracy_rule(op, shape, dtype):
    # The float64 truth comes from the CPU; two million elements take it a moment.
    first = max(3, 2**21 // math.prod(shape[1:]))
    arguments = op.arguments(min(first, shape[0]), *shape[1:])
    if op.timing.random:
        arguments["seed"] = make_seed(11)
    operation = OPERATIONS[op.call.__name__]
    for comparison in check_sample(operation, Sample(op.name, **arguments), dtype, "cuda"):
        assert comparison.passed, comparison


# Captured graphs


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a run after the warm-up on a side stream that capturing wants."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "shape"), MIDDLE)
def test_a_captured_forward_and_backward_replays_on_new_numbers(op, shape):
    call = Call.with_seed(op, shape, "cuda")
    graph, results = captured(call)
    for replay in range(3):
        call.renew()
        graph.replay()
        assert_same_results(results, call(), f"in replay {replay}")


@pytest.mark.gpu
@pytest.mark.parametrize("op", RANDOM_OPS)
def test_each_replay_draws_new_random_numbers(op):
    call = Call(op, op.timing.small_sizes[0], "cuda")
    graph, results = captured(call)

    def replayed() -> torch.Tensor:
        graph.replay()
        return results["dx"].clone()

    draws = [replayed() for _ in range(4)]
    for first, second in itertools.combinations(draws, 2):
        assert not same_bits(first, second)
    torch.manual_seed(5)
    first = replayed()
    torch.manual_seed(5)
    assert same_bits(first, replayed())


@pytest.mark.gpu
@pytest.mark.parametrize("op", RANDOM_OPS)
def test_a_replay_that_draws_its_seed_gives_the_numbers_of_that_seed(op):
    call = Call(op, op.timing.small_sizes[0], "cuda")
    plain = dict(call.arguments)

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        seed = torch.randint(2**62, (1,), device="cuda")
        call.arguments = plain | {"seed": seed}
        return seed, call()

    graph, (seed, results) = captured(run)
    seeds = set()
    for replay in range(3):
        graph.replay()
        seeds.add(seed.item())
        call.arguments = plain | {"seed": seed.clone()}
        assert_same_results(results, call(), f"in replay {replay}")
    assert len(seeds) == 3


# Waiting, streams, devices


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "shape"), MIDDLE)
def test_nothing_waits_for_the_gpu(op, shape):
    call = Call(op, shape, "cuda")
    call()
    value = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            value.item()
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("op", EVERY_OP)
def test_kernels_run_on_the_current_stream(op):
    call = Call.with_seed(op, op.timing.small_sizes[0], "cuda")
    call()
    new = [torch.randn_like(tensor) for tensor in (*tensors_of(call.arguments), *call.incoming)]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # A kernel on another stream would be done before the new numbers are there.
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for tensor, numbers in zip(
                (*tensors_of(call.arguments), *call.incoming), new, strict=True
            ):
                tensor.copy_(numbers)
        found = call()
    torch.cuda.synchronize()
    assert_same_results(found, call())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", EVERY_OP)
def test_tensors_of_another_gpu_than_the_current_one(op):
    here = Call.with_seed(op, op.timing.small_sizes[0], "cuda:0")
    there = Call.with_seed(op, op.timing.small_sizes[0], "cuda:1")
    with torch.no_grad():
        for target, source in zip(
            (*tensors_of(there.arguments), *there.incoming),
            (*tensors_of(here.arguments), *here.incoming),
            strict=True,
        ):
            target.copy_(source)
    moved = {name: value.to("cuda:0") for name, value in there().items()}
    expected = here()
    for name, value in expected.items():
        # Sums over all rows depend on the number of multiprocessors.
        if value.dim() > 1:
            assert same_bits(moved[name], value), name


# Tensors past 2^31 elements


def check_long_tensors(op: Op, rows: int, cols: int, device: Any, chunk: int) -> None:
    """The last rows get the bits that they get alone; sums over all rows are those of the chunks.

    Without dropout, whose numbers depend on where a row stands.
    """
    call = Call(op, (rows, cols), device)
    if op.timing.random:
        call.arguments["dropout_p"] = 0.0
    results = call()
    tail = slice(rows - 64, rows)
    alone = results_of(
        op.call, slice_rows(call.arguments, rows, tail), [g[tail] for g in call.incoming]
    )
    sums: dict[str, torch.Tensor] = {}
    for name, value in results.items():
        if value.shape[0] == rows:
            assert same_bits(value[tail], alone[name]), name
        else:
            sums[name] = torch.zeros_like(value, dtype=torch.float32)
    if not sums:
        return
    for first in range(0, rows, chunk):
        part = slice(first, min(first + chunk, rows))
        partial = results_of(
            op.call, slice_rows(call.arguments, rows, part), [g[part] for g in call.incoming]
        )
        for name, total in sums.items():
            total += partial[name]
    for name, total in sums.items():
        error = (results[name].float() - total).square().mean().sqrt()
        assert error <= 2.0**-7 * total.square().mean().sqrt(), name


def slice_rows(arguments: Arguments, rows: int, part: slice) -> Arguments:
    """The arguments for some of the rows alone."""

    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[0] == rows:
            return value.detach()[part].requires_grad_()
        return value

    return {name: cut(value) for name, value in arguments.items()}


def check_long_dropout(rows: int, cols: int, device: Any) -> None:
    """Every element is zero or scaled, forward and backward alike, and far rows differ."""
    import fastattn

    x = torch.ones(rows, cols, device=device, dtype=torch.float16, requires_grad=True)
    y = fastattn.dropout(x, 0.5, seed=torch.tensor([9], device=device))
    (dx,) = torch.autograd.grad(y, x, x.detach())
    for first in range(0, rows, max(1, rows // 8)):
        kept = y[first : first + rows // 8].detach() == 2.0
        dropped = y[first : first + rows // 8].detach() == 0.0
        assert (kept | dropped).all()
        assert abs(kept.float().mean().item() - 0.5) < 0.02
    assert torch.equal(y.detach(), dx)
    ends = [y.detach()[:64], y.detach()[rows // 2 : rows // 2 + 64], y.detach()[-64:]]
    for first, second in itertools.combinations(ends, 2):
        assert not torch.equal(first, second)


def skip_without_memory(needed: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory, has {free / 2**30:.0f}")


@pytest.mark.gpu
@pytest.mark.parametrize("cols", [64, 4096, 65536])
@pytest.mark.parametrize("op", ROW_OPS)
def test_tensors_past_2_to_the_31(op, cols):
    rows = 2**31 // cols + 67
    skip_without_memory(12 * 2 * rows * cols)
    check_long_tensors(op, rows, cols, "cuda", chunk=2**28 // cols)


@pytest.mark.gpu
@pytest.mark.parametrize("cols", [64, 4096, 65536])
def test_dropout_past_2_to_the_31(cols):
    rows = 2**31 // cols + 67
    skip_without_memory(8 * 2 * rows * cols)
    check_long_dropout(rows, cols, "cuda")


@pytest.mark.kernels
@pytest.mark.parametrize("op", ROW_OPS)
def test_the_check_of_long_tensors_on_short_ones(op):
    check_long_tensors(op, 100, 48, DEVICE, chunk=30)


@pytest.mark.kernels
def test_the_check_of_long_dropout_on_short_tensors():
    check_long_dropout(800, 64, DEVICE)
