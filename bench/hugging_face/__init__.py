"""Models of Hugging Face's transformers, as they are, patched by Liger, and patched by ours."""
