"""Try every feature of attention on every contender installed, and say which are right.

On the GPU if there is one, in bfloat16; on a CPU in float32, where fastattn's kernels run if
TRITON_INTERPRET=1 is in the environment, and its reference in PyTorch if not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..compiled.report import print_table
from ..environment import describe
from ..session import default_device
from .features import FEATURES, Feature
from .packages import CONTENDERS, NOT_TRIED
from .probe import Row, probe, work
from .table import cells, features_of, mark, markdown

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.features", description=__doc__)
    parser.add_argument(
        "--contender", nargs="+", choices=[c.name for c in CONTENDERS], metavar="NAME"
    )
    parser.add_argument(
        "--feature", nargs="+", metavar="WORDS", help="those whose names have these"
    )
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="what is left then is not tried"
    )
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the result file")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="the result as a page")
    parser.add_argument(
        "--draw", type=Path, metavar="FILE.json", help="try nothing: the page of this file"
    )
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.draw and not options.table:
        parser.error("--draw needs --table")
    options.dtype = options.dtype or ("float32" if options.device.type == "cpu" else "bfloat16")
    return options


def main() -> int:
    options = arguments()
    if options.draw:
        options.table.write_text(markdown(json.loads(options.draw.read_text())))
        return 0
    contenders = [c for c in CONTENDERS if not options.contender or c.name in options.contender]
    if options.rows:
        own = [feature for feature in FEATURES if feature.name in options.feature]
        return work(contenders[0], own, options.device, DTYPES[options.dtype], options.rows)
    chosen = [feature for feature in FEATURES if _is_asked(feature, options.feature)]

    known: dict[str, Any] = {}
    for contender in contenders:
        known[contender.name] = {"installed": contender.installed}
        if contender.installed:
            known[contender.name]["remark"] = contender.remark(options.device)
    document = describe(options.device) | {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "dtype": options.dtype,
        "contenders": known,
        "not_tried": NOT_TRIED,
        "results": [],
    }
    stop_at = time.monotonic() + 60.0 * options.minutes
    command = ["--device", str(options.device), "--dtype", options.dtype]
    present = [c for c in contenders if c.installed]
    with ThreadPoolExecutor(options.jobs) as pool:
        for rows in pool.map(lambda c: probe(c, chosen, command, stop_at), present):
            document["results"] += rows
            if options.out:
                write(options.out, document)
    show(document["results"])
    if options.table:
        options.table.write_text(markdown(document))
    return 0


def _is_asked(feature: Feature, words: list[str] | None) -> bool:
    return words is None or any(word in feature.name for word in words)


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a result file, a verdict a line; an interrupted run leaves the one before whole."""
    head = json.dumps({name: x for name, x in document.items() if name != "results"}, indent=1)
    rows = ",\n".join(json.dumps(row) for row in document["results"])
    partial = path.with_name(path.name + ".partial")
    partial.write_text(f'{head[:-2]},\n "results": [\n{rows}\n ]\n}}\n')
    os.replace(partial, path)


def show(rows: list[Row]) -> None:
    """Print the marks of all."""
    by_contender: dict[str, list[Row]] = {}
    for row in rows:
        by_contender.setdefault(row["contender"], []).append(row)
    names = list(by_contender)
    print_table(
        "forward, gradients, with GQA, with causal",
        ("feature", *names),
        [
            (feature, *("".join(map(mark, cells(by_contender[n], feature))) for n in names))
            for feature in features_of(by_contender)
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
