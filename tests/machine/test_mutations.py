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

UNSEEN = {
    "mask": "the other operand of a product is masked too, so that whatever this one reads within "
    "its tensor is multiplied by zero; or nobody uses what is read",
    "mask of a copy": "the copy is for a step of the loop that does not come",
    "barrier": "another barrier stands between the same accesses, one warp alone makes them, or "
    "the loop around them runs once",
    "commit of copies": "the copies are waited for with the next group, and both in time",
    "wait for copies": "what is waited for after the loop is for steps that do not come",
    "wait for products": "a later wait comes before anybody needs the product or its operands",
}
"""Why faults of each kind may have no effect that is forbidden, in code that runs."""

LEAST_SEEN = {
    "mask": 0.3,
    "mask of a copy": 0.5,
    "barrier": 0.5,
    "commit of copies": 0.5,
    "wait for copies": 0.5,
    "wait for products": 0.5,
    "proxy fence": 1.0,
    "fence of products": 1.0,
}
"""The least share of faults, of those in code that runs and of masks that mask, that is seen."""


@pytest.mark.slow
@pytest.mark.parametrize(("target", "case"), [("sm_80", "norm"), ("sm_90", "short product")])
def test_planted_faults_are_seen(target: str, case: str):
    command = [sys.executable, str(TESTS / "mutations.py"), target, case]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=290, cwd=TESTS.parent, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    counts: dict[str, Counter] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            kind = row.pop("kind")
            del row["kernel"]
            counts.setdefault(kind, Counter()).update(row)
    assert counts, done.stdout
    for kind, row in counts.items():
        seen = sum(row[how] for how in ("error", "report", "rule"))
        unseen = row["unseen"]
        assert not unseen or kind in UNSEEN, (kind, row)
        assert seen >= LEAST_SEEN[kind] * (seen + unseen), (kind, row)
