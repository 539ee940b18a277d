"""Try every feature of attention on every contender installed, and say which are right.

On the GPU if there is one, in bfloat16; on a CPU in float32, by those alone that compute there.
fastattn's kernels run there if TRITON_INTERPRET=1 is in the environment, and its reference in
PyTorch if not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..environment import default_device, describe
from ..output import print_table, write
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

    present = [c for c in contenders if c.obstacle(options.device) is None]
    absent = {c.name: reason for c in contenders if (reason := c.obstacle(options.device))}
    document = describe(options.device) | {
        "dtype": options.dtype,
        "remarks": {c.name: c.remark(options.device) for c in present},
        "not_tried": absent | NOT_TRIED,
        "results": [],
    }
    stop_at = time.monotonic() + 60.0 * options.minutes
    command = ["--device", str(options.device), "--dtype", options.dtype]
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
