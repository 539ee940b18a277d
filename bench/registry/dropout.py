"""Dropout."""

from __future__ import annotations

import torch.nn.functional as F

import fastattn

from ..op import Benchmark, Op
from ..sizes import DROPOUT, SMALL_ROW_SIZES
from ..traffic import dropout_traffic

OPS = (
    Op(
        "dropout",
        fastattn.dropout,
        lambda rows, columns: {"x": (rows, columns), "p": DROPOUT},
        shapes=[(4096, 4096)],
        quick_shapes=[(4096, 4096)],
        small=(8, 256),
        torch=lambda x, p: F.dropout(x, p),
        benchmark=Benchmark(
            [(2**26 // cols, cols) for cols in (4096, 1024, 65536)],
            SMALL_ROW_SIZES,
            dropout_traffic,
            random=True,
        ),
    ),
)
