"""What flash_attn.losses has of cross entropy."""
