"""Models of many families compute patched what they compute as they are."""

import pytest
import torch

from against_unpatched import faults
from against_eager import takes
from families import FAMILIES
from fastattn.ops.core.backends import INTERPRETED as IN_INTERPRETER

DTYPES = [torch.float32, torch.bfloat16]

CASES = [
    pytest.param(name, scenario, id=f"{name}-{scenario}")
    for name, family in FAMILIES.items()
    for scenario in ("plain", "padded")
    if takes(family, scenario)
]


@pytest.mark.skipif(IN_INTERPRETER, reason="the reference backend; kernels have their own test")
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "scenario"), CASES)
def test_patched(name: str, scenario: str, dtype: torch.dtype):
    found, report = faults(FAMILIES[name], scenario, dtype)
    assert found == []
