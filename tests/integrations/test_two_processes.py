"""DDP and FSDP2: two processes with a patched model give what one gives with its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from against_unpatched import breaches, measure
from families import FAMILIES, make_model, tokens
from fastattn.ops.core.backends import INTERPRETED
from ranks import NAMES, RANKS, WAYS, step

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compares the reference backend")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank gives."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "ranks.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": paths}
    subprocess.run(command, env=environment, check=True, timeout=280)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients(found: list[Any], name: str):
    measured = measure(make_model(FAMILIES[name]), lambda model: step(model, tokens(2 * RANKS)))
    losses = [measured[0].truth[f"loss {number}"] for number in range(2)]
    assert losses[1] < losses[0]
    for way in WAYS:
        for rank in range(RANKS):
            assert breaches(found[rank][name, way], measured) == [], way
