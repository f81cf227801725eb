"""RoBERTa on disk: `model_type: roberta`.  BERT's layout with the prefix `roberta.` and other names of the heads.

The first token has the position pad_token_id + 1: the rows of the position table up to pad_token_id are never used.
transformers takes the positions from the ids, which are not pad_token_id at real tokens; ours follow from the mask.

The classifier has a tanh layer of its own, `classifier.dense`, which is our model's pooler. RobertaModel has a pooler
as well, which pretraining does not train; a file of a classifier may hold it, and it is not read there.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from ..models import BERTConfig
from .bert import BERTFamily, weight_and_bias
from .config import short
from .layout import FileTensor, Plan, Table

HEADS = {
    "RobertaForMaskedLM": "mlm",
    "RobertaForSequenceClassification": "classes",
    "RobertaModel": None,
}
WRITTEN_AS = {"mlm": "RobertaForMaskedLM", "classes": "RobertaForSequenceClassification", None: "RobertaModel"}


class RoBERTaFamily(BERTFamily):
    """RoBERTa in the layout of transformers."""
    model_type = "roberta"
    title = "RoBERTa"
    tied = {"lm_head.decoder.weight": "embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias"}
    prefix = "roberta."
    heads: dict[str, str | None] = HEADS
    written_as: dict[str | None, str] = WRITTEN_AS
    head_names = ("lm_head.", "classifier.")

    def read_sizes(self, config: dict) -> BERTConfig:
        """The sizes and rates of config.json. The model has as many positions as rows come after pad_token_id."""
        sizes = super().read_sizes({"vocab_size": 50265, **config})
        padding = config.get("pad_token_id", 1)
        largest = sizes.positions - 2                      # one row is left for the first token
        if type(padding) is not int or not 0 <= padding <= largest:
            raise ValueError(f"config.json: pad_token_id wants a whole number from 0 to {largest}, as the positions "
                             f"begin after it, got {short(padding)}")
        first = padding + 1
        return dataclasses.replace(
            sizes, positions=sizes.positions - first, first_position=first, keep_pooler=False)

    def head_among(self, names: Collection[str]) -> str | None:
        """The head that tensors of these names belong to."""
        if "classifier.out_proj.weight" in names:
            return "classes"
        return "mlm" if any(name.startswith("lm_head.") for name in names) else None

    def unused(self, plan: Plan) -> Collection[str]:
        """The pooler, in a file of a classifier."""
        return ("pooler.dense.weight", "pooler.dense.bias") if plan.head == "classes" else ()

    def head_table(self, plan: Plan) -> Table:
        """The entries of the pooler and the head."""
        c = plan.config
        C = c.width
        if plan.head == "classes":
            table = weight_and_bias("pooler.dense", "classifier.dense", C, C)
            return table | weight_and_bias("head.out", "classifier.out_proj", plan.classes, C)
        table = weight_and_bias("pooler.dense", "pooler.dense", C, C) if plan.pooler else {}
        if plan.head == "mlm":
            table |= weight_and_bias("head.dense", "lm_head.dense", C, C)
            table |= weight_and_bias("head.norm", "lm_head.layer_norm", C)
            table["head.decoder.bias"] = FileTensor("lm_head.bias", (c.vocab,))
        return table

    def has_settings(self, c: BERTConfig) -> bool:
        """True if the settings beside the sizes are those of RoBERTa."""
        return c.token_types > 0 and c.first_position > 0 and c.pooler_activation == "tanh" and not c.keep_pooler

    def write_config(self, plan: Plan) -> dict[str, Any]:
        """The config.json of a plan, with transformers' keys. pad_token_id decides on the first position."""
        return {**super().write_config(plan), "pad_token_id": plan.config.first_position - 1}
