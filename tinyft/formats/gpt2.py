"""GPT-2 on disk: the names, shapes and conventions of `model_type: gpt2`.

A linear layer is a `Conv1D`. Its weight is stored as (in, out), the transpose of ours. One layer, c_attn, holds q, k
and v side by side. In the file of GPT-2 on the Hugging Face Hub, names have no prefix; files that transformers'
GPT2LMHeadModel wrote put `transformer.` before them. The output layer has the weight of the embedding (it is tied to
it), and files usually leave it out.

In the shapes: C width, F feed-forward width, V vocabulary, T positions.
"""
from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from ..models import GPT, GPTConfig
from ..models.blocks import Classifier
from ..nn import Module, TiedHead
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
from .layout import FileTensor, Plan, Table, ZeroGenerator, add_stored_classifier

# {class of transformers: our head}. GPT2Model has no head, but our GPT always has the tied one, so it gets "lm".
HEADS = {"GPT2LMHeadModel": "lm", "GPT2Model": "lm", "GPT2ForSequenceClassification": "classes"}
# Other names of settings: transformers' attribute_map.
ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
# {setting: the values that our GPT supports}. All four activations are the tanh form of GELU.
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
# Old files hold the causal mask as a tensor; attn.c_attn.bias, a parameter, does not match.
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


class GPT2Family(Family):
    """GPT-2 in the layout of transformers."""
    model_type = "gpt2"
    model = GPT
    tied = {"lm_head.weight": "wte.weight"}              # {output layer: embedding}, two names of one tensor
    has_experts = False                                  # True: the models with Switch layers (switch.py)

    def holds(self, model: Module) -> bool:
        """True for a GPT, with Switch layers or without them as this family has them."""
        return super().holds(model) and (model.config.switch is not None) == self.has_experts

    def table_name(self, name: str) -> str | None:
        """The name without `transformer.`; None for a causal mask."""
        name = name.removeprefix("transformer.")
        return None if CAUSAL_MASK.fullmatch(name) else name

    def read_config(self, config: dict, names: Collection[str]) -> Plan:
        """The plan of the GPT that config.json describes. Its dropout rate is the largest of the three in config.json.

        names: of the file's tensors, without `transformer.`. They decide on the head if config.json names no class.
        ValueError for a setting that our GPT does not have.
        """
        config = with_one_name(config, ALIASES)
        check_settings(config, FIXED, "GPT-2")
        named = architecture(config, HEADS)
        if named is not None:
            head = HEADS[named]
        else:
            head = "classes" if "score.weight" in names else "lm"
        if head == "lm":
            check_tied(config, "GPT-2")
        model_config = GPTConfig(
            vocab=size(config, "vocab_size", 50257),
            positions=size(config, "n_positions", config.get("n_ctx", 1024)),       # n_ctx: its name in old files
            width=size(config, "n_embd", 768),
            layers=size(config, "n_layer", 12),
            heads=size(config, "n_head", 12),
            hidden=None if config.get("n_inner") is None else size(config, "n_inner"),
            dropout=max(number(config, key, 0.1, below=1) for key in DROPOUTS),
            eps=number(config, "layer_norm_epsilon", 1e-5))
        return Plan(model_config, head, class_count(config) if head == "classes" else 0)

    def table(self, plan: Plan) -> Table:
        """{name in the model: FileTensor}: the name in a file and the shape of every tensor of the plan's GPT.

        q, k and v of the model name the same tensor of the file, c_attn; each reads one third of it, by `third`.
        """
        c = plan.config
        C = c.width
        F = c.hidden or 4 * C
        table = {
            "embed.weight": FileTensor("wte.weight", (c.vocab, C)),
            "pos.weight": FileTensor("wpe.weight", (c.positions, C))}
        for i in range(c.layers):
            block, stored = f"blocks.{i}", f"h.{i}"
            table |= norm(f"{block}.norm1", f"{stored}.ln_1", C)
            for third, projection in enumerate("qkv"):
                table |= linear(f"{block}.attn.{projection}", f"{stored}.attn.c_attn", C, C, third)
            table |= linear(f"{block}.attn.o", f"{stored}.attn.c_proj", C, C)
            table |= norm(f"{block}.norm2", f"{stored}.ln_2", C)
            table |= linear(f"{block}.mlp.up", f"{stored}.mlp.c_fc", C, F)
            table |= linear(f"{block}.mlp.down", f"{stored}.mlp.c_proj", F, C)
        table |= norm("norm", "ln_f", C)
        if plan.head == "classes":
            table["head.out.weight"] = FileTensor("score.weight", (plan.classes, C))
        return table

    def build(self, plan: Plan) -> GPT:
        """The GPT of a plan, with zeros in its matrices: the values of the file replace them."""
        model = GPT(plan.config, seed=ZeroGenerator())
        if plan.head == "classes":
            add_stored_classifier(model, plan.classes)
        return model

    def plan_of(self, model: Module) -> Plan:
        """The plan of this GPT. ValueError for a head other than the tied one and the classifier.

        Neither may have a bias: the classes of transformers have none.
        """
        head = model.head
        if type(head) is Classifier and head.out.bias is None:
            return Plan(model.config, "classes", head.out_features)
        if type(head) is TiedHead and head.bias is None:
            return Plan(model.config, "lm")
        raise ValueError("a GPT-2 directory wants a tied head or a classifier without bias, "
                         f"got a {type(head).__name__}")

    def write_config(self, plan: Plan) -> dict[str, Any]:
        """The config.json of a plan, with transformers' keys. Our one dropout rate stands under all three keys."""
        c = plan.config
        named = "GPT2ForSequenceClassification" if plan.head == "classes" else "GPT2LMHeadModel"
        return {
            "model_type": self.model_type,
            "architectures": [named],
            "vocab_size": c.vocab,
            "n_positions": c.positions,
            "n_embd": c.width,
            "n_layer": c.layers,
            "n_head": c.heads,
            "n_inner": c.hidden,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": c.eps,
            **dict.fromkeys(DROPOUTS, c.dropout),
            "tie_word_embeddings": True}

    def file_name(self, name: str, plan: Plan) -> str:
        """The table name with `transformer.` in front, as transformers writes it; score.weight has no prefix."""
        return name if name == "score.weight" else f"transformer.{name}"


def norm(ours: str, stored: str, width: int) -> Table:
    """Weight and bias of a layer norm."""
    return {f"{ours}.{end}": FileTensor(f"{stored}.{end}", (width,)) for end in ("weight", "bias")}


def linear(ours: str, stored: str, in_features: int, out_features: int, third: int | None = None) -> Table:
    """Weight and bias of a `Conv1D`, or of one third of it."""
    weight = FileTensor(f"{stored}.weight", (out_features, in_features), transposed=True, third=third)
    bias = FileTensor(f"{stored}.bias", (out_features,), third=third)
    return {f"{ours}.weight": weight, f"{ours}.bias": bias}
