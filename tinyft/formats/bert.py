"""BERT on disk: the names, shapes and traps of `model_type: bert`.    C width, F feed-forward width, V vocabulary, T positions, S types

Linear weights are (out, in), as ours.  Old files call a layer norm's tensors gamma and beta.  The decoder of the masked-language-model
head is the word embedding, and usually absent; its bias may stand there twice.  The next-sentence head is not read.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..models import BERT, BERTConfig
from ..models.bert import MaskedHead
from ..models.blocks import Classifier
from .layout import Blank, Place, Plan, classes_of, head_of, must_be, number, size

MODEL = BERT
HEADS = {"BertForMaskedLM": "mlm", "BertForPreTraining": "mlm", "BertForSequenceClassification": "classes", "BertModel": None}
TIED = {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",             # other names of the same tensors
        "cls.predictions.decoder.bias": "cls.predictions.bias"}
PARTS = {"attn.q": "attention.self.query", "attn.k": "attention.self.key", "attn.v": "attention.self.value",
         "attn.o": "attention.output.dense", "norm1": "attention.output.LayerNorm",
         "mlp.up": "intermediate.dense", "mlp.down": "output.dense", "norm2": "output.LayerNorm"}


def rename(name: str) -> str | None:
    "The name as the table below has it; None for what is not read.  gamma and beta mean a layer norm's only after `LayerNorm.`"
    name = name.removeprefix("bert.")
    if name == "embeddings.position_ids" or name.startswith("cls.seq_relationship."):
        return None
    return re.sub(r"\bLayerNorm\.(gamma|beta)$", lambda m: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[m[1]], name)


def plan(config: dict, names: Iterable[str]) -> Plan:
    "What config.json asks for.  ValueError for what our BERT cannot compute."
    must_be(config, "hidden_act", ["gelu"], "BERT")
    must_be(config, "position_embedding_type", ["absolute", None], "BERT")
    must_be(config, "is_decoder", [False], "BERT")
    must_be(config, "add_cross_attention", [False], "BERT")
    head = head_of(config, HEADS)
    if head is ...:
        head = "classes" if "classifier.weight" in names else "mlm" if any(n.startswith("cls.predictions.") for n in names) else None
    rates = ("hidden_dropout_prob", 0.1), ("attention_probs_dropout_prob", 0.1), ("classifier_dropout", 0.0)
    sizes = BERTConfig(vocab=size(config, "vocab_size", 30522), positions=size(config, "max_position_embeddings", 512),
                       token_types=size(config, "type_vocab_size", 2), width=size(config, "hidden_size", 768),
                       layers=size(config, "num_hidden_layers", 12), heads=size(config, "num_attention_heads", 12),
                       hidden=size(config, "intermediate_size", 3072), eps=number(config, "layer_norm_eps", 1e-12),
                       dropout=max(number(config, k, d, below=1) for k, d in rates))                        # ours has one rate
    pooler = head == "classes" or any(n.startswith("pooler.") for n in names)
    return Plan(sizes, head, classes_of(config) if head == "classes" else 0, pooler)


def places(p: Plan) -> dict[str, Place]:
    "{our name: where it stands}."
    c = p.config
    C, F = c.width, c.hidden or 4 * c.width
    out = {f"{ours}.weight": Place(f"embeddings.{theirs}_embeddings.weight", (n, C))
           for ours, theirs, n in (("embed", "word", c.vocab), ("pos", "position", c.positions), ("type", "token_type", c.token_types))}

    def add(ours: str, theirs: str, *shape: int) -> None:
        out[f"{ours}.weight"], out[f"{ours}.bias"] = Place(f"{theirs}.weight", shape), Place(f"{theirs}.bias", shape[:1])

    add("norm0", "embeddings.LayerNorm", C)
    shapes = {"mlp.up": (F, C), "mlp.down": (C, F), "norm1": (C,), "norm2": (C,)}
    for i in range(c.layers):
        for ours, theirs in PARTS.items():
            add(f"blocks.{i}.{ours}", f"encoder.layer.{i}.{theirs}", *shapes.get(ours, (C, C)))
    if p.pooler:
        add("pooler.dense", "pooler.dense", C, C)
    if p.head == "mlm":
        add("head.dense", "cls.predictions.transform.dense", C, C)
        add("head.norm", "cls.predictions.transform.LayerNorm", C)
        out["head.decoder.bias"] = Place("cls.predictions.bias", (c.vocab,))
    if p.head == "classes":
        add("head.out", "classifier", p.classes, C)
    return out


def blank(p: Plan) -> BERT:
    "The model of a plan, all zeros."
    model = BERT(p.config, Blank(), "mlm" if p.head == "mlm" else None, p.pooler)
    if p.head == "classes":
        model.new_head(p.classes, Blank())
        model.head_modules = ()                                 # this head comes from the file: part of the model, not new
    return model


def plan_of(model: BERT) -> Plan:
    "The plan that would build this model."
    pooler = model.pooler is not None
    if model.head is None:
        return Plan(model.config, None, 0, pooler)
    if type(model.head) is Classifier and model.head.out.bias is not None and pooler:
        return Plan(model.config, "classes", model.head.out_features, True)
    if type(model.head) is not MaskedHead:
        raise ValueError(f"a BERT directory has no room for this head, a {type(model.head).__name__}")
    return Plan(model.config, "mlm", 0, pooler)


def config_of(p: Plan) -> dict[str, Any]:
    "config.json."
    c = p.config
    architecture = {"mlm": "BertForMaskedLM", "classes": "BertForSequenceClassification", None: "BertModel"}[p.head]
    return {"model_type": "bert", "architectures": [architecture], "vocab_size": c.vocab, "max_position_embeddings": c.positions,
            "type_vocab_size": c.token_types, "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
            "intermediate_size": c.hidden or 4 * c.width, "hidden_act": "gelu", "layer_norm_eps": c.eps,
            "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": c.dropout,
            "classifier_dropout": c.dropout, "position_embedding_type": "absolute", "tie_word_embeddings": True}


def full_name(name: str, p: Plan) -> str:
    "The name in the files that transformers writes for the class in `architectures`."
    return name if p.head is None or name.startswith(("cls.", "classifier.")) else f"bert.{name}"
