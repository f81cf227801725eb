"""The encoder-decoder of 2017 on disk: the names, shapes and conventions of `model_type: marian`.

Linear weights are (out, in), as ours. One matrix is the embedding of source and text and the output layer; files may
hold it under several names. The bias of the output layer is a row (1, V). Files of newer versions leave out the
sinusoids of the positions; a table in an older file must hold the same numbers.

In the shapes: C width, F feed-forward width, V vocabulary.
"""
from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from ..models import Seq2Seq, Seq2SeqConfig
from ..models.blocks import sinusoids
from ..nn import Module, TiedHead
from .bert import weight_and_bias
from .config import architecture, check_settings, check_tied, flag, number, short, size, token, with_one_name
from .encoder_decoder import EncoderDecoderFamily
from .layout import FileTensor, Plan, Table

# {class of transformers: our head}.
HEADS = {"MarianMTModel": "lm", "MarianModel": None}
WRITTEN_AS = {"lm": "MarianMTModel", None: "MarianModel"}
# Other names of settings: transformers' attribute_map.
ALIASES = {"hidden_size": "d_model", "num_attention_heads": "encoder_attention_heads"}
# {name in a file: ours}. "swish" is the name in Marian's own files.
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_python": "gelu", "silu": "silu", "swish": "silu"}
# {setting: the values that our model supports}.
FIXED = {
    "is_encoder_decoder": (True,),
    "share_encoder_decoder_embeddings": (True,),
}
# The rates of config.json and their defaults. Our model has one rate of dropout. It drops no layers while it trains.
DROPOUTS = {"dropout": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0}
POSITIONS = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")
ENCODER = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.out_proj",
    "norm1": "self_attn_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
    "norm2": "final_layer_norm",
}
DECODER = {
    **{part: stored for part, stored in ENCODER.items() if part != "norm2"},
    "cross_attn.q": "encoder_attn.q_proj",
    "cross_attn.k": "encoder_attn.k_proj",
    "cross_attn.v": "encoder_attn.v_proj",
    "cross_attn.o": "encoder_attn.out_proj",
    "norm2": "encoder_attn_layer_norm",
    "norm3": "final_layer_norm",
}


