"""Models of many families compute with our attention what they compute with their own."""

import pytest
import torch

from against_eager import SCENARIOS, faults, takes
from families import FAMILIES, INTERPRETED
from fastattn.ops.core.backends import INTERPRETED as IN_INTERPRETER
from support import count_launches

DTYPES = [torch.float32, torch.bfloat16]

CASES = [
    pytest.param(name, scenario, id=f"{name}-{scenario}")
    for name, family in FAMILIES.items()
    for scenario in SCENARIOS
    if takes(family, scenario)
]


@pytest.mark.skipif(IN_INTERPRETER, reason="the reference backend; kernels have their own test")
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "scenario"), CASES)
def test_family(name: str, scenario: str, dtype: torch.dtype, record_property):
    record_property("family", name)
    record_property("scenario", scenario)
    assert faults(FAMILIES[name], scenario, dtype) == []


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", INTERPRETED)
def test_family_on_kernels(name: str, dtype: torch.dtype):
    family = FAMILIES[name]
    scenario = next(s for s in ("packed", "padded", "plain") if takes(family, s))
    scenario = "padded" if dtype is torch.float32 and takes(family, "padded") else scenario
    with count_launches() as launches:
        assert faults(family, scenario, dtype) == []
    assert any("attention_forward" in launch for launch in launches)
    assert any("attention_queries_backward" in launch for launch in launches)
