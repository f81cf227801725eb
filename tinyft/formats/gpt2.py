"""GPT-2 on disk: the names, shapes and traps of `model_type: gpt2`.    C width, F feed-forward width, V vocabulary, T positions

Linear layers are `Conv1D`: stored (in, out), the transpose of ours; q, k and v are the columns of one c_attn.  The hub's own file has
no `transformer.` prefix, files of the language-model class do.  The output layer is the embedding, and usually absent.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..models import GPT, GPTConfig
from ..models.blocks import Classifier
from ..nn import TiedHead
from .layout import Blank, Place, Plan, classes_of, head_of, must_be, number, size

MODEL = GPT
HEADS = {"GPT2LMHeadModel": "lm", "GPT2Model": "lm", "GPT2ForSequenceClassification": "classes"}     # ours always has its tied head
TIED = {"lm_head.weight": "wte.weight"}                  # another name of the same tensor


def rename(name: str) -> str | None:
    "The name as the table below has it; None for what is no weight: the causal mask `attn.bias` (not `attn.c_attn.bias`)."
    name = name.removeprefix("transformer.")
    return None if re.fullmatch(r"h\.\d+\.attn\.(bias|masked_bias)", name) else name


def plan(config: dict, names: Iterable[str]) -> Plan:
    "What config.json asks for.  ValueError for what our GPT cannot compute."
    must_be(config, "activation_function", ["gelu_new", "gelu_pytorch_tanh"], "GPT-2")
    must_be(config, "scale_attn_weights", [True], "GPT-2")
    must_be(config, "scale_attn_by_inverse_layer_idx", [False], "GPT-2")
    must_be(config, "add_cross_attention", [False], "GPT-2")
    head = head_of(config, HEADS)
    if head is ...:
        head = "classes" if "score.weight" in names else "lm"
    sizes = GPTConfig(vocab=size(config, "vocab_size", 50257), positions=size(config, "n_positions", config.get("n_ctx", 1024)),
                      width=size(config, "n_embd", 768), layers=size(config, "n_layer", 12), heads=size(config, "n_head", 12),
                      hidden=None if config.get("n_inner") is None else size(config, "n_inner"),
                      dropout=max(number(config, k, 0.1, below=1) for k in ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
                      eps=number(config, "layer_norm_epsilon", 1e-5))
    return Plan(sizes, head, classes_of(config) if head == "classes" else 0)


def places(p: Plan) -> dict[str, Place]:
    "{our name: where it stands}."
    c = p.config
    C, F = c.width, c.hidden or 4 * c.width
    out = {"embed.weight": Place("wte.weight", (c.vocab, C)), "pos.weight": Place("wpe.weight", (c.positions, C))}

    def norm(ours: str, theirs: str) -> None:
        out.update({f"{ours}.{n}": Place(f"{theirs}.{n}", (C,)) for n in ("weight", "bias")})

    def linear(ours: str, theirs: str, in_features: int, out_features: int, third: int | None = None) -> None:
        out[f"{ours}.weight"] = Place(f"{theirs}.weight", (out_features, in_features), transposed=True, third=third)
        out[f"{ours}.bias"] = Place(f"{theirs}.bias", (out_features,), third=third)

    for i in range(c.layers):
        norm(f"blocks.{i}.norm1", f"h.{i}.ln_1")
        for third, part in enumerate("qkv"):
            linear(f"blocks.{i}.attn.{part}", f"h.{i}.attn.c_attn", C, C, third)
        linear(f"blocks.{i}.attn.o", f"h.{i}.attn.c_proj", C, C)
        norm(f"blocks.{i}.norm2", f"h.{i}.ln_2")
        linear(f"blocks.{i}.mlp.up", f"h.{i}.mlp.c_fc", C, F)
        linear(f"blocks.{i}.mlp.down", f"h.{i}.mlp.c_proj", F, C)
    norm("norm", "ln_f")
    if p.head == "classes":
        out["head.out.weight"] = Place("score.weight", (p.classes, C))
    return out


def blank(p: Plan) -> GPT:
    "The model of a plan, all zeros."
    model = GPT(p.config, Blank())
    if p.head == "classes":
        model.new_head(p.classes, Blank())
        model.head_modules = ()                                 # this head comes from the file: part of the model, not new
    return model


def plan_of(model: GPT) -> Plan:
    "The plan that would build this model."
    if type(model.head) is Classifier and model.head.out.bias is None:
        return Plan(model.config, "classes", model.head.out_features)
    if type(model.head) is not TiedHead or model.head.bias is not None:
        raise ValueError(f"a GPT-2 directory has no room for this head, a {type(model.head).__name__}")
    return Plan(model.config, "lm")


def config_of(p: Plan) -> dict[str, Any]:
    "config.json."
    c = p.config
    return {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification" if p.head == "classes" else "GPT2LMHeadModel"],
            "vocab_size": c.vocab, "n_positions": c.positions, "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads,
            "n_inner": c.hidden, "activation_function": "gelu_new", "layer_norm_epsilon": c.eps,
            "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout, "tie_word_embeddings": True}


def full_name(name: str, p: Plan) -> str:
    "The name in the files that transformers writes for the class in `architectures`."
    return name if name == "score.weight" else f"transformer.{name}"
