"""A model that predicts from a kernel's machine code how fast it will be. It measures nothing."""
