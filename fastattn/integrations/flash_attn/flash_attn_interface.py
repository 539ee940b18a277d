"""The functions of flash_attn.flash_attn_interface, each with flash-attn's own signature."""

from .attention import flash_attn_func as flash_attn_func
from .attention import flash_attn_varlen_func as flash_attn_varlen_func
from .cache import flash_attn_with_kvcache as flash_attn_with_kvcache
from .packed import flash_attn_kvpacked_func as flash_attn_kvpacked_func
from .packed import flash_attn_qkvpacked_func as flash_attn_qkvpacked_func
from .packed import flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func
from .packed import flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func
from .passes import _flash_attn_backward as _flash_attn_backward
from .passes import _flash_attn_forward as _flash_attn_forward
from .passes import _flash_attn_varlen_backward as _flash_attn_varlen_backward
from .passes import _flash_attn_varlen_forward as _flash_attn_varlen_forward
