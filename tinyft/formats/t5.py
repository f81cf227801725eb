"""T5 on disk: the names, shapes and conventions of `model_type: t5`, v1.0 and v1.1.

Linear weights are (out, in), as ours. One matrix is the embedding of source and text, and in v1.0 the output layer;
files may hold it under several names. The first layer of each stack holds the table of relative positions.

In the shapes: C width, D head width, H heads, F feed-forward width, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..models import T5, T5Config
from ..models.t5 import ScaledTiedHead
from ..nn import Linear, Module
from .config import architecture, check_settings, flag, number, short, size, token, with_one_name
from .encoder_decoder import EncoderDecoderFamily
from .layout import FileTensor, Plan, Table

# {class of transformers: our head}.
HEADS = {"T5ForConditionalGeneration": "lm", "T5Model": None}
WRITTEN_AS = {"lm": "T5ForConditionalGeneration", None: "T5Model"}
# Other names of settings: transformers' attribute_map.
ALIASES = {
    "hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers", "head_dim": "d_kv",
}
# {feed_forward_proj: (its activation, is it gated)}, which files may hold as dense_act_fn and is_gated_act too.
FEED_FORWARDS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True), "gated-silu": ("silu", True)}
FIXED = {"is_encoder_decoder": (True,)}
# A table that old files hold for the cross-attention, which does not use it.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


class T5Family(EncoderDecoderFamily):
    """T5 in the layout of transformers."""
    model_type = "t5"
    model = T5

    def table_name(self, name: str) -> str | None:
        """The name itself; None for a table that no layer uses."""
        return None if name == UNUSED else name

    def aliases(self, plan: Plan) -> dict[str, str]:
        """Without the output layer, if it is a map of its own."""
        own_head = plan.head == "lm" and not plan.config.tied
        return {alias: name for alias, name in self.tied.items() if not (own_head and alias == "lm_head.weight")}

    def read_config(self, config: dict, names: Collection[str]) -> Plan:
        """The plan of the T5 that config.json describes.

        names: of the file's tensors. They decide on the head if config.json names no class.
        ValueError for a setting that our T5 does not have.
        """
        if config.get("num_decoder_layers") is None:     # transformers does not look at num_hidden_layers here
            config = {**config, "num_decoder_layers": config.get("num_layers", 6)}
        config = with_one_name(config, ALIASES)
        check_settings(config, FIXED, "T5")
        named = architecture(config, HEADS)
        model_config = self.model_config(config)
        head = HEADS[named] if named is not None else "lm"
        if named is None and not model_config.tied and "lm_head.weight" not in names:
            head = None
        return Plan(model_config, head)

    def model_config(self, config: dict) -> T5Config:
        """The sizes and settings in config.json."""
        vocab = size(config, "vocab_size", 32128)
        layers = size(config, "num_layers", 6)
        buckets = size(config, "relative_attention_num_buckets", 32, least=4)
        max_distance = size(config, "relative_attention_max_distance", 128)
        if buckets % 2 or max_distance <= buckets // 2:
            raise ValueError("config.json: this library's T5 wants an even relative_attention_num_buckets and a "
                             f"relative_attention_max_distance above half of it, got {buckets} and {max_distance}")
        start = 0
        if config.get("decoder_start_token_id") is not None:
            start = token(config, "decoder_start_token_id", vocab)
        return T5Config(
            vocab=vocab,
            positions=size(config, "n_positions", 512),
            width=size(config, "d_model", 512),
            layers=layers,
            heads=size(config, "num_heads", 8),
            head_width=size(config, "d_kv", 64),
            hidden=size(config, "d_ff", 2048),
            decoder_layers=size(config, "num_decoder_layers", layers),
            buckets=buckets,
            max_distance=max_distance,
            feed_forward=read_feed_forward(config),
            tied=flag(config, "tie_word_embeddings", default=True),
            start=start,
            dropout=number(config, "dropout_rate", 0.1, below=1),
            eps=number(config, "layer_norm_epsilon", 1e-6))

    def table(self, plan: Plan) -> Table:
        """{name in the model: FileTensor}: the name in a file and the shape of every tensor of the plan's T5."""
        c = plan.config
        table = {"embed.weight": FileTensor("shared.weight", (c.vocab, c.width))}
        for stack, layers in (("encoder", c.layers), ("decoder", c.decoder_layers or c.layers)):
            for i in range(layers):
                table |= block_table(c, stack, i)
            first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            table[f"{stack}.0.attn.relative_bias.weight"] = FileTensor(first, (c.buckets, c.heads))
        table["encoder_norm.weight"] = FileTensor("encoder.final_layer_norm.weight", (c.width,))
        table["norm.weight"] = FileTensor("decoder.final_layer_norm.weight", (c.width,))
        if plan.head == "lm" and not c.tied:
            table["head.weight"] = FileTensor("lm_head.weight", (c.vocab, c.width))
        return table

    def plan_of(self, model: Module) -> Plan:
        """The plan of this T5. ValueError for a head other than its own, and none."""
        head = model.head
        c = model.config
        if head is None:
            return Plan(c, None)
        is_own_map = type(head) is Linear and head.bias is None and not c.tied
        if is_own_map or (type(head) is ScaledTiedHead and head.bias is None and c.tied):
            return Plan(c, "lm")
        raise ValueError(f"a t5 directory wants T5's own head, or none; got a {type(head).__name__}")

    def write_config(self, plan: Plan) -> dict[str, Any]:
        """The config.json of a plan, with transformers' keys."""
        c = plan.config
        activation, is_gated = FEED_FORWARDS[c.feed_forward]
        return {
            "model_type": self.model_type,
            "architectures": [WRITTEN_AS[plan.head]],
            "is_encoder_decoder": True,
            "vocab_size": c.vocab,
            "n_positions": c.positions,
            "d_model": c.width,
            "d_kv": c.head_width,
            "d_ff": c.hidden or 4 * c.width,
            "num_layers": c.layers,
            "num_decoder_layers": c.decoder_layers or c.layers,
            "num_heads": c.heads,
            "relative_attention_num_buckets": c.buckets,
            "relative_attention_max_distance": c.max_distance,
            "feed_forward_proj": c.feed_forward,
            "dense_act_fn": activation,
            "is_gated_act": is_gated,
            "layer_norm_epsilon": c.eps,
            "dropout_rate": c.dropout,
            "decoder_start_token_id": c.start,
            "tie_word_embeddings": c.tied}

    def file_name(self, name: str, plan: Plan) -> str:
        """The table name: no class of T5 puts a prefix before it."""
        return name


