"""The model and the tokenizer of a GGUF file: Llama and Qwen2, dense or packed.

    model, tokenizer = load("model.gguf")                  every weight dense
    model, tokenizer = load("model.gguf", packed=True)     weights of 4 or 8 bits stay packed (tinyft.compress)

A key of the metadata that begins with the name of the architecture may change the model's mathematics. Each such key is
read (READ), has the one value that our Llama has (FIXED), or changes nothing (HARMLESS). Every other one is refused.

In files of the architecture llama, the rows of q and k are in another order: the two halves of a head's rotary pairs
alternate, where our Llama, like transformers, has one half after the other. Loading restores the order, by whole rows.
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .. import array
from ..compress import FORMATS
from ..models import Llama, LlamaConfig, RotaryScaling
from ..nn import Module, Parameter
from .directory import check_tensors, first_names
from .gguf import StoredTensor, is_one_of, read_gguf, shown
from .gguf_tokenizer import build_tokenizer
from .layout import Plan, cast
from .llama import LlamaFamily

__all__ = ["load_gguf"]

ARCHITECTURES = ("llama", "qwen2")
READ = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scale_linear",
)
# Keys of which our Llama has one value.
FIXED: dict[str, tuple] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "tensor_data_layout": ("Meta AI original pth",),       # the order of rows that this module undoes
    "use_parallel_residual": (False,),
}
# Of these, the first two are read by the scaling "yarn" alone, which is refused.
HARMLESS = ("rope.scaling.original_context_length", "rope.scaling.finetuned")
# {our name: name in the file}; for a block's part, behind "blocks.0." and "blk.0.".
TOP = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}
BLOCK = {
    "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output",
    "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down", "norm1": "attn_norm", "norm2": "ffn_norm",
}


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def load_gguf(path: Path, dtype: np.dtype, *, packed: bool = False) -> tuple[Llama, Tokenizer | None]:
    """(model, tokenizer) of a GGUF file. The tokenizer is None if the file has none.

    dtype   of the dense parameters, and of what packed weights give
    packed  True: matrices of the types Q4_0, Q4_1 and Q8_0 stay as they are in the file

    FileNotFoundError if the file is missing or no ordinary file. ValueError, in one sentence, if it is damaged, or if
    the library does not have its model, its tensor types or its tokenizer."""
    file = read_gguf(path)
    try:
        settings = Settings(file.metadata)
        plan = Plan(read_config(settings, file.tensors), "lm")
        family = LlamaFamily(settings.architecture)
        shapes = {name: place.shape for name, place in family.table(plan).items()}
        names = {name: file_name(name) for name in shapes}
        refuse_frequencies(file.tensors)
        check_tensors({names[name]: shape for name, shape in shapes.items()}, file.tensors, "the metadata")
        tokenizer = build_tokenizer(file.metadata, plan.config.vocab)
        model = family.build(plan)
        parts = dict(model.named_modules())
        for name, stored in names.items():
            order = row_order(name, plan.config) if settings.architecture == "llama" else None
            weight = read_weight(file.tensors[stored], stored, order, dtype, packed=packed)
            put(parts, name, weight)
    except ValueError as e:
        raise ValueError(f"{path}: {str(e)[:1000]}") from e
    model._kept_config = token_ids(tokenizer)              # `save` writes these entries
    return model, tokenizer


def put(parts: dict[str, Module], name: str, weight: Any) -> None:
    """Put a packed weight, or an array, in the place of the parameter with this name. parts: {path: module}"""
    path, _, leaf = name.rpartition(".")
    if array.is_array(weight):
        parameter: Parameter = getattr(parts[path], leaf)
        parameter.data = weight
    else:
        setattr(parts[path], leaf, weight)


def read_weight(stored: StoredTensor, name: str, order: np.ndarray | None, dtype: np.dtype, *, packed: bool) -> Any:
    """A tensor as an array of this dtype on the backend in use, or as a packed weight.

    order: the numbers of its rows in the order of the model; None: the order of the file."""
    if not stored.is_packed:
        values = stored.dense()
        return array.asarray(cast(values if order is None else values[order], dtype, name))
    blocks = stored.blocks()
    if blocks.ndim == 2:                                   # of a vector: one row
        blocks = blocks[None]
    elif order is not None:
        blocks = blocks[order]
    try:
        weight = FORMATS[stored.kind](np.asarray(blocks))
    except ValueError as e:
        raise ValueError(f"the tensor {shown(name)} is damaged: {e}") from e
    if packed and len(stored.shape) == 2:
        return weight if dtype == np.float32 else weight.to(dtype=dtype)
    values = array.asnumpy(weight.dequantize()).reshape(stored.shape)
    values = values[order] if order is not None and values.ndim == 1 else values
    return array.asarray(values if dtype == np.float32 else cast(values, dtype, name))


def row_order(name: str, config: LlamaConfig) -> np.ndarray | None:
    """The rows of the file in the order of our model, for q and k; None for another tensor.

    A head of D rows is stored as D/2 pairs (i, i + D/2); our model has the first halves of all pairs, then the second.
    """
    if name.endswith((".attn.q.weight", ".attn.q.bias")):
        heads = config.heads
    elif name.endswith((".attn.k.weight", ".attn.k.bias")):
        heads = config.key_value_heads or config.heads
    else:
        return None
    D = config.width_of_heads
    return np.arange(heads * D).reshape(heads, D // 2, 2).swapaxes(1, 2).reshape(-1)


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int]:
    """The ids of the special tokens that the file names, as entries of a config.json."""
    named = {} if tokenizer is None else tokenizer.special_tokens
    return {f"{kind}_token_id": tokenizer.token_to_id(named[kind]) for kind in ("pad", "bos", "eos") if kind in named}


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def file_name(name: str) -> str:
    """The name in the file of a tensor of our model: blocks.3.attn.q.weight is blk.3.attn_q.weight."""
    if name in TOP:
        return TOP[name]
    _, number, *part, leaf = name.split(".")
    return f"blk.{number}.{BLOCK['.'.join(part)]}.{leaf}"


def refuse_frequencies(stored: dict[str, StoredTensor]) -> None:
    """Refuse a table of rotary frequencies, which Llama 3.1 files hold: the model would be another one."""
    if "rope_freqs.weight" in stored:
        raise ValueError("the file holds rope_freqs.weight, a table that scales rotary frequencies: "
                         "this library's Llama does not read it")


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class Settings:
    """The keys of the metadata that describe the model, read with checks. A ValueError names the key and both values.
    """

    def __init__(self, metadata: dict[str, Any]):
        """The settings of a model. ValueError for an architecture, or for a key of it, that is not read here."""
        self.metadata = metadata
        self.architecture = metadata.get("general.architecture")
        if not is_one_of(self.architecture, ARCHITECTURES):
            wanted = " or ".join(ARCHITECTURES)
            raise ValueError(f"general.architecture wants {wanted}, got {shown(self.architecture)}")
        check_general(metadata)
        for key in metadata:
            if key.startswith(f"{self.architecture}."):
                self.check(key.removeprefix(f"{self.architecture}."))

    def check(self, key: str) -> None:
        """ValueError for a key, without the name of the architecture, that changes the model into one we do not have.
        """
        if key in READ or key in HARMLESS:
            return
        value = self.get(key)
        if key not in FIXED:
            raise ValueError(f"the metadata holds {self.architecture}.{first_names([key])}, which this library does "
                             "not know: it may change the model")
        if not is_one_of(value, FIXED[key]):
            wanted = " or ".join(map(repr, FIXED[key]))
            raise ValueError(f"this library's model wants {self.architecture}.{key} {wanted}, got {shown(value)}")

    def get(self, key: str) -> Any:
        """The value of a key, given without the name of the architecture; None if it is missing."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; without a default the key must be there. Arrays, a size a layer, are refused.
        """
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(f"{self.architecture}.{key} wants a whole number of at least 1, got {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; without a default the key must be there.

        The file holds float32 numbers. The result is the shortest decimal number that has this float32 number:
        1e-05, not 9.999999747378752e-06."""
        value = self.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < 1e30 or not math.isfinite(value):
            raise ValueError(f"{self.architecture}.{key} wants a number above 0, got {shown(value)}")
        return float(str(np.float32(value)))


