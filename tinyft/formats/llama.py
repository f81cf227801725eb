"""Llama on disk: the names, shapes and conventions of `model_type: llama`, `mistral` and `qwen2`.

The three have one layout. Qwen2 always has biases on q, k and v; Mistral has none; Llama has them if attention_bias
says so, then on o as well. A Mistral is written as a Llama, which computes the same. A file of the class without a head
has no `model.` prefix.

In the shapes: C width, D head width, F feed-forward width, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..models import Llama, LlamaConfig
from ..models.blocks import Classifier
from ..nn import Linear, Module, TiedHead
from .config import architecture, check_settings, class_count, flag, number, short, size
from .family import Family
from .layout import FileTensor, Plan, Table, ZeroGenerator, add_stored_classifier
from .rotary import rotary_settings, written_scaling

# The name of the classes of transformers, and the defaults of keys that a config.json may leave out.
PREFIX = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072,
                "num_key_value_heads": 8},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768,
              "num_key_value_heads": 32},
}
WINDOWS = {"llama": None, "mistral": 4096, "qwen2": 4096}                       # transformers' default
LAYER_TYPES = ("full_attention", "sliding_attention")
# Settings of which our Llama has one value. transformers does not read rope_interleaved, which SmolLM2 writes.
FIXED = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
}
# The end of the name of a class of transformers, by the head of the model.
ENDS = {"lm": "ForCausalLM", "classes": "ForSequenceClassification", None: "Model"}
BLOCK = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}


class LlamaFamily(Family):
    """Llama, Mistral or Qwen2 in the layout of transformers."""
    model = Llama
    tied = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, model_type: str):
        self.model_type = model_type

    def table_name(self, name: str) -> str | None:
        """The name without `model.`; None for the frequencies of the rotary positions, which config.json gives."""
        name = name.removeprefix("model.")
        return None if name.endswith("rotary_emb.inv_freq") else name

    def aliases(self, plan: Plan) -> dict[str, str]:
        """The tied output layer, if config.json ties it."""
        return self.tied if plan.config.tied else {}

    def read_config(self, config: dict, names: Collection[str]) -> Plan:
        """The plan of the Llama that config.json describes.

        names: of the file's tensors, without `model.`. They decide on the head if config.json names no class.
        ValueError for a setting that our Llama does not have.
        """
        check_settings(config, FIXED, PREFIX[self.model_type])
        heads = {f"{PREFIX[self.model_type]}{end}": head for head, end in ENDS.items()}
        named = architecture(config, heads)
        model_config = self.model_config(config)
        if named is not None:
            head = heads[named]
        else:
            head = "classes" if "score.weight" in names else None
        if head is None and (model_config.tied or "lm_head.weight" in names):
            head = "lm"                                  # the class has no output layer, but the file has its weight
        return Plan(model_config, head, class_count(config) if head == "classes" else 0)

    def model_config(self, config: dict) -> LlamaConfig:
        """The sizes and settings in config.json."""
        default = DEFAULTS[self.model_type]
        positions = size(config, "max_position_embeddings", default["max_position_embeddings"])
        layers = size(config, "num_hidden_layers", 32)
        self.check_window(config, positions, layers)
        base, scaling = rotary_settings(config)
        has_bias = self.model_type == "llama" and flag(config, "attention_bias", default=False)
        heads = size(config, "num_attention_heads", 32)
        return LlamaConfig(
            vocab=size(config, "vocab_size", default["vocab_size"]),
            positions=positions,
            width=size(config, "hidden_size", 4096),
            layers=layers,
            heads=heads,
            key_value_heads=optional_size(config, "num_key_value_heads", default.get("num_key_value_heads", heads)),
            head_width=optional_size(config, "head_dim", None),
            hidden=size(config, "intermediate_size", default["intermediate_size"]),
            rope_base=base,
            rope_scaling=scaling,
            tied=flag(config, "tie_word_embeddings", default=False),
            qkv_bias=has_bias or self.model_type == "qwen2",
            out_bias=has_bias,
            mlp_bias=self.model_type == "llama" and flag(config, "mlp_bias", default=False),
            dropout=number(config, "attention_dropout", 0.0, below=1),
            eps=number(config, "rms_norm_eps", 1e-6))

    def check_window(self, config: dict, positions: int, layers: int) -> None:
        """Refuse a sliding window that hides a position of the model's longest text: our attention sees them all."""
        kinds = layer_types(config, layers)
        window = optional_size(config, "sliding_window", WINDOWS[self.model_type])
        wanted = "a sliding_window of null or"
        if self.model_type == "qwen2":
            is_used = flag(config, "use_sliding_window", default=False)
            first = size(config, "max_window_layers", 28, least=0)               # the layers below it have no window
            has_window = not kinds and is_used and first < layers and window is not None
            wanted = f"use_sliding_window false, a max_window_layers of at least {layers}, {wanted}"
        else:
            has_window = window is not None
        if "sliding_attention" in kinds:
            has_window = True
        if has_window and (window is None or window < positions):
            raise ValueError(f"config.json: this library's {PREFIX[self.model_type]} has no sliding window; wanted "
                             f"{wanted} at least max_position_embeddings ({positions}), and layer_types without "
                             f"sliding_attention, got a window of {short(window)}")

    def table(self, plan: Plan) -> Table:
        """{name in the model: FileTensor}: the name in a file and the shape of every tensor of the plan's Llama."""
        c = plan.config
        C = c.width
        F = c.hidden or 4 * C
        queries = c.heads * c.width_of_heads
        keys = (c.key_value_heads or c.heads) * c.width_of_heads
        shapes = {
            "attn.q": (queries, C), "attn.k": (keys, C), "attn.v": (keys, C), "attn.o": (C, queries),
            "mlp.gate": (F, C), "mlp.up": (F, C), "mlp.down": (C, F), "norm1": (C,), "norm2": (C,)}
        with_bias = dict.fromkeys(("attn.q", "attn.k", "attn.v"), c.qkv_bias) | {"attn.o": c.out_bias}
        with_bias |= dict.fromkeys(("mlp.gate", "mlp.up", "mlp.down"), c.mlp_bias)
        table = {"embed.weight": FileTensor("embed_tokens.weight", (c.vocab, C))}
        for i in range(c.layers):
            for ours, stored in BLOCK.items():
                block, file = f"blocks.{i}.{ours}", f"layers.{i}.{stored}"
                table[f"{block}.weight"] = FileTensor(f"{file}.weight", shapes[ours])
                if with_bias.get(ours):
                    table[f"{block}.bias"] = FileTensor(f"{file}.bias", shapes[ours][:1])
        table["norm.weight"] = FileTensor("norm.weight", (C,))
        if plan.head == "classes":
            table["head.out.weight"] = FileTensor("score.weight", (plan.classes, C))
        elif plan.head == "lm" and not c.tied:
            table["head.weight"] = FileTensor("lm_head.weight", (c.vocab, C))
        return table

    def build(self, plan: Plan) -> Llama:
        """The Llama of a plan, with zeros in its matrices."""
        model = Llama(plan.config, seed=ZeroGenerator())
        if plan.head == "classes":
            add_stored_classifier(model, plan.classes)
        elif plan.head is None:
            model.head = None
        return model

    def holds(self, model: Module) -> bool:
        """True if a model of this type has these biases: those on q, k and v alone are Qwen2's, all others Llama's."""
        if not isinstance(model, Llama):
            return False
        only_qkv = model.config.qkv_bias and not model.config.out_bias
        return self.model_type == ("qwen2" if only_qkv else "llama")

    def plan_of(self, model: Module) -> Plan:
        """The plan of this Llama. ValueError for a head that the classes of transformers do not have."""
        head = model.head
        c = model.config
        if c.out_bias and not c.qkv_bias or c.mlp_bias and self.model_type == "qwen2":
            raise ValueError("a Llama directory wants biases on q, k, v and o together, or on q, k and v alone")
        if type(head) is Classifier and head.out.bias is None:
            return Plan(c, "classes", head.out_features)
        if head is None:
            return Plan(c, None)
        is_own_map = type(head) is Linear and head.bias is None and not c.tied
        if is_own_map or (type(head) is TiedHead and head.bias is None and c.tied):
            return Plan(c, "lm")
        raise ValueError("a Llama directory wants its language-model head or a classifier without bias, "
                         f"got a {type(head).__name__}")

    def write_config(self, plan: Plan) -> dict[str, Any]:
        """The config.json of a plan, with transformers' keys."""
        c = plan.config
        config = {
            "model_type": self.model_type,
            "architectures": [f"{PREFIX[self.model_type]}{ENDS[plan.head]}"],
            "vocab_size": c.vocab,
            "max_position_embeddings": c.positions,
            "hidden_size": c.width,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.key_value_heads or c.heads,
            "head_dim": c.width_of_heads,
            "intermediate_size": c.hidden or 4 * c.width,
            "hidden_act": "silu",
            "rms_norm_eps": c.eps,
            "rope_theta": c.rope_base,
            "rope_scaling": written_scaling(c.rope_scaling),
            "attention_dropout": c.dropout,
            "tie_word_embeddings": c.tied}
        if self.model_type == "llama":
            config |= {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}
        return config

    def file_name(self, name: str, plan: Plan) -> str:
        """The table name with `model.` in front, except for heads, and in a model without a head."""
        is_head = name in ("score.weight", "lm_head.weight")
        return name if is_head or plan.head is None else f"model.{name}"


def layer_types(config: dict, layers: int) -> list[str]:
    """The kind of attention of each layer; an empty list if config.json does not name them.

    ValueError unless there is one known kind for each of the layers.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return []
    is_list = isinstance(kinds, list) and len(kinds) == layers
    if not is_list or any(kind not in LAYER_TYPES for kind in kinds):
        raise ValueError(f"config.json: layer_types wants {' or '.join(LAYER_TYPES)} for each of the {layers} layers, "
                         f"got {short(kinds)}")
    return kinds


def optional_size(config: dict, key: str, default: int | None) -> int | None:
    """A size, `default` if the key is missing, and None if its value is null."""
    if key in config and config[key] is None:
        return None
    return default if key not in config else size(config, key)
