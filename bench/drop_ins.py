"""What torch.nn's modules take on a CPU, and what ours take that stand in their place.

No kernels run there, and a user who changes an import shall not pay for it: evaluation, with and
without padding, and a training step, from inputs that are all overhead to those that are all work.
Both modules have the same parameters and run in turns, in pairs of one after the other; the ratio
is the median over the pairs. One thread, so that nothing waits for another.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastattn.nn

from .compiled.report import print_table
from .environment import describe

CPU = torch.device("cpu")

Shape = tuple[int, int, int]
Run = Callable[[nn.Module], Any]

# Batch, length and width.
SHAPES: tuple[Shape, ...] = ((1, 8, 32), (2, 16, 64), (4, 64, 128), (8, 64, 256))

HEAD_DIM = 16
PADDING = 3


@dataclass(frozen=True)
class Ratio:
    """One module at one shape: the microseconds of a call of each, and ours by torch's."""

    module: str
    mode: str
    shape: Shape
    torch_microseconds: float
    fastattn_microseconds: float
    ratio: float


def blocks(shape: Shape) -> Iterator[tuple[str, Callable[[Any], nn.Module], dict[str, Run]]]:
    """Each block: its name, how a library makes it, and what is run of it, by mode."""
    batch, length, width = shape
    heads, wide = max(1, width // HEAD_DIM), 4 * width
    x = torch.randn(shape, requires_grad=True)
    memory = torch.randn(batch, length + 3, width)
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, -PADDING:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(length)

    def modes(runs: dict[str, Run]) -> dict[str, Run]:
        evaluation = {f"evaluation{name}": without_gradients(run) for name, run in runs.items()}
        return evaluation | {f"training{name}": training_step(run) for name, run in runs.items()}

    yield (
        "MultiheadAttention",
        lambda library: library.MultiheadAttention(width, heads, batch_first=True),
        modes(
            {
                "": lambda m: m(x, x, x, need_weights=False)[0],
                ", padded": lambda m: m(x, x, x, padding, need_weights=False)[0],
                ", causal": lambda m: m(x, x, x, None, False, causal)[0],
                ", cross": lambda m: m(x, memory, memory, need_weights=False)[0],
                ", weights": lambda m: m(x, x, x)[0],
            }
        ),
    )
    yield (
        "TransformerEncoderLayer",
        lambda library: library.TransformerEncoderLayer(width, heads, wide, batch_first=True),
        modes({"": lambda m: m(x), ", padded": lambda m: m(x, src_key_padding_mask=padding)}),
    )
    yield (
        "TransformerEncoder of 2 layers",
        lambda library: library.TransformerEncoder(
            library.TransformerEncoderLayer(width, heads, wide, batch_first=True), 2
        ),
        modes({"": lambda m: m(x), ", padded": lambda m: m(x, src_key_padding_mask=padding)}),
    )
    yield (
        "TransformerDecoderLayer, causal",
        lambda library: library.TransformerDecoderLayer(width, heads, wide, batch_first=True),
        modes({"": lambda m: m(x, memory, causal, tgt_is_causal=True)}),
    )


def parts(shape: Shape) -> Iterator[tuple[str, Callable[[Any], nn.Module], dict[str, Run]]]:
    """The same of the modules that blocks are made of."""
    *leading, width = shape
    x = torch.randn(shape, requires_grad=True)
    target = torch.randint(0, width, tuple(leading))

    def modes(run: Run) -> dict[str, Run]:
        return {"evaluation": without_gradients(run), "training": training_step(run)}

    made: dict[str, Callable[[Any], nn.Module]] = {
        "LayerNorm": lambda library: library.LayerNorm(width),
        "RMSNorm": lambda library: library.RMSNorm(width),
        "Linear": lambda library: library.Linear(width, width),
        "Dropout": lambda library: library.Dropout(0.1),
        "Softmax": lambda library: library.Softmax(-1),
    }
    for name, make in made.items():
        yield name, make, modes(lambda m: m(x))
    yield (
        "CrossEntropyLoss",
        lambda library: library.CrossEntropyLoss(),
        modes(lambda m: m(x.flatten(0, 1), target.flatten())),
    )


def without_gradients(run: Run) -> Run:
    """The run in evaluation, where torch may fuse a layer."""

    def evaluate(module: nn.Module) -> Any:
        with torch.no_grad():
            return run(module)

    return evaluate


def training_step(run: Run) -> Run:
    """The run and its backward pass."""
    return lambda module: run(module).sum().backward()


def time_pair(run: Run, theirs: nn.Module, ours: nn.Module, pairs: int, seconds: float) -> Any:
    """Microseconds of torch's and ours, and the median of the pairs' ratios."""
    for module in (theirs, ours, theirs, ours):
        run(module)
    calls = max(1, int(seconds / _time(run, theirs, 1)))
    measured: list[tuple[float, float]] = []
    gc.collect()
    gc.disable()
    try:
        for turn in range(pairs):
            order = (theirs, ours) if turn % 2 else (ours, theirs)
            first, second = (_time(run, module, calls) for module in order)
            measured.append((first, second) if turn % 2 else (second, first))
    finally:
        gc.enable()
    microseconds = [1e6 * statistics.median(column) for column in zip(*measured, strict=True)]
    return *microseconds, statistics.median(ours / theirs for theirs, ours in measured)


def _time(run: Run, module: nn.Module, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run(module)
    return (time.perf_counter() - start) / calls


def measure(shapes: Sequence[Shape], pairs: int, seconds: float) -> Iterator[Ratio]:
    """Time everything."""
    for shape in shapes:
        torch.manual_seed(0)
        for name, make, modes in (*blocks(shape), *parts(shape)):
            theirs, ours = make(nn), make(fastattn.nn)
            ours.load_state_dict(theirs.state_dict())
            for mode, run in modes.items():
                for module in (theirs, ours):
                    module.train(mode.startswith("training"))
                yield Ratio(name, mode, shape, *time_pair(run, theirs, ours, pairs, seconds))


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.drop_ins", description=__doc__)
    parser.add_argument("--pairs", type=int, default=40, help="how often each pair is timed")
    parser.add_argument("--seconds", type=float, default=0.005, help="how long each time, at least")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only so many, from small")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ratios = list(measure(SHAPES[: options.shapes], options.pairs, options.seconds))
    print_table(
        "microseconds a call on a CPU",
        ("shape", "module", "mode", "torch", "fastattn", "ratio"),
        [
            (
                "x".join(map(str, ratio.shape)),
                ratio.module,
                ratio.mode,
                f"{ratio.torch_microseconds:.1f}",
                f"{ratio.fastattn_microseconds:.1f}",
                f"{ratio.ratio:.3f}",
            )
            for ratio in ratios
        ],
    )
    if options.json:
        document = describe(CPU) | {
            "when": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
            "ratios": [asdict(ratio) for ratio in ratios],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
