"""The memory of a language model's loss at a vocabulary of 128K, patched beside unpatched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.ops.core.backends import INTERPRETED

ROOT = Path(__file__).parents[2]

# A small model in front, so that head and loss are all that counts. The peak is that of the
# process's resident memory in a step, beyond what was there before and beyond the gradients.
STEP = """
import gc, json, sys
from pathlib import Path

sys.path.append("tests/integrations")
from torchvision_import import import_torchvision
import_torchvision()

import torch
import transformers

import fastattn
from bench.memory.__main__ import RESET_PEAK, resident

torch.set_num_threads(1)
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=131072, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=1, max_position_embeddings=512,
)
model = transformers.LlamaForCausalLM(config)
if sys.argv[1] == "patched":
    fastattn.patch(model)
tokens = torch.randint(0, 131072, (1, 512), generator=torch.Generator().manual_seed(0))
model(tokens[:, :8], labels=tokens[:, :8]).loss.backward()
model.zero_grad()
gc.collect()
Path("/proc/self/clear_refs").write_text(RESET_PEAK)
before = resident("VmRSS")
loss = model(tokens, labels=tokens).loss
loss.backward()
gradients = sum(p.grad.nbytes for p in model.parameters())
json.dump({"loss": loss.item(), "peak": resident("VmHWM") - before - gradients}, sys.stdout)
"""


@pytest.mark.skipif(INTERPRETED or sys.platform != "linux", reason="measures the reference backend")
def test_memory_of_the_loss():
    found = {}
    for name in ("plain", "patched"):
        command = [sys.executable, "-c", STEP, name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
    assert found["patched"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-5)
    assert found["patched"]["peak"] <= 0.3 * found["plain"]["peak"], found
