"""The transformers, each in one file; their parts are in blocks.py."""
from .bert import BERT, BERTConfig
from .gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig", "BERT", "BERTConfig"]