class MarianFamily(EncoderDecoderFamily):
    """The encoder-decoder of 2017 in the layout of transformers."""
    model_type = "marian"
    model = Seq2Seq

    def table_name(self, name: str) -> str | None:
        """The name without `model.`."""
        return name.removeprefix("model.")

    def unused(self, plan: Plan) -> Collection[str]:
        """The sinusoids of the positions: the model computes them."""
        return POSITIONS

    def check_unused(self, name: str, tensor: np.ndarray, plan: Plan) -> None:
        """ValueError for a table of positions that are no sinusoids, such as a trained one."""
        if tensor.ndim != 2 or tensor.shape[1] != plan.config.width:
            raise ValueError(f"{name} has the shape {tensor.shape}; wanted ({plan.config.positions}, "
                             f"{plan.config.width})")
        error = np.abs(tensor.astype(np.float32) - sinusoids(*tensor.shape)).max()
        if not error <= 0.01:                            # files of 16 bits are within 0.004
            raise ValueError(f"this library's Marian wants sinusoids as positions; {name} holds other numbers, such as "
                             "those of a trained table")

    def read_config(self, config: dict, names: Collection[str]) -> Plan:
        """The plan of the model that config.json describes.

        names: of the file's tensors, without `model.`. They decide on the head if config.json names no class.
        ValueError for a setting that our model does not have.
        """
        config = with_one_name(config, ALIASES)
        check_settings(config, FIXED, "Marian")
        named = architecture(config, HEADS)
        has_bias = "final_logits_bias" in names or not names
        head = HEADS[named] if named is not None else ("lm" if has_bias else None)
        if head == "lm":
            check_tied(config, "Marian")
        return Plan(self.model_config(config), head)

    def model_config(self, config: dict) -> Seq2SeqConfig:
        """The sizes and settings in config.json."""
        vocab = size(config, "vocab_size", 58101)
        activation = config.get("activation_function", "gelu")
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ValueError(f"config.json: this library's Marian wants activation_function "
                             f"{' or '.join(map(repr, ACTIVATIONS))}, got {short(activation)}")
        return Seq2SeqConfig(
            vocab=vocab,
            positions=size(config, "max_position_embeddings", 1024),
            width=size(config, "d_model", 1024),
            layers=size(config, "encoder_layers", 12),
            heads=size(config, "encoder_attention_heads", 16),
            hidden=size(config, "encoder_ffn_dim", 4096),
            decoder_layers=size(config, "decoder_layers", 12),
            decoder_heads=size(config, "decoder_attention_heads", 16),
            decoder_hidden=size(config, "decoder_ffn_dim", 4096),
            activation=ACTIVATIONS[activation],
            scaled=flag(config, "scale_embedding", default=False),
            start=token(config, "decoder_start_token_id", vocab, 58100),
            dropout=max(number(config, key, default, below=1) for key, default in DROPOUTS.items()))

    def table(self, plan: Plan) -> Table:
        """{name in the model: FileTensor}: the name in a file and the shape of every tensor of the plan's model."""
        c = plan.config
        table = {"embed.weight": FileTensor("shared.weight", (c.vocab, c.width))}
        hidden = c.hidden or 4 * c.width
        table |= stack_table("encoder", ENCODER, c.layers, c.width, hidden)
        table |= stack_table("decoder", DECODER, c.decoder_layers or c.layers, c.width, c.decoder_hidden or hidden)
        if plan.head == "lm":
            table["head.bias"] = FileTensor("final_logits_bias", (c.vocab,), is_row=True)
        return table

    def holds(self, model: Module) -> bool:
        """True for a Seq2Seq without Switch layers and with the ε of Marian's norms: config.json holds neither."""
        return super().holds(model) and model.config.eps == 1e-5 and model.config.switch is None

    def plan_of(self, model: Module) -> Plan:
        """The plan of this model. ValueError for a head other than the tied one with a bias."""
        head = model.head
        if head is None:
            return Plan(model.config, None)
        if type(head) is TiedHead and head.bias is not None:
            return Plan(model.config, "lm")
        raise ValueError(f"a marian directory wants a tied head with a bias, or none; got a {type(head).__name__}")

    def write_config(self, plan: Plan) -> dict[str, Any]:
        """The config.json of a plan, with transformers' keys. Our one dropout rate stands under all three keys."""
        c = plan.config
        hidden = c.hidden or 4 * c.width
        return {
            "model_type": self.model_type,
            "architectures": [WRITTEN_AS[plan.head]],
            "is_encoder_decoder": True,
            "vocab_size": c.vocab,
            "decoder_vocab_size": c.vocab,
            "max_position_embeddings": c.positions,
            "d_model": c.width,
            "encoder_layers": c.layers,
            "encoder_attention_heads": c.heads,
            "encoder_ffn_dim": hidden,
            "decoder_layers": c.decoder_layers or c.layers,
            "decoder_attention_heads": c.decoder_heads or c.heads,
            "decoder_ffn_dim": c.decoder_hidden or hidden,
            "activation_function": c.activation,
            "scale_embedding": c.scaled,
            "share_encoder_decoder_embeddings": True,
            "decoder_start_token_id": c.start,
            **dict.fromkeys(DROPOUTS, c.dropout),
            "forced_eos_token_id": None,
            "tie_word_embeddings": True}

    def file_name(self, name: str, plan: Plan) -> str:
        """The table name with `model.` in front, except for the bias, and in a model without a head."""
        return name if name == "final_logits_bias" or plan.head is None else f"model.{name}"


def stack_table(stack: str, parts: dict[str, str], layers: int, C: int, F: int) -> Table:
    """The entries of all blocks of a stack.

    stack: "encoder" or "decoder", here and in the file. parts: {part of a block here: its name in the file}."""
    shapes = {"mlp.up": (F, C), "mlp.down": (C, F), **dict.fromkeys(("norm1", "norm2", "norm3"), (C,))}
    table: Table = {}
    for i in range(layers):
        for ours, stored in parts.items():
            shape = shapes.get(ours, (C, C))             # the maps of attention
            table |= weight_and_bias(f"{stack}.{i}.{ours}", f"{stack}.layers.{i}.{stored}", *shape)
    return table
