"""The functions of flash_attn.flash_attn_interface, each with flash-attn's own signature."""

from .attention import flash_attn_func as flash_attn_func
from .attention import flash_attn_varlen_func as flash_attn_varlen_func
