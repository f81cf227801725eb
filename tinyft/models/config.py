"""The configurations of the models: the names of their fields, and checks of their values."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .. import checks
from ..context import refuse_keywords

__all__ = ["Config", "check_config"]

# Sizes under the names of other libraries, and their names here.
SIZE_SYNONYMS = {
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_hidden_layers", "depth"), "layers"),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "num_attention_heads"), "heads"),
    **dict.fromkeys(("n_embd", "d_model", "dim", "hidden_size", "embed_dim"), "width"),
    **dict.fromkeys(("n_positions", "n_ctx", "block_size", "max_position_embeddings", "context_length"), "positions"),
    **dict.fromkeys(("n_inner", "d_ff", "intermediate_size", "ffn_dim"), "hidden"),
    "vocab_size": "vocab", "type_vocab_size": "token_types", "layer_norm_eps": "eps", "layer_norm_epsilon": "eps",
    "initializer_range": "std",
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads"), "key_value_heads"),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), "layers"),
    **dict.fromkeys(("num_decoder_layers", "n_decoder_layers"), "decoder_layers"),
    "d_kv": "head_width", "feed_forward_proj": "feed_forward", "dropout_rate": "dropout",
    "relative_attention_num_buckets": "buckets", "relative_attention_max_distance": "max_distance",
    "decoder_start_token_id": "start", "activation_function": "activation", "scale_embedding": "scaled",
    "head_dim": "head_width", "rms_norm_eps": "eps", "rope_theta": "rope_base", "tie_word_embeddings": "tied",
}


class Config:
    """The base of all configurations, frozen dataclasses: it refuses unknown keywords.

    synonyms: {name of a field in another library: its name here}, for the message"""

    synonyms: ClassVar[Mapping[str, str]] = SIZE_SYNONYMS

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        """Raise TypeError, naming the nearest field, for an unknown keyword.

        This runs before the __init__ of the dataclass, whose own message would not name a field."""
        known = cls.__dataclass_fields__
        refuse_keywords(cls.__name__, fields.keys() - known.keys(), known, cls.synonyms)
        return super().__new__(cls)


def check_config(config: Any, sizes: Sequence[str], head_width: int | None = None) -> None:
    """Raise TypeError or ValueError, naming the field, unless a configuration describes a model that can be built.

    sizes: the names of the fields that are whole numbers of at least 1, width and heads among them.
    head_width: of a model whose heads have a width of their own; None: the heads divide the width."""
    name = type(config).__name__
    for size in sizes:
        checks.whole(f"{name}: {size}", getattr(config, size), least=1)
    if config.hidden is not None:
        checks.whole(f"{name}: hidden", config.hidden, least=1)
    if head_width is None and config.width % config.heads:
        raise ValueError(f"{name}: {config.heads} heads do not divide a width of {config.width}")
    checks.number(f"{name}: dropout", config.dropout, low=0, below=1)
    checks.number(f"{name}: eps", config.eps, low=0)
    checks.number(f"{name}: std", config.std, low=0)
