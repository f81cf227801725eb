"""BERT on disk: the names, shapes and conventions of `model_type: bert`.

Linear weights are (out, in), as ours. Old files call a layer norm's tensors gamma and beta. The decoder of the
masked-language-model head is the word embedding and usually absent; its bias may have two names. The
next-sentence head is not read.

In the shapes: C width, F feed-forward width, V vocabulary, T positions, S token types.
"""
from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from ..models import BERT, BERTConfig
from ..models.bert import MaskedHead
from ..models.blocks import Classifier
from ..nn import Module
from .config import (
    architecture,
    check_settings,
    check_tied,
    class_count,
    number,
    size,
)
from .family import Family
from .layout import FileTensor, Plan, Table, ZeroGenerator, add_stored_classifier

# The head of each class of transformers.
HEADS = {
    "BertForMaskedLM": "mlm",
    "BertForPreTraining": "mlm",
    "BertForSequenceClassification": "classes",
    "BertModel": None,
}
WRITTEN_AS = {"mlm": "BertForMaskedLM", "classes": "BertForSequenceClassification", None: "BertModel"}
# The dropout rates in config.json and their defaults. Our BERT has one rate.
DROPOUTS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "classifier_dropout": 0.0}
# Settings of which our BERT has one value. With a position_embedding_type of null, transformers adds no positions.
FIXED = {
    "hidden_act": ("gelu", "gelu_python"),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
}
LAYER_NORM = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# The parts of a block, here and in the file.
BLOCK = {
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "norm2": "output.LayerNorm",
}


