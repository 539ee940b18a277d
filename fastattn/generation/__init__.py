"""Generating tokens with the models of `fastattn.models`."""

from .generate import generate, stream
from .results import Generated, Step
from .sampling import choose_tokens

__all__ = ["Generated", "Step", "choose_tokens", "generate", "stream"]
