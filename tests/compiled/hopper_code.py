"""Print what the warp-specialised forward compiles to for sm_90, as JSON.

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
from fastattn.kernels.attention.forward import attention_forward
from fastattn.kernels.attention.hopper.config import RULE, HopperConfig
from fastattn.machine.driver import TARGETS, Recorder, stub_driver
from fastattn.ops.core.backends import assume_gpu, backend

CASES: dict[str, tuple[str, list[int], int]] = {
    "causal": ("causal:0:0:0", [], 2),
    "window": ("left:0:0:1;right:0:0:1", [100, 0], 3),
}
"""Terms, their integers, and how many loops a consumer has."""


def measure(dims: tuple[int, int], config: HopperConfig, case: str, recorder: Recorder) -> Any:
    """What is known of one kernel."""
    terms, integers, loops = CASES[case]
    shapes = ((1, 2, 256, dims[0]), (1, 1, 512, dims[0]), (1, 1, 512, dims[1]))
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
    used = replace(config, used=True)
    options = (256, dims[0] ** -0.5, 0.0, "ieee", terms, [], integers)
    attention_forward(
        q, k, v, None, None, None, None, [], *options, hopper_rule=lambda *features: used
    )
    (kernel,) = recorder.take()
    code, hardware = inspect(kernel), HARDWARE["sm_90"]
    steps = parse_listing(disassemble([kernel], "-hex")[0])
    return {
        "dims": dims,
        "case": case,
        "kernel": kernel.name,
        "consumers": config.consumers,
        "loops_of_consumer": loops,
        "spill_bytes": code.spill_bytes,
        "registers": most_registers(steps, code.registers),
        "loops": [
            {
                "instructions": sum(loop.instructions.values()),
                "share": loop.tensor_share,
                "serialized": loop.serialized,
                "hazards": loop.hazards,
            }
            for loop in predict_consumers(steps, config.consumers, config.stages, hardware)
        ],
    }


def main() -> None:
    recorder = Recorder()
    with stub_driver(TARGETS["sm_90"], recorder), assume_gpu(), backend("triton"):
        found = [
            measure(dims, config, case, recorder) for dims, config in RULE.items() for case in CASES
        ]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
