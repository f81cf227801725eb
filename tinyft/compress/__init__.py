"""Compressed weights: the block formats of GGUF files (ggml.py)."""
from .ggml import FORMATS, Q4_0, Q4_1, Q8_0

__all__ = ["FORMATS", "Q4_0", "Q4_1", "Q8_0"]
