"""Every kernel that is known not to keep the budget of predicted cost, check by check.

The table covers the shapes that the tests compile (`--quick`) of the ops named here, and the bytes
from HBM. `python -m bench.compiled --cost` fails where one of these has a problem that is missing
here, and where one that stands here is gone.
"""

from __future__ import annotations

from collections.abc import Iterator

from .budget import Problem

COVERED = (
    "attention causal",
    "attention mask GQA",
    "attention softcap ALiBi",
    "matmul",
    "linear",
    "gated_linear",
    "rms_norm",
    "layer_norm",
    "swiglu",
    "cross_entropy",
    "softmax",
    "dropout",
    "apply_rotary_qk",
)

FORWARD = "attention_forward_kernel"
QUERIES = "attention_queries_backward_kernel"
KEYS = "attention_keys_backward_kernel"

COPIES, SHARE = "copies awaited in the next step", "share"
HBM = "bytes from HBM"

QUICK = (2, 8, 8, 2048, 128, 128)


def _of(
    target: str, op: str, kernel: str, shape: tuple[int, ...], *checks: str
) -> Iterator[Problem]:
    return (Problem(target, op, kernel, shape, check) for check in checks)


KNOWN: tuple[Problem, ...] = (
    *_of("sm_80", "attention mask GQA", FORWARD, QUICK, SHARE),
    *_of("sm_80", "attention mask GQA", KEYS, QUICK, COPIES, SHARE),
    *_of("sm_80", "attention mask GQA", QUERIES, QUICK, SHARE),
    *_of("sm_80", "attention softcap ALiBi", FORWARD, QUICK, SHARE),
    *_of("sm_80", "attention softcap ALiBi", KEYS, QUICK, SHARE),
    *_of("sm_80", "attention softcap ALiBi", QUERIES, QUICK, SHARE),
    *_of("sm_90", "attention mask GQA", FORWARD, QUICK, SHARE),
    *_of("sm_90", "attention mask GQA", KEYS, QUICK, SHARE),
    *_of("sm_90", "attention mask GQA", QUERIES, QUICK, SHARE),
    *_of("sm_90", "attention softcap ALiBi", FORWARD, QUICK, SHARE),
    *_of("sm_90", "attention softcap ALiBi", KEYS, QUICK, SHARE),
    *_of("sm_90", "attention softcap ALiBi", QUERIES, QUICK, SHARE),
    # Products of 16 rows, which memory bounds.
    *_of("sm_80", "gated_linear", "gated_linear_backward_kernel", (16, 4096, 11008), SHARE),
    *_of("sm_80", "gated_linear", "gated_linear_forward_kernel", (16, 4096, 11008), SHARE),
    *_of("sm_80", "gated_linear", "matmul_kernel", (16, 4096, 11008), SHARE),
    *_of("sm_80", "matmul", "matmul_kernel", (16, 4096, 4096), SHARE),
    *_of("sm_90", "gated_linear", "gated_linear_backward_kernel", (16, 4096, 11008), SHARE),
    *_of("sm_90", "gated_linear", "gated_linear_forward_kernel", (16, 4096, 11008), SHARE),
    *_of("sm_90", "gated_linear", "matmul_kernel", (16, 4096, 11008), SHARE),
    *_of("sm_90", "matmul", "matmul_kernel", (16, 4096, 4096), SHARE),
    # One key head is more than L2 holds: eight query heads stream 8192 queries and gradients each.
    *_of("sm_80", "attention causal", KEYS, (1, 64, 8, 8192, 128, 128), HBM),
    *_of("sm_90", "attention causal", KEYS, (1, 64, 8, 8192, 128, 128), HBM),
)
