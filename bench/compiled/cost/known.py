"""Every kernel that is known not to keep the budget of predicted cost, check by check.

The table covers the shapes that the tests compile (`--quick`) of the ops named here, and the bytes
from HBM. `python -m bench.compiled --cost` fails where one of these has a problem that is missing
here, and where one that stands here is gone: the table can only shrink.
"""

from __future__ import annotations

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

KNOWN: tuple[Problem, ...] = ()
