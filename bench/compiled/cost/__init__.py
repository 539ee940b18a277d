"""A model that predicts from a kernel's machine code how fast it will be. It measures nothing."""

PEERS = "bench.compiled.cost.peers"
"""The module whose OPS are others' kernels."""

TUTORIAL = "FASTATTN_TRITON_TUTORIAL"
"""The variable of the environment that hands the tutorial's file on to compiling processes."""
