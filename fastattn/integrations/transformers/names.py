"""The names by which Hugging Face's models ask for attention, and for experts."""

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import attention_forward
from .experts import experts_forward
from .flash import flash_attn_func, flash_attn_varlen_func
from .masks import attention_mask
from .private import offer_functions, register_experts

NAME = "fastattn"

PACKING_NAME = "flash_fastattn"
"""The same attention. Where a name has "flash" in it, vision towers hand over all images of a batch
in one call, with the places where each ends, instead of one call an image."""


def register() -> None:
    """Make both names known to transformers, the first for experts too; any number of times.

    Nothing changes in models that do not ask for them. Where a version of transformers looks for
    flash-attn's functions in another way than the known one, there is only the first name.
    """
    names = [NAME]
    if offer_functions(PACKING_NAME, (flash_attn_func, flash_attn_varlen_func)):
        names.append(PACKING_NAME)
    for name in names:
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, attention_mask)
    register_experts(NAME, experts_forward)
