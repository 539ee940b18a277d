"""`python -m fastattn demo`: train a small language model with fastattn, beside plain PyTorch."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..demo import DemoError
from ..demo.data import Corpus, gather_corpus
from ..demo.experts import describe_load
from ..demo.model import FAMILIES
from ..demo.plan import Part, choose_parts
from ..demo.process import explain, run_in_process
from ..demo.report import (
    device_name,
    largest_loss_difference,
    loss_plot,
    results_json,
    results_table,
    shown,
    store_results,
)
from ..demo.training import Event, Job, RunRecord
from ..ops.core.backends import HAS_TRITON
from .info import versions

if TYPE_CHECKING:
    from rich.console import Console

BAD_USE = 2
INTERRUPTED = 130

SIZES = {
    "steps": "training steps",
    "width": "width of the model",
    "layers": "number of layers",
    "heads": "number of attention heads (default: one for every 64 of the width)",
    "context": "bytes of text that the model sees at once",
    "batch": "texts in a batch",
}

EPILOG = """
On a CPU there are two parts: a small model on interpreted kernels (evidence) and a larger one on
the reference backend (use). Sizes and --dtype are for the larger one, or for the small one with
--part evidence. Exit codes: 0 done; 2 bad arguments, text, disk or memory; 130 ended by Ctrl-C,
with what there was stored.
"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit code: 0, BAD_USE or INTERRUPTED, see EPILOG."""
    try:
        arguments = parse_arguments(argv)
        check_extra_packages()
        return run(arguments)
    except DemoError as error:
        print(f"fastattn demo: error: {error}", file=sys.stderr)
        return BAD_USE
    except KeyboardInterrupt:
        print("fastattn demo: interrupted before there was a result", file=sys.stderr)
        return INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise DemoError(f"{message} (--help lists all arguments)")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parse the command line; sizes that are not given are None."""
    what = "Train a small language model with fastattn, beside plain PyTorch."
    parser = _Parser("python -m fastattn demo", description=what, epilog=EPILOG)
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="text to train on (default: Python's own standard library)",
    )
    for name, meaning in SIZES.items():
        add(f"--{name}", type=whole_number(1), metavar="N", help=meaning)
    add(
        "--model",
        choices=tuple(FAMILIES),
        default="llama",
        help="what is trained (default: llama); bert learns masked bytes, t5 spans cut out, and of "
        "mixtral the experts' load is shown",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of the products")
    add("--part", choices=("evidence", "use"), help="only this part (on a CPU)")
    add("--seed", type=whole_number(0), default=0, metavar="N", help="default: 0")
    add(
        "--out",
        type=Path,
        default=Path("demo-results"),
        metavar="FOLDER",
        help="where results are stored (default: demo-results)",
    )
    return parser.parse_args(argv)


def whole_number(first: int) -> Callable[[str], int]:
    """Reads a number that is not smaller than the first."""

    def parse(text: str) -> int:
        if text.isdecimal() and first <= int(text) < 2**63:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {first} up to 2^63 - 1")

    return parse


def check_extra_packages() -> None:
    """Say what to install where the packages are missing that the library does without."""
    needed = ("rich", "matplotlib", "safetensors")
    missing = ", ".join(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        raise DemoError(f'not installed: {missing}; the demo needs pip install "fastattn[demo]"')


def run(arguments: argparse.Namespace) -> int:
    """Run one part after the other, each stored and shown as soon as it is done."""
    given = {name: getattr(arguments, name) for name in (*SIZES, "dtype")}
    sizes = {name: value for name, value in given.items() if value is not None}
    try:
        parts = choose_parts(arguments.device, arguments.part, sizes, arguments.model)
        arguments.out.mkdir(parents=True, exist_ok=True)
        # Within the folder of the results, so that finished files are moved and not copied.
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=arguments.out) as folder:
            scratch = Path(folder)
            shortest = max(part.sizes.context for part in parts) + 1
            corpus = gather_corpus(arguments.data, scratch / "corpus", shortest_split=shortest)
            console = introduce(parts[0], corpus)
            interrupted = any(
                run_part(part, corpus, arguments, scratch / part.name, console) for part in parts
            )
    except OSError as error:
        raise DemoError(f"{explain(error)}; earlier results are kept") from error
    return INTERRUPTED if interrupted else 0


def introduce(part: Part, corpus: Corpus) -> Console:
    """Print what is trained on what, and return where to print on."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    size = (corpus.train_bytes + corpus.validation_bytes) / 1e6
    device = device_name(part.device)
    console.print(f"{corpus.source}, {corpus.files:,} files, {size:.1f} MB, on a {device}")
    console.print(
        f"{FAMILIES[part.sizes.family]} of fastattn.models; "
        "the embedding and the optimizer are PyTorch's in every run"
    )
    if not HAS_TRITON:
        console.print("Triton is not installed here, so no part runs the kernels.")
    return console


def run_part(
    part: Part, corpus: Corpus, arguments: argparse.Namespace, staging: Path, console: Console
) -> bool:
    """Do the runs of a part, show and store what they found, and say whether Ctrl-C ended it."""
    staging.mkdir()
    console.print()
    console.rule(part.title, align="left")
    console.print(part.statement)
    runs: list[RunRecord] = []
    for variant in part.variants:
        checkpoint = str(staging / f"{part.name}-model")
        runs.append(watch_run(part.job(variant, corpus, arguments.seed, checkpoint), console))
        if runs[-1].interrupted or runs[-1].failure:
            break
    last = runs[-1]
    trained = any(run.steps for run in runs)
    if trained:
        console.print(results_table(runs), soft_wrap=False)
        line = f"{last.parameters:,} parameters"
        if found := largest_loss_difference(runs):
            line += f"; largest loss difference {found['value']:.1e}, at step {found['step']}"
        console.print(line)
        if last.expert_loads:
            console.print(describe_load(last.expert_loads[-1]))
        if last.sample:
            console.print(last.sample, style="cyan")
    if last.failure is not None:
        raise DemoError(f"{last.failure}; earlier results are kept")
    if trained:
        asked = {"part": part.name, "statement": part.statement, "versions": dict(versions())}
        asked["arguments"] = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(arguments).items()
        }
        contents = {"json": results_json(runs, **asked), "png": loss_plot(part.title, runs)}
        if last.sample:
            contents["txt"] = last.sample.encode()
        files = {f"{part.name}.{kind}": content for kind, content in contents.items()}
        names = store_results(arguments.out, staging, files)
        console.print(f"Stored in {arguments.out}: {', '.join(names)}")
    if last.interrupted:
        console.print("Ended by Ctrl-C.")
    return last.interrupted


def watch_run(job: Job, console: Console) -> RunRecord:
    """Do one run behind a live progress bar, or with its validation losses if nobody watches."""
    from rich.progress import Progress

    name = job.computed_by
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=job.sizes.steps)

        def watch(record: RunRecord, event: Event) -> None:
            speed = shown(",.0f", record.tokens_per_second)
            now = f"{name}: loss {shown('.3f', *record.losses[-1:])}, {speed} tokens/s"
            progress.update(task, completed=len(record.steps), description=now)
            if "validations" in event and not console.is_terminal:
                head = f"{name}, validation loss" if len(record.validations) == 1 else ","
                found = event["validations"]
                console.print(f"{head} {found['loss']:.3f} at step {found['step']}", end="")

        record = run_in_process(job, watch)
    if record.validations and not console.is_terminal:
        console.print()
    return record
