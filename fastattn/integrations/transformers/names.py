"""The names by which Hugging Face's models ask for attention."""

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import attention_forward
from .masks import attention_mask

NAME = "fastattn"


def register() -> None:
    """Make `attn_implementation="fastattn"` known to transformers; any number of times."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
