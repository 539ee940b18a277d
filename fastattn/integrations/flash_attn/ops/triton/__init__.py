"""What flash_attn.ops.triton has of norms and cross entropy."""
