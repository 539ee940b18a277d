"""flash-attn's functions by their own names and signatures, computed by fastattn.

    from fastattn.integrations.flash_attn import flash_attn_func
    from fastattn.integrations.flash_attn.bert_padding import pad_input, unpad_input

The modules lie as in the package flash_attn, so that the import is all that changes. For libraries
whose imports cannot be changed there is `install_as_flash_attn`.
"""

from .flash_attn_interface import flash_attn_func as flash_attn_func
from .flash_attn_interface import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from .flash_attn_interface import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from .flash_attn_interface import flash_attn_varlen_func as flash_attn_varlen_func
from .flash_attn_interface import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
from .flash_attn_interface import (
    flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func,
)
from .flash_attn_interface import flash_attn_with_kvcache as flash_attn_with_kvcache
from .install import install_as_flash_attn as install_as_flash_attn
from .install import uninstall_as_flash_attn as uninstall_as_flash_attn

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install_as_flash_attn",
    "uninstall_as_flash_attn",
]