class BERTFamily(Family):
    """BERT in the layout of transformers.

    title       in messages
    prefix      of the names of the body's tensors, in files of the classes with a head
    heads       {class of transformers: head};  written_as  {head: class}
    head_names  the beginnings of the names of the heads' tensors, which have no prefix
    """
    model_type = "bert"
    model = BERT
    title = "BERT"
    tied = {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias"}
    prefix = "bert."
    heads: dict[str, str | None] = HEADS
    written_as: dict[str | None, str] = WRITTEN_AS
    head_names = ("cls.", "classifier.")
    has_experts = False                                  # True: the models with Switch layers (switch.py)

    def table_name(self, name: str) -> str | None:
        """The name without the prefix, gamma and beta of a layer norm as weight and bias; None if it is not read."""
        name = name.removeprefix(self.prefix)
        if name == "embeddings.position_ids" or name.startswith("cls.seq_relationship."):
            return None
        return re.sub(r"\bLayerNorm\.(gamma|beta)$", lambda match: LAYER_NORM[match[0]], name)

    def read_config(self, config: dict, names: Collection[str]) -> Plan:
        """The plan of the BERT that config.json describes. Its dropout rate is the largest of the three in config.json.

        names: of the file's tensors, without the prefix. They decide on the pooler, and on the head if config.json
        names no class. ValueError for a setting that our BERT does not have.
        """
        check_settings(config, FIXED, self.title)
        named = architecture(config, self.heads)
        head = self.heads[named] if named is not None else self.head_among(names)
        if head == "mlm":
            check_tied(config, self.title)
        model_config = self.read_sizes(config)
        pooler = head == "classes" or any(name.startswith("pooler.") for name in names)
        return Plan(model_config, head, class_count(config) if head == "classes" else 0, pooler=pooler)

    def read_sizes(self, config: dict) -> BERTConfig:
        """The sizes and rates of config.json."""
        return BERTConfig(
            vocab=size(config, "vocab_size", 30522),
            positions=size(config, "max_position_embeddings", 512),
            token_types=size(config, "type_vocab_size", 2),
            width=size(config, "hidden_size", 768),
            layers=size(config, "num_hidden_layers", 12),
            heads=size(config, "num_attention_heads", 12),
            hidden=size(config, "intermediate_size", 3072),
            dropout=max(number(config, key, default, below=1) for key, default in DROPOUTS.items()),
            eps=number(config, "layer_norm_eps", 1e-12))

    def head_among(self, names: Collection[str]) -> str | None:
        """The head that tensors of these names belong to."""
        if "classifier.weight" in names:
            return "classes"
        return "mlm" if any(name.startswith("cls.predictions.") for name in names) else None

    def table(self, plan: Plan) -> Table:
        """{name in the model: FileTensor}: the name in a file and the shape of every tensor of the plan's BERT."""
        return body_table(plan.config, "encoder.layer", BLOCK) | self.head_table(plan)

    def head_table(self, plan: Plan) -> Table:
        """The entries of the pooler and the head."""
        c = plan.config
        C = c.width
        table: Table = {}
        if plan.pooler:
            table |= weight_and_bias("pooler.dense", "pooler.dense", C, C)
        if plan.head == "mlm":
            table |= weight_and_bias("head.dense", "cls.predictions.transform.dense", C, C)
            table |= weight_and_bias("head.norm", "cls.predictions.transform.LayerNorm", C)
            table["head.decoder.bias"] = FileTensor("cls.predictions.bias", (c.vocab,))
        if plan.head == "classes":
            table |= weight_and_bias("head.out", "classifier", plan.classes, C)
        return table

    def build(self, plan: Plan) -> BERT:
        """The BERT of a plan, with zeros in its matrices."""
        return build_bert(plan)

    def holds(self, model: Module) -> bool:
        """True for a BERT with the settings of this family."""
        if not super().holds(model) or (model.config.switch is not None) != self.has_experts:
            return False
        return self.has_settings(model.config)

    def has_settings(self, c: BERTConfig) -> bool:
        """True if the settings beside the sizes are those of this family."""
        return c.token_types > 0 and c.first_position == 0 and c.pooler_activation == "tanh" and c.keep_pooler

    def plan_of(self, model: Module) -> Plan:
        """The plan of this BERT. ValueError for a head other than the masked one, the classifier and none.

        The classifier must have a bias and read the pooler, as BertForSequenceClassification does.
        """
        return plan_of_bert(model, self.model_type)

    def write_config(self, plan: Plan) -> dict[str, Any]:
        """The config.json of a plan, with transformers' keys. Our one dropout rate stands under all three keys."""
        c = plan.config
        return {
            "model_type": self.model_type,
            "architectures": [self.written_as[plan.head]],
            "vocab_size": c.vocab,
            "max_position_embeddings": c.first_position + c.positions,
            "type_vocab_size": c.token_types,
            "hidden_size": c.width,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "intermediate_size": c.hidden or 4 * c.width,
            "hidden_act": "gelu",
            "layer_norm_eps": c.eps,
            **dict.fromkeys(DROPOUTS, c.dropout),
            "position_embedding_type": "absolute",
            "tie_word_embeddings": True}

    def file_name(self, name: str, plan: Plan) -> str:
        """The table name with the prefix, except for heads and for a model without a head, which has no prefix."""
        if plan.head is None or name.startswith(self.head_names):
            return name
        return self.prefix + name


# ── parts of the three families with a BERT ──────────────────────────────────────────────────────────────────────────
def body_table(c: BERTConfig, layer: str, block: dict[str, str]) -> Table:
    """The entries of the embeddings and of all blocks.

    layer: the name of the list of blocks in the file. block: {part of a block here: its name in the file}."""
    C = c.width
    F = c.hidden or 4 * C
    table = {
        "embed.weight": FileTensor("embeddings.word_embeddings.weight", (c.vocab, C)),
        "pos.weight": FileTensor("embeddings.position_embeddings.weight", (c.first_position + c.positions, C))}
    if c.token_types:
        table["type.weight"] = FileTensor("embeddings.token_type_embeddings.weight", (c.token_types, C))
    table |= weight_and_bias("norm0", "embeddings.LayerNorm", C)
    shapes = {"mlp.up": (F, C), "mlp.down": (C, F), "norm1": (C,), "norm2": (C,)}           # all others are (C, C)
    for i in range(c.layers):
        for ours, stored in block.items():
            shape = shapes.get(ours, (C, C))
            table |= weight_and_bias(f"blocks.{i}.{ours}", f"{layer}.{i}.{stored}", *shape)
    return table


def build_bert(plan: Plan) -> BERT:
    """The BERT of a plan, with zeros in its matrices."""
    head = "mlm" if plan.head == "mlm" else None
    model = BERT(plan.config, seed=ZeroGenerator(), head=head, pooler=plan.pooler)
    if plan.head == "classes":
        add_stored_classifier(model, plan.classes)
    return model


def plan_of_bert(model: Module, family: str) -> Plan:
    """The plan of a BERT. ValueError for a head other than the masked one, a classifier with bias and pooler, and none.

    family: the name for the message."""
    head = model.head
    pooler = model.pooler is not None
    if head is None:
        return Plan(model.config, None, pooler=pooler)
    if type(head) is MaskedHead:
        return Plan(model.config, "mlm", pooler=pooler)
    if type(head) is Classifier and head.out.bias is not None and pooler:
        return Plan(model.config, "classes", head.out_features, pooler=True)
    raise ValueError(f"a {family} directory wants a masked head, a classifier with bias and pooler, or none; "
                     f"got a {type(head).__name__}")


def weight_and_bias(ours: str, stored: str, *shape: int) -> Table:
    """A weight of this shape and its bias, of a linear map or a layer norm."""
    weight = FileTensor(f"{stored}.weight", shape)
    bias = FileTensor(f"{stored}.bias", shape[:1])
    return {f"{ours}.weight": weight, f"{ours}.bias": bias}
