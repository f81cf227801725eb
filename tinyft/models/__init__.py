"""The transformers, each in one file; their parts are in blocks.py, attention.py and rotary.py."""
from .bert import BERT, BERTConfig
from .encoder_decoder import EncoderDecoder
from .gpt import GPT, GPTConfig
from .llama import Llama, LlamaConfig
from .moe import SwitchConfig, SwitchMLP
from .rotary import RotaryScaling
from .seq2seq import Seq2Seq, Seq2SeqConfig
from .t5 import T5, T5Config

__all__ = [
    "GPT", "GPTConfig", "BERT", "BERTConfig", "Llama", "LlamaConfig", "RotaryScaling", "SwitchConfig", "SwitchMLP",
    "EncoderDecoder", "Seq2Seq", "Seq2SeqConfig", "T5", "T5Config",
]
