"""Print what the warp-specialised backward kernels compile to for sm_90, as JSON.

Run in a process of its own: Triton keeps compiled kernels by device, and the stub is one.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.compiled.cost.hardware import HARDWARE
from bench.compiled.cost.listing import parse_listing
from bench.compiled.cost.specialised import most_registers, predict_consumers
from bench.compiled.machine_code import disassemble, inspect
from fastattn.kernels.attention.hopper.backward_config import (
    CONSUMERS,
    KEYS,
    RULES,
    HopperBackwardConfig,
)
from fastattn.kernels.attention.hopper.launch_backward import (
    launch_keys_backward,
    launch_queries_backward,
)
from fastattn.kernels.attention.launch import Call, Gradient
from fastattn.machine.driver import TARGETS, Recorder, stub_driver
from fastattn.ops.core.backends import assume_gpu, backend

CASES: dict[str, tuple[str, list[int]]] = {
    "whole": ("", []),
    "causal": ("causal:0:0:0", []),
    "window": ("left:0:0:1;right:0:0:1", [100, 0]),
}
"""Terms and their integers."""


def measure(
    kernel_name: str, dims: tuple[int, int], config: HopperBackwardConfig, case: str
) -> dict[str, Any]:
    """What is known of one kernel."""
    recorder = Recorder()
    terms, integers = CASES[case]
    heads_of_rows = ((2, 256, dims[0]), (1, 512, dims[0]), (1, 512, dims[1]), (2, 256, dims[1]))
    q, k, v, do = (torch.empty((1, *shape), dtype=torch.bfloat16) for shape in heads_of_rows)
    options = (None, None, 0, 0, None, 0.0, dims[0] ** -0.5, "ieee", terms, [], [], integers)
    call, lse = Call(q, k, v, *options, False), torch.empty(1, 2, 256)
    launch = launch_keys_backward if kernel_name == KEYS else launch_queries_backward
    with stub_driver(TARGETS["sm_90"], recorder), assume_gpu(), backend("triton"):
        launch(call, Gradient(do, lse, lse, lse), replace(config, used=True))
    (kernel,) = recorder.take()
    code, hardware = inspect(kernel), HARDWARE["sm_90"]
    steps = parse_listing(disassemble([kernel], "-hex")[0])
    return {
        "dims": dims,
        "case": case,
        "kernel": kernel_name,
        "shared_memory": kernel.metadata["shared"],
        "spill_bytes": code.spill_bytes,
        "registers": most_registers(steps, code.registers),
        "loops": [
            {
                "instructions": sum(loop.instructions.values()),
                "spills": loop.instructions.get("spill", 0),
                "share": loop.tensor_share,
                "serialized": loop.serialized,
                "hazards": loop.hazards,
            }
            for loop in predict_consumers(steps, CONSUMERS, config.stages, hardware)
        ],
    }


def main() -> None:
    cases = sys.argv[1:] or [*CASES]
    found = [
        measure(kernel, dims, config, case)
        for kernel, rule in RULES.items()
        for dims, config in rule.items()
        for case in cases
    ]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
