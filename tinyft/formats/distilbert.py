"""DistilBERT on disk: the names, shapes and conventions of `model_type: distilbert`.

A BERT without token types and without a pooler, under names of its own. The classifier has a layer with a ReLU,
`pre_classifier`, which is our model's pooler. ε is 1e-12 in every layer norm, whatever config.json says.
"""
from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..models import BERT, BERTConfig
from ..nn import Module
from .bert import body_table, build_bert, plan_of_bert, weight_and_bias
from .config import (
    architecture,
    check_settings,
    check_tied,
    class_count,
    number,
    size,
    with_one_name,
)
from .family import Family
from .layout import FileTensor, Plan, Table

# The head of each class of transformers.
HEADS = {
    "DistilBertForMaskedLM": "mlm",
    "DistilBertForSequenceClassification": "classes",
    "DistilBertModel": None,
}
WRITTEN_AS = {
    "mlm": "DistilBertForMaskedLM",
    "classes": "DistilBertForSequenceClassification",
    None: "DistilBertModel",
}
# Other names of settings: transformers' attribute_map.
ALIASES = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
# The dropout rates in config.json and their defaults: of every class, and of a classifier. Our model has one rate.
DROPOUTS = {"dropout": 0.1, "attention_dropout": 0.1}
CLASSIFIER_DROPOUT = {"seq_classif_dropout": 0.2}
FIXED = {"activation": ("gelu", "gelu_python")}
EPS = 1e-12
BLOCK = {
    "attn.q": "attention.q_lin",
    "attn.k": "attention.k_lin",
    "attn.v": "attention.v_lin",
    "attn.o": "attention.out_lin",
    "norm1": "sa_layer_norm",
    "mlp.up": "ffn.lin1",
    "mlp.down": "ffn.lin2",
    "norm2": "output_layer_norm",
}
HEAD_NAMES = ("vocab_", "pre_classifier.", "classifier.")


class DistilBERTFamily(Family):
    """DistilBERT in the layout of transformers."""
    model_type = "distilbert"
    model = BERT
    tied = {"vocab_projector.weight": "embeddings.word_embeddings.weight"}

    def table_name(self, name: str) -> str | None:
        """The name without `distilbert.`; None for the numbers of the positions."""
        name = name.removeprefix("distilbert.")
        return None if name == "embeddings.position_ids" else name

    def read_config(self, config: dict, names: Collection[str]) -> Plan:
        """The plan of the BERT that config.json describes. Its dropout rate is the largest of those in config.json.

        names: of the file's tensors, without `distilbert.`. They decide on the head if config.json names no class.
        ValueError for a setting that our BERT does not have.
        """
        config = with_one_name(config, ALIASES)
        check_settings(config, FIXED, "DistilBERT")
        named = architecture(config, HEADS)
        head = HEADS[named] if named is not None else head_among(names)
        if head == "mlm":
            check_tied(config, "DistilBERT")
        rates = DROPOUTS | CLASSIFIER_DROPOUT if head == "classes" else DROPOUTS
        model_config = BERTConfig(
            vocab=size(config, "vocab_size", 30522),
            positions=size(config, "max_position_embeddings", 512),
            token_types=0,
            width=size(config, "dim", 768),
            layers=size(config, "n_layers", 6),
            heads=size(config, "n_heads", 12),
            hidden=size(config, "hidden_dim", 3072),
            dropout=max(number(config, key, default, below=1) for key, default in rates.items()),
            eps=EPS,
            pooler_activation="relu")
        classes = class_count(config) if head == "classes" else 0
        return Plan(model_config, head, classes, pooler=head == "classes")

    def table(self, plan: Plan) -> Table:
        """{name in the model: FileTensor}: the name in a file and the shape of every tensor of the plan's BERT."""
        c = plan.config
        C = c.width
        table = body_table(c, "transformer.layer", BLOCK)
        if plan.head == "mlm":
            table |= weight_and_bias("head.dense", "vocab_transform", C, C)
            table |= weight_and_bias("head.norm", "vocab_layer_norm", C)
            table["head.decoder.bias"] = FileTensor("vocab_projector.bias", (c.vocab,))
        if plan.head == "classes":
            table |= weight_and_bias("pooler.dense", "pre_classifier", C, C)
            table |= weight_and_bias("head.out", "classifier", plan.classes, C)
        return table

    def build(self, plan: Plan) -> BERT:
        """The BERT of a plan, with zeros in its matrices."""
        return build_bert(plan)

    def holds(self, model: Module) -> bool:
        """True for a BERT with the settings of DistilBERT."""
        if type(model) is not self.model or model.config.switch is not None:
            return False
        c = model.config
        has_its_parts = c.token_types == 0 and c.first_position == 0 and c.pooler_activation == "relu"
        return has_its_parts and c.keep_pooler and c.eps == EPS

    def plan_of(self, model: Module) -> Plan:
        """The plan of this BERT. ValueError for a head other than the masked one, the classifier and none.

        The classifier must have a bias and read the pooler; without a classifier there must be no pooler."""
        plan = plan_of_bert(model, "distilbert")
        if plan.pooler and plan.head != "classes":
            raise ValueError("a distilbert directory wants a pooler below a classifier only, got a pooler without one")
        return plan

    def write_config(self, plan: Plan) -> dict[str, Any]:
        """The config.json of a plan, with transformers' keys. Our one dropout rate stands under all three keys."""
        c = plan.config
        return {
            "model_type": self.model_type,
            "architectures": [WRITTEN_AS[plan.head]],
            "vocab_size": c.vocab,
            "max_position_embeddings": c.positions,
            "dim": c.width,
            "n_layers": c.layers,
            "n_heads": c.heads,
            "hidden_dim": c.hidden or 4 * c.width,
            "activation": "gelu",
            "sinusoidal_pos_embds": False,
            **dict.fromkeys(DROPOUTS | CLASSIFIER_DROPOUT, c.dropout),
            "tie_word_embeddings": True}

    def file_name(self, name: str, plan: Plan) -> str:
        """The table name with `distilbert.` in front, except for heads and for a model without a head."""
        if plan.head is None or name.startswith(HEAD_NAMES):
            return name
        return f"distilbert.{name}"


def head_among(names: Collection[str]) -> str | None:
    """The head that tensors of these names belong to."""
    if "classifier.weight" in names:
        return "classes"
    return "mlm" if any(name.startswith("vocab_") for name in names) else None
