"""The costs of generation: bytes of weights and cache, operations and bytes for a token.

One multiplication with its addition counts 2 operations. For a token with s keys before it (itself included):

    operations   2 Σ in · out  over the linear maps and the head  +  4 s H D a layer for Q Kᵀ and P V
    cache        2 L B s Hkv D c bytes;  for an encoder-decoder also 2 L B S Hkv D c, of a source of S tokens
    bytes read   all weights but tables of which single rows are looked up, and experts without a token, once for the
                 batch; the cache of each row

The decoder of an encoder-decoder attends to S more keys: 4 S H D a layer. Its steps read neither the encoder nor the
maps of the source's keys and values: these ran once, before the first token.

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
from ..models.seq2seq import SinusoidalPositions
from ..nn import Cache, Context, Embedding, Module, no_grad
from ..tensor import Tensor
from .training import build, in_bytes, in_flops, without_numbers

__all__ = ["Inference", "inference"]


@dataclass(frozen=True)
class Inference:
    """The costs of one new token for each row of a batch, with `length` keys, and of a source that has been read.

    weights           bytes of all parameters and buffers
    cache             bytes of keys and values, of all rows; those of a source included
    flops_per_token   operations of matrix products for one token of one row
    bytes_per_step    bytes that a step reads: the weights once, and the cache of all rows
    peak              the most bytes that live at once in greedy generation, one token at a time from the first one: the
                      weights, the cache and working memory; the pass of an encoder included
    """

    weights: int
    cache: int
    flops_per_token: int
    bytes_per_step: int
    peak: int

    def __str__(self) -> str:
        rows = [("weights", in_bytes(self.weights)), ("cache of keys and values", in_bytes(self.cache)),
                ("products for a token", in_flops(self.flops_per_token)),
                ("read in a step", in_bytes(self.bytes_per_step)), ("peak", in_bytes(self.peak))]
        return "\n".join(f"  {title:<32}{value:>12}" for title, value in rows)


def inference(
    model: Any, *, batch: int = 1, length: int = 128, source_length: int | None = None, weights: str | None = None,
) -> Inference:
    """The costs of generation with a model or a configuration; the arguments are those of memory.

    The cache has the dtype of the parameters. ValueError for a model that has no causal attention; TypeError for
    source_length and a model without an encoder."""
    checks.whole("inference: batch", batch, least=1)
    checks.whole("inference: length", length, least=1)
    if source_length is not None:
        checks.whole("inference: source_length", source_length, least=1)
    with without_numbers() as ledger, no_grad():
        sized = build(model, weights).eval()
        ledger.restart_peak()                            # weights that were packed here were never dense elsewhere
        attentions = [m for m in edit.base_modules(sized).values() if isinstance(m, Attention)]
        past = Cache()
        source = None
        if isinstance(sized, EncoderDecoder):
            source, past.source = _read_source(sized, batch, source_length or length)
        elif source_length is not None:
            raise TypeError(f"inference: source_length is for an encoder-decoder, got a {type(sized).__name__}")
        elif not all(m.causal for m in attentions):
            raise ValueError(f"inference wants a model that generates, got a {type(sized).__name__}")
        peak = ledger.peak
        if length > 1:
            sized(np.zeros((batch, length - 1), np.int64), cache=past, source=source)
        ledger.restart_peak()                            # generation has no pass over so many tokens
        with ledger.during("token"):
            sized(np.zeros((batch, 1), np.int64), cache=past, source=source)
        peak = max(peak, ledger.peak)
        number = sized.parameters()[0].dtype.itemsize
        cache = sum(2 * batch * length * m.key_value_heads * m.head_width * number for m in attentions if m.causal)
        cache += sum(k.data.nbytes + v.data.nbytes for k, v in past.source.values())
        held = _held(sized)
        read = held - _looked_up(sized) - _of_the_source(sized) - _without_tokens(sized, batch)
    return Inference(weights=held, cache=cache, flops_per_token=ledger.flops["token"] // batch,
                     bytes_per_step=read + cache, peak=peak)


def _read_source(model: EncoderDecoder, batch: int, length: int) -> tuple[Context, dict[Any, tuple[Tensor, Tensor]]]:
    """The encoder's Context for `batch` sources, and their keys and values in each cross-attention."""
    source = model.encode(np.zeros((batch, length), np.int64))
    first = Cache()
    model(model.start_ids(batch), cache=first, source=source)
    return source, first.source


def _held(module: Module) -> int:
    """The bytes of all parameters and buffers of a module."""
    arrays = [p.data for p in module.parameters()] + list(module.named_buffers().values())
    return sum(a.nbytes for a in arrays)


def _of_the_source(model: Module) -> int:
    """The bytes of what runs once for a source: the encoder, and the maps of its keys and values in the decoder."""
    if not isinstance(model, EncoderDecoder):
        return 0
    cross = [m for m in model.modules() if isinstance(m, Attention) and m.cross]
    return sum(map(_held, [*_encoder_parts(model), *[m.k for m in cross], *[m.v for m in cross]]))


def _encoder_parts(model: EncoderDecoder) -> list[Module]:
    """The blocks of the encoder, and the norm above them if there is one."""
    modules = edit.base_modules(model)
    return [modules[path] for path in (*model.stacks["encoder"], "encoder_norm") if path in modules]


def _without_tokens(model: Module, tokens: int) -> int:
    """The bytes of the experts that get none of so many tokens, if each token visits another expert.

    Those of an encoder do not count here."""
    blocks = model.decoder if isinstance(model, EncoderDecoder) else [model]
    layers = [m for block in blocks for m in block.modules() if isinstance(m, SwitchMLP)]
    return sum(_held(expert) for m in layers for expert in m.experts[tokens:])


def _looked_up(model: Module) -> int:
    """The bytes of the tables of which a step reads single rows: embeddings that are no output layer as well, and
    sinusoids of positions."""
    tables = [m.weight for m in model.modules() if isinstance(m, Embedding) and not m.tied]
    sinusoids = [m.table for m in model.modules() if isinstance(m, SinusoidalPositions)]
    return sum(t.data.nbytes if isinstance(t, Tensor) else t.nbytes for t in [*tables, *sinusoids])
