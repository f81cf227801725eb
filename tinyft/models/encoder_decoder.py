"""What all encoder-decoders have in common: the encoder's pass, which comes before the decoder's.

    model(ids (B, T), source_ids=(B, Ts), source_mask=...) -> logits (B, T, V)

The decoder is a causal language model that also attends to a source. `ids` is the decoder's text. It begins with the
start token, and the logits at a position score the next token, so teacher forcing is a call with the whole target:
a batch {"ids": start and target, "source_ids": source} without labels is one of next tokens, as for a GPT.

B batch, T length of the decoder's text, Ts length of the source, C width, V vocabulary.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .. import array, checks
from ..context import read_mask
from ..nn import Context, Embedding, Module
from ..tensor import Tensor

WANTED_SOURCE = "an encoder-decoder wants a source with one token or more in each row"


class EncoderDecoder(Module):
    """A model with a stack of blocks for the source and one for the text.

    encode      runs the encoder alone: source ids -> the Context that `source=` takes
    start_ids   the first column of the decoder's text

    Subclasses set embed, encoder, decoder and head, and write encoder_pass and forward. A forward pass begins with
    `find_source`. A subclass's config has `start`, the token with which the decoder's text begins."""

    embed: Embedding
    encoder: list
    decoder: list
    head_modules: tuple = ()                             # names of the parts of a new task head

    @property
    def stacks(self) -> dict[str, list[str]]:
        """The paths of the blocks of both stacks, bottom to top."""
        encoder = [f"encoder.{i}" for i in range(len(self.encoder))]
        decoder = [f"decoder.{i}" for i in range(len(self.decoder))]
        return {"encoder": encoder, "decoder": decoder}

    def encoder_pass(self, ids: Any, ctx: Context) -> Tensor:
        """The encoder's last hidden states (B, Ts, C) for ids (B, Ts)."""
        raise NotImplementedError(f"{type(self).__name__} has no encoder_pass")

    def start_ids(self, rows: int) -> np.ndarray:
        """The decoder's text before its first step: the start token for each row, (rows, 1)."""
        return np.full((checks.whole("start_ids: rows", rows, least=1), 1), self.config.start)

    def encode(self, ids: Any, mask: Any = None, **facts: Any) -> Context:
        """The encoder's pass over source ids (B, Ts), for model(ids, source=...): computed once, used in many calls.

        mask (B, Ts): True at real tokens. facts: other facts of the pass, such as task and route. ValueError for a
        source without tokens, and for one that is longer than the model's positions."""
        ctx = Context(mask=mask, **facts)
        self.run_encoder(ids, ctx)
        return ctx

    def run_encoder(self, ids: Any, ctx: Context) -> None:
        """Run the encoder on source ids (B, Ts); ctx.last_hidden_state becomes its output (B, Ts, C)."""
        check_source(ids, ctx.mask)
        hidden = self.encoder_pass(ids, ctx)
        ctx.last_hidden_state = hidden
        ctx.output = hidden
        ctx.add_hidden_state(hidden)

    def find_source(self, ctx: Context) -> None:
        """Make ctx.source, the encoder's Context, if it is not there; run the encoder if it has not run.

        A source that was made here has the task, the route and the generator of the decoder's pass, and its auxiliary
        losses. ValueError if the pass has no source."""
        if ctx.source is None:
            if ctx.source_ids is None:
                raise ValueError(f"{WANTED_SOURCE}, got none: call model(ids, source_ids=...)")
            ctx.source = Context(mask=ctx.source_mask, task=ctx.task, route=ctx.route, rng=ctx.rng,
                                 output_hidden_states=ctx.output_hidden_states)
            ctx.source.losses = ctx.losses
            self.run_encoder(ctx.source_ids, ctx.source)
        elif ctx.source.last_hidden_state is None:
            ids = ctx.source.inputs["ids"]
            if ids is None:
                raise ValueError(f"{WANTED_SOURCE}, got a Context without ids: give the ids as source_ids")
            self.run_encoder(ids, ctx.source)

    def check_rows(self, ctx: Context) -> None:
        """ValueError unless source and text have the same number of rows."""
        rows = ctx.source.last_hidden_state.shape[0]
        if rows != ctx.ids.shape[0]:
            raise ValueError(f"an encoder-decoder wants one row of source for each row of ids, got {rows} and "
                             f"{ctx.ids.shape[0]}")


def check_source(ids: Any, mask: Any) -> None:
    """ValueError for a source without a column, and for a row of padding alone. Arrays on a device are not read."""
    shape = array.shape_of(ids)
    if len(shape) == 2 and shape[1] == 0:
        raise ValueError(f"{WANTED_SOURCE}, got shape {shape}")
    if mask is None:
        return
    real = read_mask("source_mask", mask)
    if real.shape != shape[:2]:
        raise ValueError(f"source_mask has shape {real.shape}, source_ids {shape[:2]}: both want one entry per token")
    if isinstance(real, np.ndarray) and not real.any(axis=1).all():
        row = int(real.any(axis=1).argmin())
        raise ValueError(f"{WANTED_SOURCE}, got an empty one in row {row}")
