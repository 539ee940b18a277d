"""The products, for `python -m fastattn tune`."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ...checking import Change, enough_neighbours, measure_reference
from ...kernels.config import Target
from .case import Case, Tunable


def matmul_case(
    m: int, n: int, k: int, dtype: torch.dtype, precision: str, units: str, device: str
) -> Case:
    """A plain product with operands in the layouts that `units` names."""
    from ...kernels.matmul.matmul import launch_product
    from ...kernels.tuning import bucket

    generator = torch.Generator(device).manual_seed(0)

    def random(rows: int, cols: int, by_rows: bool) -> torch.Tensor:
        shape = (rows, cols) if by_rows else (cols, rows)
        numbers = torch.randn(shape, generator=generator, device=device).to(dtype)
        return numbers if by_rows else numbers.t()

    a, b = random(m, k, units[0] == "k"), random(k, n, units[1] == "n")

    def launch(config: Any) -> torch.Tensor:
        out = torch.empty(m, n, dtype=dtype, device=device)
        launch_product(a, b, out, precision, config=config)
        return out

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            return a @ b
        finally:
            torch.set_float32_matmul_precision(before)

    features = {
        "m": bucket(m),
        "n": bucket(n),
        "k": bucket(k),
        "batch": bucket(1),
        "dtype": str(dtype)[6:],
        "precision": precision,
        "units": units,
        "fused": False,
    }

    def run(change: Change) -> dict[str, torch.Tensor]:
        return {"output": multiply(change(a), change(b))}

    measured = measure_reference(run, enough_neighbours(max(a.numel(), b.numel())))
    return Case(features, launch, functools.partial(multiply, a, b), "output", measured)


def matmul_candidates(target: Target, **features: Any) -> Sequence[Any]:
    from ...kernels.matmul import config

    return config.matmul_candidates(target, **features)


def matmul_rule(target: Target, **features: Any) -> Any:
    from ...kernels.matmul import config

    return config.matmul_rule(target, **features)


MATMUL_KINDS = (
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    (torch.float32, "tf32"),
)

# Of a linear layer: forward, then the gradients of its input and of its weight.
MATMUL_UNITS = ("kk", "kn", "mn")

MATMUL_SIZES = (
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (16, 4096, 4096),
    (256, 4096, 4096),
    (4096, 16384, 4096),
    (4096, 4096, 16384),
)

MATMUL = (
    Tunable(
        "matmul",
        shapes=[
            (*size, *kind, units)
            for kind in MATMUL_KINDS
            for size in MATMUL_SIZES
            for units in MATMUL_UNITS
        ],
        tiny_shapes=[(40, 33, 70, torch.float32, "ieee", units) for units in ("kk", "mn")],
        case=matmul_case,
        candidates=matmul_candidates,
        rule=matmul_rule,
    ),
)
