"""What a call costs on the host."""

import os

# Read when kernels are decorated; the interpreter would launch them for real.
os.environ.pop("TRITON_INTERPRET", None)
