"""Integers as large as they come, in every argument that takes any, of every op.

The result is that of the ordinary number that means the same, or an error names the argument.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest

from fastattn.ops.core.backends import INTERPRETED
from support import DEVICE

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.slow,
    # On a GPU PyTorch's own assertions, about numbers that no check can see, end all that follows.
    pytest.mark.skipif(not INTERPRETED, reason="looks at numbers, as is done on a CPU alone"),
]

TESTS = Path(__file__).parents[1]

PATIENCE = 200.0
"""Seconds for one case, the start of its process included; none takes one of them."""

if DEVICE is None:
    CASES, GROUPS = [], []
else:
    from integer_cases import all_cases

    CASES = all_cases()
    GROUPS = list(dict.fromkeys(case.group for case in CASES))


def outcomes_from(start: int) -> dict[int, str]:
    """What is wrong with the cases from one on, up to one that ends its process or never ends."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-W", "ignore", str(TESTS / "integer_cases.py"), str(start)]
    found: dict[int, str] = {}
    running = start
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        timer = Timer(PATIENCE, process.kill)
        timer.start()
        for line in process.stdout:
            timer.cancel()
            running, wrong = json.loads(line)
            if wrong is not None:
                found[running] = wrong
            timer = Timer(PATIENCE, process.kill)
            timer.start()
    timer.cancel()
    if start + len(found) < len(CASES):
        found[running] = f"it ended the process, or had to be ended: {process.returncode}"
    return found


@pytest.fixture(scope="module")
def outcomes() -> dict[int, str]:
    """What is wrong with each case."""
    found: dict[int, str] = {}
    while len(found) < len(CASES):
        found |= outcomes_from(len(found))
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_integers_mean_what_they_say(group, outcomes):
    own = [number for number, case in enumerate(CASES) if case.group == group]
    wrong = [f"{CASES[number]}: {outcomes[number]}" for number in own if outcomes[number]]
    assert not wrong, "\n".join(wrong)


def test_the_arguments_of_all_ops_are_found():
    found = {group.split(" ")[0] for group in GROUPS}
    assert {"attention", "attention_varlen", "dropout", "cross_entropy", "apply_rotary"} <= found