def check_general(metadata: dict[str, Any]) -> None:
    """ValueError for a file that is no whole model, or whose packed tensors are of another version."""
    wanted = {"general.type": ("model",), "split.count": (0, 1), "general.quantization_version": (2,)}
    for key, values in wanted.items():
        if key in metadata and not is_one_of(metadata[key], values):
            named = " or ".join(map(str, values))
            raise ValueError(f"this library reads files with {key} {named}, got {shown(metadata[key])}")


def read_config(settings: Settings, tensors: dict[str, StoredTensor]) -> LlamaConfig:
    """The sizes and settings of the model. ValueError for a model that our Llama is not."""
    width = settings.size("embedding_length")
    heads = settings.size("attention.head_count")
    key_value_heads = settings.size("attention.head_count_kv", heads)
    layers = settings.size("block_count")
    if layers > len(tensors):
        raise ValueError(f"the metadata asks for {layers:,} layers; the file holds {len(tensors):,} tensors in all")
    if heads % key_value_heads:
        raise ValueError(f"{key_value_heads} key/value heads do not divide {heads} heads")
    positions = settings.size("context_length")
    window = settings.get("attention.sliding_window")
    is_set = window is not None and not (type(window) is int and window == 0)
    if is_set and settings.size("attention.sliding_window") < positions:
        raise ValueError(f"this library's model has no sliding window; wanted a {settings.architecture}."
                         f"attention.sliding_window of at least context_length ({positions}), got {window}")
    return LlamaConfig(
        vocab=vocabulary_size(settings, tensors),
        positions=positions,
        width=width,
        layers=layers,
        heads=heads,
        key_value_heads=key_value_heads,
        head_width=head_width(settings, width, heads),
        hidden=settings.size("feed_forward_length"),
        rope_base=settings.number("rope.freq_base", 10000.0),
        rope_scaling=rotary_scaling(settings),
        tied="output.weight" not in tensors,
        qkv_bias=settings.architecture == "qwen2" or "blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        eps=settings.number("attention.layer_norm_rms_epsilon"))


def vocabulary_size(settings: Settings, tensors: dict[str, StoredTensor]) -> int:
    """The number of rows of the embedding. ValueError if it is missing, or if vocab_size is another number."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("the file wants a matrix token_embd.weight, the embedding")
    rows = embedding.shape[0]
    if settings.size("vocab_size", rows) != rows:
        raise ValueError(f"{settings.architecture}.vocab_size wants {rows}, the number of rows of token_embd.weight, "
                         f"got {settings.get('vocab_size')}")
    return rows


def head_width(settings: Settings, width: int, heads: int) -> int | None:
    """The width of a head; None if it is the model's width divided by the number of heads.

    ValueError unless keys, values and rotary positions all have this width."""
    if settings.get("attention.key_length") is None and width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
    D = settings.size("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if settings.size(key, D) != D:
            raise ValueError(f"this library's model wants {settings.architecture}.{key} {D}, the width of a head, "
                             f"got {settings.get(key)}")
    if D % 2:
        raise ValueError(f"rotary positions want heads of an even width, got {D}")
    return None if D * heads == width else D


def rotary_scaling(settings: Settings) -> RotaryScaling | None:
    """The scaling of rotary frequencies: none or linear. ValueError for other kinds, such as yarn."""
    kind = settings.get("rope.scaling.type")
    old_factor = settings.number("rope.scale_linear", 1.0)  # the key of old files
    factor = settings.number("rope.scaling.factor", old_factor)
    if kind is None:
        kind = "none" if factor == 1 else "linear"
    if not is_one_of(kind, ("none", "linear")):
        raise ValueError(f"{settings.architecture}.rope.scaling.type wants none or linear, got {shown(kind)}")
    return None if kind == "none" or factor == 1 else RotaryScaling("linear", factor)

