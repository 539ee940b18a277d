"""What flash_attn.layers has of rotary positions."""
