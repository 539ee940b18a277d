"""What the demo shows and leaves behind: a table, a plot, and files with every step."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fastattn

from .training import RunRecord

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LossDifference:
    """The largest difference between the losses of two runs, and the step at which it was."""

    value: float
    step: int
    compared_steps: int


def largest_loss_difference(runs: Sequence[RunRecord]) -> LossDifference | None:
    """Compare two runs step by step, as far as both went; None if there is nothing to compare."""
    if len(runs) != 2:
        return None
    pairs = zip(runs[0].losses, runs[1].losses, strict=False)
    differences = [abs(first - second) for first, second in pairs]
    if not differences:
        return None
    worst = max(range(len(differences)), key=differences.__getitem__)
    return LossDifference(differences[worst], worst + 1, len(differences))


def results_table(title: str, runs: Sequence[RunRecord]) -> Table:
    """One column a run, one row a result."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for run in runs:
        table.add_column(column_name(run), justify="right")
    table.add_row("training steps", *(f"{len(run.steps)} of {run.job.steps}" for run in runs))
    table.add_row("parameters", *(f"{run.parameters:,}" if run.parameters else "-" for run in runs))
    table.add_row("first training loss", *(_loss(run.losses[:1]) for run in runs))
    table.add_row("final training loss", *(_loss(run.losses[-1:]) for run in runs))
    table.add_row("final validation loss", *(_loss(_validation_losses(run)[-1:]) for run in runs))
    table.add_row("tokens/s", *(_speed(run) for run in runs))
    of_what = "tensors" if runs[0].job.device.startswith("cuda") else "process"
    table.add_row(f"peak memory of the {of_what}", *(_memory(run) for run in runs))
    difference = largest_loss_difference(runs)
    if difference is not None:
        table.add_section()
        where = f"at step {difference.step} of {difference.compared_steps}"
        table.add_row("largest loss difference", f"{difference.value:.1e}", where)
    return table


def column_name(run: RunRecord) -> str:
    """Name a run by what executed its exchangeable pieces."""
    if run.job.variant == "plain":
        return "plain PyTorch" if run.job.sizes.family == "llama" else "PyTorch (reference)"
    if run.job.interpret:
        return "fastattn (interpreted)"
    if run.job.backend == "reference":
        return "fastattn (reference)"
    return "fastattn (compiled)"


def _validation_losses(run: RunRecord) -> list[float]:
    return [validation["loss"] for validation in run.validations]


def _loss(losses: list[float]) -> str:
    return f"{losses[0]:.4f}" if losses else "-"


def _speed(run: RunRecord) -> str:
    return f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "-"


def _memory(run: RunRecord) -> str:
    return f"{run.peak_memory_bytes / 2**20:,.0f} MiB" if run.peak_memory_bytes else "-"


def results_json(part: str, statement: str, runs: Sequence[RunRecord], arguments: Any) -> bytes:
    """Everything about a part: versions, device, arguments and every step of every run."""
    difference = largest_loss_difference(runs)
    content = {
        "part": part,
        "statement": statement,
        "versions": versions(),
        "device": device_name(runs[0].job.device),
        "cpu_threads": runs[0].job.threads or torch.get_num_threads(),
        "arguments": arguments,
        "model": f"fastattn.models.{runs[0].job.sizes.family}",
        "largest_loss_difference": difference and asdict(difference),
        "runs": {
            run.job.variant: {**asdict(run), "tokens_per_second": run.tokens_per_second}
            for run in runs
        },
    }
    return json.dumps(content, indent=1).encode()


def versions() -> dict[str, str | None]:
    """The versions that the numbers depend on."""
    try:
        import triton

        triton_version = triton.__version__
    except ModuleNotFoundError:
        triton_version = None
    return {
        "fastattn": fastattn.__version__,
        "torch": str(torch.__version__),
        "triton": triton_version,
        "python": platform.python_version(),
    }


def device_name(device: str) -> str:
    """The name of the GPU, or the kind of processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.system()} {platform.machine()} CPU"


def loss_plot(title: str, runs: Sequence[RunRecord]) -> bytes:
    """Plot the training loss of all runs over each other, as PNG.

    Two runs get a second panel with the difference of their losses, because curves that agree
    cover each other; a single run gets its validation loss beside its training loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6 if len(runs) == 2 else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    if len(runs) == 2:
        losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        pairs = zip(runs[0].losses, runs[1].losses, strict=False)
        distance = [abs(first - second) for first, second in pairs]
        differences.plot(range(1, len(distance) + 1), distance, color="tab:red", linewidth=1.2)
        differences.set(xlabel="step", ylabel="|difference|")
        differences.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        differences.set_ylim(bottom=0)
        differences.grid(alpha=0.3)
    else:
        losses = figure.subplots()
        losses.set(xlabel="step")

    # The first run is a broad pale line, so that the second stays visible on top of it.
    styles = [
        {"color": "tab:blue", "linewidth": 5, "alpha": 0.35},
        {"color": "black", "linewidth": 1.3, "linestyle": "--"},
    ]
    if len(runs) == 1:
        styles = [{"color": "tab:blue", "linewidth": 0.8, "alpha": 0.7}]
    for run, style in zip(runs, styles, strict=True):
        label = f"{column_name(run)}, training"
        losses.plot(range(1, len(run.losses) + 1), run.losses, label=label, **style)
    if len(runs) == 1:
        steps = [validation["step"] for validation in runs[0].validations]
        values = _validation_losses(runs[0])
        losses.plot(steps, values, "o-", color="tab:orange", label="validation")
    losses.set(ylabel="loss (nats per byte)", title=title)
    losses.grid(alpha=0.3)
    losses.legend()

    image = BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def store_results(folder: Path, staging: Path, contents: dict[str, bytes]) -> list[str]:
    """Write files and move them, with all else in `staging`, into `folder`; return their names.

    Nothing in `folder` is touched before everything new is written, so a disk that fills up
    leaves earlier results as they were. `staging` must be on the same disk.
    """
    for name, content in contents.items():
        (staging / name).write_bytes(content)
    files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    for file in files:
        (folder / file.parent).mkdir(exist_ok=True)
        os.replace(staging / file, folder / file)
    return [str(file) for file in files]
