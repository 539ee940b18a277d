"""The machine code of every kernel, for GPUs that need not be there."""
