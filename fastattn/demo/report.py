"""What the demo shows and leaves behind: a table, a plot, and files with every step."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .training import RunRecord

if TYPE_CHECKING:
    from rich.table import Table

# The first run is a broad pale line, so that the second stays visible on top of it.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "tab:blue", "linewidth": 5, "alpha": 0.35},
    {"color": "black", "linewidth": 1.3, "linestyle": "--"},
)


def loss_differences(runs: Sequence[RunRecord]) -> list[float]:
    """How far the losses of two runs are apart at each step that both did; none for one run."""
    pairs = zip(runs[0].losses, runs[-1].losses, strict=False) if len(runs) == 2 else ()
    return [abs(first - second) for first, second in pairs]


def largest_loss_difference(runs: Sequence[RunRecord]) -> dict[str, Any] | None:
    """The largest difference, and at which step it was; None if there is nothing to compare."""
    differences = loss_differences(runs)
    if not differences:
        return None
    step, value = max(enumerate(differences, start=1), key=lambda pair: pair[1])
    return {"value": value, "step": step, "compared_steps": len(differences)}


def results_table(runs: Sequence[RunRecord]) -> Table:
    """One line a run."""
    from rich.table import Table

    memory = "tensors" if runs[0].job.device.startswith("cuda") else "process"
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    for column in ("steps", "first loss", "last loss", "held out", "tokens/s", f"MiB, {memory}"):
        table.add_column(column, justify="right")
    for run in runs:
        table.add_row(
            run.job.computed_by,
            f"{len(run.steps)}/{run.job.sizes.steps}",
            shown(".4f", *run.losses[:1]),
            shown(".4f", *run.losses[-1:]),
            shown(".4f", *(validation["loss"] for validation in run.validations[-1:])),
            shown(",.0f", run.tokens_per_second),
            shown(",.0f", run.peak_memory_bytes and run.peak_memory_bytes / 2**20),
        )
    return table


def shown(form: str, number: float | None = None) -> str:
    """A number in this form, or a dash where there is none."""
    return "-" if number is None else format(number, form)


def results_json(runs: Sequence[RunRecord], **asked: Any) -> bytes:
    """What was asked for, and everything about the runs: device, threads, every step of each."""
    job = runs[0].job
    content = asked | {
        "device": device_name(job.device),
        "cpu_threads": job.threads or torch.get_num_threads(),
        "model": f"fastattn.models.{job.sizes.family}",
        "largest_loss_difference": largest_loss_difference(runs),
        "runs": {
            run.job.variant: {**asdict(run), "tokens_per_second": run.tokens_per_second}
            for run in runs
        },
    }
    return json.dumps(content, indent=1).encode()


def device_name(device: str) -> str:
    """The name of the GPU, or the kind of processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.system()} {platform.machine()} CPU"


def loss_plot(title: str, runs: Sequence[RunRecord]) -> bytes:
    """Plot the losses of all runs over each other, as PNG, and below how far two are apart.

    Experts' shares of the tokens have a panel of their own.
    """
    # pyplot would keep the figure, and choose a window system.
    from matplotlib.figure import Figure

    loads = runs[-1].expert_loads
    heights = [3, *[1] * (len(runs) - 1), *[1.5] * bool(loads)]
    figure = Figure(figsize=(8, 4 + len(heights)), layout="constrained")
    panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for run, style in zip(runs, STYLES, strict=False):
        steps = range(1, len(run.losses) + 1)
        panels[0].plot(steps, run.losses, label=f"{run.job.computed_by}, training", **style)
    validations = runs[-1].validations
    steps = [validation["step"] for validation in validations]
    losses = [validation["loss"] for validation in validations]
    panels[0].plot(steps, losses, "o", color="tab:orange", label="validation")
    panels[0].set(ylabel="loss (nats per byte)", title=title)
    panels[0].legend()
    if differences := loss_differences(runs):
        panels[1].plot(range(1, len(differences) + 1), differences, color="tab:red")
        panels[1].set(ylabel="|difference|")
        panels[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if loads:
        plot_load(panels[-1], steps, loads)
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[-1].set(xlabel="step")
    image = BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()


def plot_load(panel: Any, steps: Sequence[int], loads: list[list[list[float]]]) -> None:
    """Each expert's share at every validation: a line for each expert of each layer."""
    for place, layer in enumerate(zip(*loads, strict=True)):
        for expert, course in enumerate(zip(*layer, strict=True)):
            color, style = f"C{expert}", ("-", "--", ":", "-.")[place % 4]
            label = f"expert {expert}" if place == 0 else None
            panel.plot(steps, course, style, color=color, label=label)
    panel.set(ylabel="share of tokens", ylim=(0, None))
    panel.legend(ncols=4, fontsize="small")


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
