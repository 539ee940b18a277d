"""The comparison of torch.nn's modules with ours runs, and compares like with like."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastattn.nn
from bench.drop_ins import SHAPES, blocks, parts
from fastattn.ops.core.backends import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs the reference backend")
ROOT = Path(__file__).parents[2]


def without_dropout(block: nn.Module) -> nn.Module:
    for module in block.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return block


@pytest.mark.parametrize("modules", [blocks, parts])
def test_both_compute_the_same(modules):
    torch.manual_seed(0)
    for name, make, modes in modules(SHAPES[1]):
        theirs, ours = without_dropout(make(nn)), without_dropout(make(fastattn.nn))
        assert type(ours) is not type(theirs)
        ours.load_state_dict(theirs.state_dict())
        for mode, run in modes.items():
            found = []
            for module in (ours, theirs):
                module.train(mode.startswith("training"))
                module.zero_grad()
                output = run(module)
                found.append([output, *(parameter.grad for parameter in module.parameters())])
            torch.testing.assert_close(*found, msg=lambda text, at=(name, mode): f"{at}: {text}")


def test_the_ratios_are_written(tmp_path):
    result = tmp_path / "ratios.json"
    command = [sys.executable, "-m", "bench.drop_ins", "--shapes", "1", "--pairs", "2"]
    command += ["--seconds", "0.0005", "--json", str(result)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    ratios = json.loads(result.read_text())["ratios"]
    # How large they are is for a quiet machine to say.
    assert all(ratio["ratio"] > 0 for ratio in ratios)
    assert {"evaluation, padded", "training, padded"} < {ratio["mode"] for ratio in ratios}
