"""Faults planted in the compiled code of real kernels are seen, but for those with a reason."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS.parent)}

SEEN = {"by an error", "by a report", "by the numbers"}

PROVED = {
    "not reached": "its code does not run with this sample",
    "never false": "a kernel that stops where the mask is false does not stop",
    "unused": "NaN in place of what is read where the mask is false changes no result",
    "same value": "NaN in place of what is stored where the mask is false is seen, so that what is "
    "stored there is what another thread stores",
    "overwritten": "NaN stored where the mask is false is not seen, for the CTA stores there "
    "afterwards: an order of its warps through global memory, which this machine does not watch",
    "covered": "seen once the redundant ones of its kind are gone",
}
"""Why a fault is not seen, where another run of the kernel shows the reason (see mutations.py)."""

REDUNDANT = {
    "barrier": "no warp has touched what others touch since the last barrier: stages of a pipeline "
    "that are filled one after the other before it runs, what is read by the warp that wrote it, "
    "or a loop too short for its stages to come round; or the next barrier comes first",
    "wait for copies": "what is on its way is for steps that do not come",
    "wait for all but one copy more": "the last groups on their way are for steps that do not come",
    "commit of copies": "these copies are then in the next group, which is waited for as early",
    "wait for products": "the loop runs once, or a later wait comes before the sums are needed",
    "wait for all but one product more": "as without the wait",
}
"""Why faults of a kind may be redundant, all at once: read in the PTX of these cases. There is no
fence among them, each of which is needed.
"""

MOST_REDUNDANT = 0.6
"""The largest share of faults of one kind, in code that runs, that may be redundant."""

CASES = [
    ("sm_80", "norm", ()),
    ("sm_80", "softmax", ()),
    ("sm_90", "short product", ("4", "1")),
    ("sm_80", "attention", ("24", "3")),
    ("sm_90", "attention", ("24", "11")),
]
"""What is tried here, and of some cases which part: every so manieth fault, and the first."""


@pytest.mark.proof
@pytest.mark.parametrize(("target", "case", "part"), CASES)
def test_planted_faults_are_seen(target: str, case: str, part: tuple[str, ...]):
    command = [sys.executable, str(TESTS / "mutations.py"), target, case, *part]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=290, cwd=TESTS.parent, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    counts: dict[str, Counter[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            kind = row.pop("kind")
            del row["kernel"]
            counts.setdefault(kind, Counter()).update(row)
    assert counts, done.stdout
    assert sum(row[how] for row in counts.values() for how in SEEN) > 0
    for kind, row in counts.items():
        assert set(row) <= SEEN | set(PROVED) | {"redundant"}, (kind, row)
        redundant = row["redundant"]
        assert not redundant or kind in REDUNDANT, (kind, row)
        run = row.total() - row["not reached"] - row["never false"]
        assert len(part) > 0 or redundant <= max(1, MOST_REDUNDANT * run), (kind, row)
