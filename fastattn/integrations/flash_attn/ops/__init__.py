"""What flash_attn.ops has of activations and products."""
