"""Whole kernels that copy by TMA and whose warps have parts of their own, beside float64.

`pytest --schedules N tests/machine/test_specialised.py` tries N seeds of every policy.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastattn.machine.execution import Execution, execute
from fastattn.machine.schedule import POLICIES, Schedule
from fastattn.ops.core.backends import INTERPRETED

if INTERPRETED:
    pytest.skip("the kernels are compiled, which the interpreter excludes", allow_module_level=True)

import tma_kernels
from gluon_attention import attention
from triton.tools.tensor_descriptor import TensorDescriptor

NOTES = {
    "attention_kernel": [],
    "copy_kernel": [],
    "matmul_kernel": [],
    "matmul_by_own_maps_kernel": [],
    # Triton makes mbarriers that nobody uses, and lays a tile over them with no proxy fence.
    "specialised_matmul_kernel": ["overwrites by a bulk load"],
}
"""What the compiler does in each kernel that PTX does not promise to work."""


@pytest.fixture(scope="module")
def execution() -> Iterator[Execution]:
    with execute("sm_90") as running:
        yield running


@pytest.fixture
def schedules(request: pytest.FixtureRequest) -> list[Schedule]:
    """Every schedule that is asked for, or four."""
    seeds: Any = request.config.getoption("--schedules")
    if seeds:
        return [Schedule(policy, seed) for policy in POLICIES for seed in range(seeds)]
    return [Schedule("random"), Schedule("late"), Schedule("early"), Schedule("high-warps")]


def require_no_faults(execution: Execution, kernel: str) -> None:
    """Have no report, and just the notes that are known."""
    assert execution.reports == []
    expected = NOTES[kernel]
    unknown = [n for n in execution.notes if not any(known in n for known in expected)]
    assert not unknown
    assert all(any(known in note for note in execution.notes) for known in expected)
    execution.notes.clear()


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


def of_tiles(tensor: torch.Tensor, *box: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(box))


@pytest.mark.parametrize("columns", [16, 32, 64])
def test_a_copy_by_tiles(execution: Execution, schedules: list[Schedule], columns: int):
    source = random(100, 72)
    for execution.schedule in schedules:
        to = torch.zeros_like(source)
        grid = 2, -(-72 // columns)
        descriptors = (of_tiles(x, 64, columns) for x in (source, to))
        tma_kernels.copy_kernel[grid](*descriptors, 64, columns)
        assert torch.equal(source, to)
        require_no_faults(execution, "copy_kernel")


M, N, K = 100, 72, 200
"""Ragged on all sides: no multiples of the 64 rows and columns of a tile."""


def require_product(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
    exact = a.double() @ b.double()
    # The sum is rounded to bfloat16, and before that to float32 a few times.
    torch.testing.assert_close(c.double(), exact, rtol=2.0**-8, atol=1e-4)


@pytest.mark.parametrize("stages", [2, 3])
def test_a_product_by_the_hosts_maps(execution: Execution, schedules: list, stages: int):
    a, b = random(M, K), random(K, N)
    for execution.schedule in schedules:
        c = torch.full((M, N), math.nan, dtype=torch.bfloat16)
        descriptors = (of_tiles(x, 64, 64) for x in (a, b, c))
        tma_kernels.matmul_kernel[2, 2](*descriptors, K, 64, 64, 64, num_stages=stages)
        require_product(a, b, c)
        require_no_faults(execution, "matmul_kernel")


def test_a_product_by_maps_of_the_kernels_own(execution: Execution, schedules: list):
    a, b = random(M, K), random(K, N)
    for execution.schedule in schedules[:2]:
        c = torch.full((M, N), math.nan, dtype=torch.bfloat16)
        sizes = M, N, K, a.stride(0), b.stride(0), c.stride(0)
        tma_kernels.matmul_by_own_maps_kernel[2, 2](a, b, c, *sizes, 64, 64, 64)
        require_product(a, b, c)
        require_no_faults(execution, "matmul_by_own_maps_kernel")


def test_a_loop_whose_warps_triton_specialises(execution: Execution, schedules: list):
    a, b = random(M, K), random(K, N)
    for execution.schedule in schedules:
        c = torch.full((M, N), math.nan, dtype=torch.bfloat16)
        tma_kernels.specialised_matmul_kernel[1, 2](a, b, c, M, N, K, 128, 64, 64, num_stages=3)
        require_product(a, b, c)
        require_no_faults(execution, "specialised_matmul_kernel")


STAGES = 2


@pytest.mark.parametrize("blocks", [2 * STAGES + 1, 2 * STAGES + 2])
def test_attention(execution: Execution, schedules: list[Schedule], blocks: int):
    # The ring turns twice at least, and ends after an odd and an even number of turns.
    q, k, v = random(128, 64), random(64 * blocks, 64), random(64 * blocks, 64).flip(0)
    scores = q.double() @ k.double().T / 8
    exact = scores.softmax(-1) @ v.double()
    for execution.schedule in schedules:
        o = attention(q, k, v, STAGES)
        torch.testing.assert_close(o.double(), exact, rtol=2.0**-7, atol=2e-3)
        require_no_faults(execution, "attention_kernel")
