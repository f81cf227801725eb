"""The transformers, each in one file; their parts are in blocks.py."""
from .bert import BERT, BERTConfig
from .blocks import RotaryScaling
from .gpt import GPT, GPTConfig
from .llama import Llama, LlamaConfig

__all__ = ["GPT", "GPTConfig", "BERT", "BERTConfig", "Llama", "LlamaConfig", "RotaryScaling"]
