"""The transformers, each in one file; their parts are in blocks.py, attention.py and rotary.py."""
from .bert import BERT, BERTConfig
from .gpt import GPT, GPTConfig
from .llama import Llama, LlamaConfig
from .moe import SwitchConfig, SwitchMLP
from .rotary import RotaryScaling

__all__ = ["GPT", "GPTConfig", "BERT", "BERTConfig", "Llama", "LlamaConfig", "RotaryScaling", "SwitchConfig",
           "SwitchMLP"]
