"""Importing fastattn is cheap, and touches no GPU."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# torch probes and starts the GPU through these, so a call of one of them during the import is
# noticed on a machine without a GPU too.
IMPORT_AND_REPORT = """
import json, sys, time
import torch

def refuse(*args, **kwargs):
    raise AssertionError("importing fastattn touched the GPU")

for name in ("_lazy_init", "is_available", "device_count", "get_device_capability"):
    setattr(torch.cuda, name, refuse)

before = set(sys.modules)
start = time.perf_counter()
import fastattn
seconds = time.perf_counter() - start
json.dump({
    "seconds": seconds,
    "modules": sorted(set(sys.modules) - before),
    "cuda_started": torch.cuda.is_initialized(),
}, sys.stdout)
"""

# Parts of torch that `import torch` leaves out because they take long to load.
HEAVY_TORCH = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.testing",
    "torch.utils.cpp_extension",
)


def import_report() -> dict:
    """Import fastattn after torch in a fresh process, and return what that brought."""
    command = [sys.executable, "-c", IMPORT_AND_REPORT]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_import_is_light_and_touches_no_gpu():
    report = import_report()
    # Printed and not asserted, because a busy machine would make a limit fail at random.
    print(f"import fastattn took {report['seconds'] * 1e3:.0f} ms beyond import torch")

    expected = {"fastattn", "torch", *sys.stdlib_module_names}
    foreign = {name for name in report["modules"] if name.partition(".")[0] not in expected}
    assert not foreign, f"import fastattn also imports {sorted(foreign)}"

    heavy = [name for name in report["modules"] if name.startswith(HEAVY_TORCH)]
    assert not heavy, f"import fastattn also imports {heavy}"

    # But for the one file of that folder that needs none.
    without_triton = {"fastattn.kernels", "fastattn.kernels.private"}
    kernels = {name for name in report["modules"] if name.startswith("fastattn.kernels")}
    assert kernels <= without_triton, f"importing fastattn imports what needs triton: {kernels}"

    assert not report["cuda_started"]
