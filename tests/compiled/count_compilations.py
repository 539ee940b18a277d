"""Print how many kernels get compiled for sm_90 while the number of rows varies, as JSON.

Run in a process of its own: Triton keeps compiled kernels by device, and the stub is one.
"""

import json

import torch

from bench.compiled.stub_driver import TARGETS, Recorder, stub_driver
from fastattn.ops.backends import assume_gpu, backend
from fastattn.ops.catalog import OPERATIONS

ROWS = (1, 2, 3, 16, 17, 1000, 4096, 65_537, 1_000_000)
COLUMNS = 16

ARGUMENTS = {
    "rms_norm": ("x",),
    "layer_norm": ("x",),
    "add_rms_norm": ("x", "residual"),
    "add_layer_norm": ("x", "residual"),
    "dropout": ("x",),
    "swiglu": ("gate", "up"),
    "geglu": ("gate",),
    "softmax": ("x",),
    "log_softmax": ("x",),
}


def kernels_used(name: str, rows: int, recorder: Recorder) -> set[str]:
    """The hashes of the kernels that forward and backward launch."""
    arguments = {
        argument: torch.zeros(rows, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
        for argument in ARGUMENTS[name]
    }
    outputs = OPERATIONS[name].function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    return {kernel.metadata["hash"] for kernel in recorder.take()}


def main() -> None:
    recorder = Recorder()
    counts = {}
    with stub_driver(TARGETS["sm_90"], recorder), assume_gpu(), backend("triton"):
        for name in ARGUMENTS:
            first = kernels_used(name, ROWS[0], recorder)
            every = first.union(*(kernels_used(name, rows, recorder) for rows in ROWS[1:]))
            counts[name] = {"first": len(first), "all": len(every)}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