def block_table(c: T5Config, stack: str, i: int) -> Table:
    """The entries of one block of a stack, "encoder" or "decoder"."""
    C = c.width
    F = c.hidden or 4 * C
    inner = c.heads * c.head_width
    layers = [("attn", "SelfAttention")]
    if stack == "decoder":
        layers.append(("cross_attn", "EncDecAttention"))
    table: Table = {}
    for n, (ours, stored) in enumerate(layers):
        place = f"{stack}.block.{i}.layer.{n}"
        table[f"{stack}.{i}.norm{n + 1}.weight"] = FileTensor(f"{place}.layer_norm.weight", (C,))
        for part in "qkvo":
            shape = (C, inner) if part == "o" else (inner, C)
            table[f"{stack}.{i}.{ours}.{part}.weight"] = FileTensor(f"{place}.{stored}.{part}.weight", shape)
    n = len(layers)
    place = f"{stack}.block.{i}.layer.{n}"
    table[f"{stack}.{i}.norm{n + 1}.weight"] = FileTensor(f"{place}.layer_norm.weight", (C,))
    maps = {"up": "wi", "down": "wo"} if c.feed_forward == "relu" else {"gate": "wi_0", "up": "wi_1", "down": "wo"}
    for ours, stored in maps.items():
        shape = (C, F) if ours == "down" else (F, C)
        table[f"{stack}.{i}.mlp.{ours}.weight"] = FileTensor(f"{place}.DenseReluDense.{stored}.weight", shape)
    return table


def read_feed_forward(config: dict) -> str:
    """The kind of the feed-forward. ValueError for one that our T5 does not have, and for contradicting keys."""
    kind = config.get("feed_forward_proj", "relu")
    if not isinstance(kind, str) or kind not in FEED_FORWARDS:
        wanted = " or ".join(map(repr, FEED_FORWARDS))
        raise ValueError(f"config.json: this library's T5 wants feed_forward_proj {wanted}, got {short(kind)}")
    for key, value in zip(("dense_act_fn", "is_gated_act"), FEED_FORWARDS[kind], strict=True):
        if config.get(key, value) != value:
            raise ValueError(f"config.json: {key} wants {value!r} beside the feed_forward_proj {kind!r}, "
                             f"got {short(config[key])}")
    return kind
