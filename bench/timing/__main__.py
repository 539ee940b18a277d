"""Time every op beside its contenders, on the GPU if there is one.

Times are medians of alternating rounds. Bandwidth counts the least bytes possible; the ceiling that
it is a share of is measured in the same run. The result file has everything, and pictures stand
beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..contenders import contender_names
from ..environment import default_device
from ..registry import OPS
from . import results
from .session import Session, default_out, default_target

INSTALL = "install the extra 'bench': pip install 'fastattn[bench]'"

TESTS = Path(__file__).with_name("test_benchmarks.py")


def read_shape(text: str) -> tuple[int, ...]:
    """The numbers of "1x32x8x1024"."""
    return tuple(int(part) for part in text.split("x"))


def arguments() -> argparse.Namespace:
    names = [op.name for op in OPS if op.benchmark is not None]
    contenders = dict.fromkeys(name for op in OPS for name in contender_names(op))
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=names, metavar="NAME", help="only these ops")
    parser.add_argument(
        "--shape",
        nargs="+",
        type=read_shape,
        default=[],
        metavar="AxBxC",
        help="these shapes, as tables have them, in the place of the ops' own",
    )
    parser.add_argument(
        "--contender",
        nargs="+",
        choices=list(contenders),
        metavar="NAME",
        help=f"only these of {', '.join(contenders)}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="two sizes, one dtype, few rounds, no torch.compile"
    )
    parser.add_argument("--minutes", type=float, help="start no further case after so long")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the result file")
    parser.add_argument("--no-plots", action="store_true", help="draw nothing")
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="where pictures go; else beside the results"
    )
    parser.add_argument(
        "--draw", type=Path, metavar="FILE.json", help="only draw the pictures of this file"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar=("OLD.json", "NEW.json"),
        help="compare this run, or the second file without running anything, with the first",
    )
    parser.add_argument(
        "--bytes", action="store_true", help="only count the bytes that the kernels move"
    )
    options = parser.parse_args()
    if options.compare and len(options.compare) > 2:
        parser.error("--compare takes one file or two")
    return options


def main() -> int:
    options = arguments()
    if options.bytes:
        chosen = [op for op in OPS if not options.op or op.name in options.op]
        results.print_traffic(chosen, default_target(options.device))
        return 0
    if options.draw:
        draw(json.loads(options.draw.read_text()), options.draw, options.plots)
        return 0
    old = json.loads(options.compare[0].read_text()) if options.compare else None
    if old is not None and len(options.compare) == 2:
        results.print_comparison(old, json.loads(options.compare[1].read_text()))
        return 0

    out = options.out or default_out(options.device)
    try:
        session = Session(
            ops=options.op,
            contenders=options.contender,
            shapes=options.shape,
            device=options.device,
            quick=options.quick,
            minutes=options.minutes,
            out=out,
        )
    except ValueError as error:
        sys.exit(f"bench: {error}")
    failed = run(session)
    if not session.document["results"]:
        print("nothing was measured", file=sys.stderr)
        return 1
    print(f"\n{out}")
    if not options.no_plots:
        draw(session.document, out, options.plots)
    if old is not None:
        results.print_comparison(old, session.document)
    return int(failed)


def run(session: Session) -> bool:
    """Run the benchmarks under pytest; whether anything of ours failed."""
    try:
        import pytest
    except ImportError:
        sys.exit(f"bench: pytest is missing; {INSTALL}")

    from .test_benchmarks import SESSION

    class Quiet:
        """No dot for every contender: the tables say what was measured."""

        @pytest.hookimpl(tryfirst=True)
        def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple | None:
            if report.when != "call" or report.failed:
                return None
            return report.outcome, "", ""

        def pytest_configure(self, config: pytest.Config) -> None:
            config.pluginmanager.register(session, SESSION)

    command = [str(TESTS), "-q", "-s", "--no-header", "-rfE"]
    for plugin in ("cacheprovider", "logging", "warnings", "xdist"):
        command += ["-p", f"no:{plugin}"]
    with tempfile.TemporaryDirectory() as unused:
        if importlib.util.find_spec("pytest_benchmark"):
            # Its tables would repeat ours, and its folder would be made in the checkout.
            command += ["--benchmark-quiet", f"--benchmark-storage=file://{unused}"]
        return pytest.main(command, plugins=[Quiet()]) != pytest.ExitCode.OK


def draw(document: Mapping[str, Any], results_file: Path, folder: Path | None) -> None:
    """Draw the pictures of a result file, where matplotlib is installed."""
    from . import plots

    try:
        pictures = plots.draw(document, folder or results_file.parent, results_file.stem)
    except ImportError as error:
        print(f"no pictures: {error}; {INSTALL}")
        return
    for picture in pictures:
        print(picture)


if __name__ == "__main__":
    sys.exit(main())
