"""Kernels whose configurations `python -m fastattn tune` measures.

A kernel joins by a `Tunable` in TUNABLES. Its configurations have to come from
`kernels.tuning.choose` under the same name and with the same features.
"""

from .attention import ATTENTION, ATTENTION_HOPPER
from .case import Case, Tunable
from .experts import EXPERTS
from .matmul import MATMUL

TUNABLES = (*ATTENTION_HOPPER, *ATTENTION, *MATMUL, *EXPERTS)

__all__ = ["TUNABLES", "Case", "Tunable"]
