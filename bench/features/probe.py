"""Tries contenders, each in processes of its own: what crashes costs one feature, no more."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastattn.interpreter import round_to_bfloat16

from ..environment import ROOT
from .contenders import Attention, Contender
from .features import SECOND, Feature
from .judging import CRASHED, FORWARD, GRADIENTS, NOT_TRIED, Pair, Verdict, judge

Row = dict[str, Any]
"""One verdict: feature, variant, what, contender, and what fields of `Verdict` say something."""

DEVICE_IS_LOST = 3
"""The exit code of a process that has rows, but whose GPU answers no more."""


def make_rows(feature: Feature, contender: str, found: dict[str, Pair]) -> list[Row]:
    """The rows of a result file."""
    return [
        {"feature": feature.name, "variant": variant, "what": what, "contender": contender}
        | {
            key: _in_json(value)
            for key, value in asdict(verdict).items()
            if value not in (None, "")
        }
        for variant, pair in found.items()
        for what, verdict in pair.items()
    ]


def _in_json(value: Any) -> Any:
    """Four digits of a number; JSON has no infinities and no NaN."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


def alike(feature: Feature, contender: str, verdict: Verdict) -> list[Row]:
    """The same verdict on all of a feature."""
    asked = (GRADIENTS,) if feature.judged == SECOND else (FORWARD, GRADIENTS)
    pair: Pair = dict.fromkeys(asked, verdict)
    return make_rows(feature, contender, dict.fromkeys(feature.variants, pair))


def try_features(
    contender: str,
    attention: Attention,
    features: Iterable[Feature],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterable[list[Row]]:
    """The rows of each feature."""
    for feature in features:
        yield make_rows(feature, contender, judge(feature, attention, device, dtype))


def work(
    contender: Contender,
    features: Sequence[Feature],
    device: torch.device,
    dtype: torch.dtype,
    file: Path,
) -> int:
    """A process's part: append a line to the file for each feature."""
    warnings.simplefilter("ignore")
    round_to_bfloat16()
    with file.open("a") as lines:
        for rows in try_features(contender.name, contender.load(), features, device, dtype):
            lines.write(json.dumps(rows) + "\n")
            lines.flush()
            if not _answers(device):
                return DEVICE_IS_LOST
    return 0


def _answers(device: torch.device) -> bool:
    """Whether the device still works; an illegal access by a kernel ends that for a process."""
    if device.type == "cpu":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def probe(
    contender: Contender, features: Sequence[Feature], command: Sequence[str], stop_at: float
) -> list[Row]:
    """A contender's rows, from as many processes as it takes.

    Args:
        contender: whom.
        features: the rows to try.
        command: arguments of `python -m bench.features` that say on what.
        stop_at: when, by time.monotonic(), whatever is left stays untried.
    """
    rows: list[Row] = []
    left = list(features)
    with tempfile.TemporaryDirectory() as folder:
        while left and (seconds := stop_at - time.monotonic()) > 0.0:
            file = Path(folder) / str(len(left))
            own = ["--contender", contender.name, "--feature", *(f.name for f in left)]
            child = [sys.executable, "-m", "bench.features", *command, *own, "--rows", str(file)]
            try:
                done = subprocess.run(
                    child, cwd=ROOT, timeout=seconds, capture_output=True, text=True, check=False
                )
                ending = "" if done.returncode in (0, DEVICE_IS_LOST) else _ending(done)
            except subprocess.TimeoutExpired:
                ending = None
            found = [json.loads(line) for line in file.read_text().splitlines()]
            rows += (row for of_feature in found for row in of_feature)
            left = left[len(found) :]
            if ending is None:
                break
            if ending and left:
                rows += alike(left.pop(0), contender.name, Verdict(CRASHED, message=ending))
    for feature in left:
        rows += alike(feature, contender.name, Verdict(NOT_TRIED, message="the time was over"))
    return rows


def _ending(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process ended."""
    if done.returncode < 0:
        return f"ended by {signal.Signals(-done.returncode).name}"
    last = done.stderr.strip().splitlines()[-1:]
    return f"ended with exit code {done.returncode}" + (f": {last[0]}" if last else "")
