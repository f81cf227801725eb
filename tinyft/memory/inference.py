"""The costs of generation: bytes of weights and cache, operations and bytes for a token.

One multiplication with its addition counts 2 operations. For a token with s keys before it (itself included):

    operations   2 Σ in · out  over the linear maps and the head  +  4 s H D a layer for Q Kᵀ and P V
    cache        2 L B s Hkv D c bytes
    bytes read   all weights but tables of which single rows are looked up, and experts without a token, once for the
                 batch; the cache of each row

The look-up of an embedding is free. A tied head reads the embedding's weight: it counts. Backward takes twice the
forward pass where everything trains, so that training takes 6 N + 12 L s d a token for N weights in products. An
unmerged LoRA adds 2 r (in + out) operations a map, and merged nothing.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import checks, edit
from ..models import EncoderDecoder, SwitchMLP
from ..models.attention import Attention
from ..nn import Cache, Embedding, Module, no_grad
from ..tensor import Tensor
from .training import build, in_bytes, in_flops, without_numbers

__all__ = ["Inference", "inference"]


@dataclass(frozen=True)
class Inference:
    """The costs of one new token for each row of a batch, with `length` keys.

    weights           bytes of all parameters and buffers
    cache             bytes of keys and values, of all rows
    flops_per_token   operations of matrix products for one token of one row
    bytes_per_step    bytes that a step reads: the weights once, and the cache of all rows
    """

    weights: int
    cache: int
    flops_per_token: int
    bytes_per_step: int

    def __str__(self) -> str:
        rows = [("weights", in_bytes(self.weights)), ("cache of keys and values", in_bytes(self.cache)),
                ("products for a token", in_flops(self.flops_per_token)),
                ("read in a step", in_bytes(self.bytes_per_step))]
        return "\n".join(f"  {title:<32}{value:>12}" for title, value in rows)


def inference(model: Any, *, batch: int = 1, length: int = 128, weights: str | None = None) -> Inference:
    """The costs of generation with a model or a configuration; the arguments are those of memory.

    The cache has the dtype of the parameters. ValueError for a model that has no causal attention, and for an
    encoder-decoder."""
    checks.whole("inference: batch", batch, least=1)
    checks.whole("inference: length", length, least=1)
    with without_numbers() as ledger, no_grad():
        sized = build(model, weights)
        if isinstance(sized, EncoderDecoder):
            raise ValueError(f"inference counts models with one stack, got the encoder-decoder {type(sized).__name__}")
        attentions = [m for m in edit.base_modules(sized).values() if isinstance(m, Attention)]
        if not all(m.causal for m in attentions):
            raise ValueError(f"inference wants a model that generates, got a {type(sized).__name__}")
        held = _held(sized)
        number = sized.parameters()[0].dtype.itemsize
        cache = sum(2 * batch * length * m.key_value_heads * m.head_width * number for m in attentions)
        past = Cache()
        if length > 1:
            sized(np.zeros((1, length - 1), np.int64), cache=past)
        with ledger.during("token"):
            sized(np.zeros((1, 1), np.int64), cache=past)
        read = held - _looked_up(sized) - _without_tokens(sized, batch)
    return Inference(weights=held, cache=cache, flops_per_token=ledger.flops["token"], bytes_per_step=read + cache)


def _held(module: Module) -> int:
    """The bytes of all parameters and buffers of a module."""
    arrays = [p.data for p in module.parameters()] + list(module.named_buffers().values())
    return sum(a.nbytes for a in arrays)


def _without_tokens(model: Module, tokens: int) -> int:
    """The bytes of the experts that get none of so many tokens, if each token visits another expert."""
    idle = [expert for m in model.modules() if isinstance(m, SwitchMLP) for expert in m.experts[tokens:]]
    return sum(map(_held, idle))


def _looked_up(model: Module) -> int:
    """The bytes of the embeddings of which a step reads single rows: all that are no output layer as well."""
    tables = [m for m in model.modules() if isinstance(m, Embedding) and not m.tied]
    return sum(m.weight.data.nbytes if isinstance(m.weight, Tensor) else m.weight.nbytes for m in tables)
