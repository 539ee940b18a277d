"""Models of many families compute patched what they compute as they are."""

import pytest
import torch

from against_eager import takes
from against_unpatched import faults, parts_of
from families import FAMILIES
from fastattn.ops.core.backends import INTERPRETED as IN_INTERPRETER
from support import count_launches

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
def test_patched(name: str, scenario: str, dtype: torch.dtype, record_property):
    record_property("family", name)
    record_property("scenario", "patched")
    found, report = faults(FAMILIES[name], scenario, dtype)
    record_property("parts", parts_of(report))
    assert found == []
    assert {"attention", "norms"} <= set(parts_of(report))


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_patched_on_kernels(name: str):
    with count_launches() as launches:
        found, _ = faults(FAMILIES[name], "padded", torch.float32)
    assert found == []
    for kernel in ("attention_forward", "norm_forward", "gated_activation", "cross_entropy"):
        assert any(kernel in launch for launch in launches), kernel
