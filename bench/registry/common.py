"""Sizes, settings and bytes that entries of several families share."""

DROPOUT = 0.1

# 128 MiB a tensor in bfloat16, which no L2 cache holds.
ROW_SIZES = [(2**26 // cols, cols) for cols in (4096, 1024, 16384, 65536, 8192, 32768, 2048)]
SMALL_ROW_SIZES = [(512, 1024), (16, 32768), (2048, 256), (64, 8192)]

STATISTIC = 4
"""Bytes of a float32: saved statistics and partial sums."""

SEED = 8
"""Bytes of a dropout seed."""

TARGET = 8
"""Bytes of a class index."""
