"""Generating tokens with the models of `fastattn.models`."""

from .generate import Generated, generate, stream
from .sampling import choose_tokens

__all__ = ["Generated", "choose_tokens", "generate", "stream"]
