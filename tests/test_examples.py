"""The programs in docs/examples run, are short, and what they end in shows that they worked.

The quick ones run here; `make examples`, which gives --every-example, runs all whose libraries are
installed and says which were left out.
"""

import importlib
import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
PAGE = EXAMPLES.with_suffix(".md")


def learned(goal: float) -> Callable[[list[float]], bool]:
    """Whether a curve that begins below a half ends above the goal."""
    return lambda curve: curve[0] < 0.5 and sum(curve[-3:]) / 3 > goal


QUICK: dict[str, Callable[[Any], bool]] = {
    "debugger": lambda said: "array([2., 3.]" in said and "array([1.503" in said,
    "dpo": learned(0.95),
    "flash_attn_caller": lambda apart: apart < 1e-4,
    "generation": lambda right: right == 1,
    "grpo": learned(0.7),
    "own_scores": lambda distance: distance == 5,
    "sft": learned(0.95),
    "triangle": lambda apart: apart < 1e-5,
}
"""What each gives must be; the numbers are far from these bounds."""

OTHERS: dict[str, Callable[[Any], bool]] = {
    "bart": lambda right: right > 0.9,
    "bert": lambda found: found > 0.8,
    "diffusion": lambda whole: whole > 0.7,
    "encoder": lambda result: result[0] > 0.7 and result[1] < 1e-3,
    "experts": lambda result: result[0] > 0.95 and result[1] > 0.1,
    "t5_lora": lambda right: right > 0.85,
    "vit": lambda right: right > 0.95,
}
LIBRARIES = {
    "diffusers_dit": ("diffusers",),
    "hf_trainer": ("accelerate", "transformers"),
    "lightning_encoder": ("lightning",),
    "peft_lora": ("peft", "transformers"),
    "timm_vit": ("timm",),
    "trl_dpo": ("datasets", "trl"),
    "trl_grpo": ("datasets", "trl"),
    "trl_sft": ("datasets", "trl"),
}
"""What an example needs beside fastattn, and its extra `models`."""

OTHERS |= {
    "diffusers_dit": lambda whole: whole > 0.7,
    "hf_trainer": lambda right: right > 0.95,
    "lightning_encoder": lambda right: right > 0.9,
    "peft_lora": lambda right: right > 0.9,
    "timm_vit": lambda right: right > 0.95,
    "trl_dpo": lambda ahead: ahead > 0.95,
    "trl_grpo": learned(0.7),
    "trl_sft": lambda right: right > 0.95,
}


def run(name: str) -> Any:
    """What an example's `main` gives."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_every_example_has_a_goal_is_short_and_is_on_the_page():
    paths = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert paths.keys() == QUICK.keys() | OTHERS.keys()
    for path in paths.values():
        text = path.read_text()
        assert text.count("\n") <= 80, path
        assert f"`python docs/examples/{path.name}" in text
    listed = re.findall(r"\(examples/(\w+)\.py\)", PAGE.read_text())
    assert sorted(listed) == sorted(paths)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in QUICK if name != "debugger"])
def test_a_quick_example_shows_that_it_worked(name):
    assert QUICK[name](run(name))


@pytest.mark.kernels
@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="a GPU's kernels have no debugger")
def test_a_debugger_stops_in_a_kernel():
    assert QUICK["debugger"](run("debugger"))


@pytest.mark.example
@pytest.mark.parametrize("name", OTHERS)
def test_an_example_shows_that_it_worked(name, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "integrations")
    importlib.import_module("torchvision_import").import_torchvision()
    for library in LIBRARIES.get(name, ()):
        try:
            importlib.import_module(library)
        except ImportError as error:
            pytest.skip(f"{library} cannot be imported: {error}")
    assert OTHERS[name](run(name))
