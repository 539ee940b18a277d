"""The names by which Hugging Face's models ask for attention, and for experts."""

from transformers import AttentionInterface, AttentionMaskInterface

from ..flash_attn.cache import flash_attn_with_kvcache
from .attention import attention_forward
from .experts import experts_forward
from .flash import flash_attn_func, flash_attn_varlen_func
from .masks import attention_mask
from .private import offer_functions, register_experts

NAME = "fastattn"

PACKING_NAME = "flash_fastattn"
"""The same attention. Where a name has "flash" in it, vision towers hand over all images of a batch
in one call, with the places where each ends, instead of one call an image; and `generate_batch`
takes it."""

BATCHING_NAME = "flash_fastattn_2"
"""The same once more. On CUDA `generate_batch` hands over the pages of its cache as they are where
the name says that it is of flash-attn's version 2, and to others copies of all keys."""


def register() -> None:
    """Make the names known to transformers, the first for experts too; any number of times.

    Nothing changes in models that do not ask for them. Where a version of transformers looks for
    flash-attn's functions in another way than the known one, there is only the first name.
    """
    functions = (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)
    others = (PACKING_NAME, BATCHING_NAME)
    names = [NAME, *(name for name in others if offer_functions(name, functions))]
    for name in names:
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, attention_mask)
    register_experts(NAME, experts_forward)
