"""What flash_attn.modules has of multi-head attention."""
