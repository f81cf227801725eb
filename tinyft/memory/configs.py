"""The sizes of well-known models, for accounts without their weights."""
from __future__ import annotations

from typing import Any

from ..models import BERTConfig, GPTConfig, LlamaConfig, Seq2SeqConfig, T5Config

__all__ = ["CONFIGS"]


def _llama(width: int, layers: int, heads: int, hidden: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(width=width, layers=layers, heads=heads, hidden=hidden, **more)


CONFIGS: dict[str, Any] = {
    "bert-base": BERTConfig(),
    "bert-large": BERTConfig(width=1024, layers=24, heads=16),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(width=1024, layers=24, heads=16),
    "gpt2-large": GPTConfig(width=1280, layers=36, heads=20),
    "gpt2-xl": GPTConfig(width=1600, layers=48, heads=25),
    "gpt3": GPTConfig(width=12288, layers=96, heads=96, positions=2048),
    "smollm2-135m": _llama(576, 30, 9, 1536, vocab=49152, positions=8192, key_value_heads=3, tied=True),
    "tinyllama-1.1b": _llama(2048, 22, 32, 5632, key_value_heads=4),
    "llama-7b": _llama(4096, 32, 32, 11008),
    "llama-13b": _llama(5120, 40, 40, 13824),
    "llama-65b": _llama(8192, 80, 64, 22016),
    "llama3-8b": _llama(4096, 32, 32, 14336, vocab=128256, positions=8192, key_value_heads=8),
    "mistral-7b": _llama(4096, 32, 32, 14336, positions=32768, key_value_heads=8),
    "opus-mt": Seq2SeqConfig(),
    "t5-small": T5Config(),
    "t5-base": T5Config(width=768, layers=12, heads=12),
    "t5-large": T5Config(width=1024, layers=24, heads=16),
}
