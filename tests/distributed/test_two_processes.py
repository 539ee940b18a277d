"""DTensor, DDP and FSDP2: two processes give what one gives. The checks stand in worker.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.kernels, pytest.mark.slow]

HERE = Path(__file__).parent
CHECKS = (
    "compile_before_any_eager_call",
    "norms_of_sharded_rows",
    "dropout_of_sharded_rows",
    "modulated_norms",
    "gated_activations",
    "softmaxes",
    "rotations",
    "cross_entropies",
    "linear_cross_entropies",
    "log_probs",
    "contrastive",
    "attentions",
    "reference_backend",
    "sharded_columns",
    "drawn_seeds_agree",
    "ddp",
    "fsdp2",
    "fsdp2_of_blocks",
    "fsdp2_of_families",
    "tensor_parallel_blocks",
    "tensor_parallel_blocks_with_tokens_split",
    "tensor_parallel_blocks_by_kernels",
    "tensor_parallel_blocks_with_numbers_of_heads",
    "expert_parallel",
    "expert_parallel_by_kernels",
    "expert_parallel_refusals",
    "expert_parallel_training",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each rank found: the traceback of every check that failed, None of those that held."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join(
        [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    )
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    subprocess.run(
        [sys.executable, str(HERE / "worker.py"), str(folder)],
        env=environment,
        check=True,
        timeout=280,
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(outcomes, check):
    for rank, found in enumerate(outcomes):
        failure = found[check]
        assert failure is None, f"rank {rank}:\n{failure}"


def test_every_check_of_the_worker_is_reported(outcomes):
    assert set(outcomes[0]) == set(CHECKS)
