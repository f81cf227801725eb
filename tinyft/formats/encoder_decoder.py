"""The base of the families of encoder-decoders, Marian and T5: what both have in common on disk."""
from __future__ import annotations

from typing import Any

from ..models.encoder_decoder import EncoderDecoder
from .family import Family
from .layout import Plan, ZeroGenerator


class EncoderDecoderFamily(Family):
    """A family whose files may hold one matrix, embedding and output layer, under several names."""

    model: type[EncoderDecoder]
    tied = {
        "lm_head.weight": "shared.weight",
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def build(self, plan: Plan) -> EncoderDecoder:
        """The model of a plan, with zeros in its matrices. Without a head it gives the decoder's hidden states."""
        model = self.model(plan.config, seed=ZeroGenerator())
        if plan.head is None:
            model.head = None
            model.embed.tied = False
        return model

    def fallbacks(self, plan: Plan) -> dict[str, Any]:
        """The padding token is the start token. transformers' own default may be outside the vocabulary."""
        return {"pad_token_id": plan.config.start}
