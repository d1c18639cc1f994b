"""Checkpoints of Hugging Face transformers: families, tensor names, import and export."""
