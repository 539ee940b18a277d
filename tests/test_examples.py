"""The examples in docs/examples run, are short, and what they train learns."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"

GOALS = {"sft": 0.95, "dpo": 0.95, "grpo": 0.7}
"""What the last numbers of a curve reach that begins below a half."""


def test_every_example_has_a_goal_and_is_short():
    paths = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert paths.keys() == GOALS.keys()
    for path in paths.values():
        assert path.read_text().count("\n") < 80


@pytest.mark.slow
@pytest.mark.parametrize("name", GOALS)
def test_what_an_example_trains_learns(name):
    curve = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    assert curve[0] < 0.5
    assert sum(curve[-3:]) / 3 > GOALS[name]
