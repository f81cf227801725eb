"""GGUF files for the tests: a writer of bytes, written from the specification alone, and small models in files.

It is independent of the reader: names, the order of the rows of q and k, and the layout of the bytes stand here again.
"""
from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from helpers import host
from ml_dtypes import bfloat16

import tinyft as ft
from tinyft.compress import FORMATS

CODES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": bfloat16}
NUMBERS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "u8": 10, "i8": 11, "f8": 12}
NAMES = {"attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output", "mlp.gate": "ffn_gate",
         "mlp.up": "ffn_up", "mlp.down": "ffn_down", "norm1": "attn_norm", "norm2": "ffn_norm"}
TOP = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}
SYSTEM = "You are a small model"
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SYSTEM + "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def value(v: Any) -> bytes:
    """The code of the type and the value. An int is of 4 bytes, a float too; a NumPy array keeps its dtype."""
    if isinstance(v, bool):
        return struct.pack("<IB", 7, v)
    if isinstance(v, int):
        return struct.pack("<II", 4, v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    if isinstance(v, str):
        return struct.pack("<I", 8) + text(v)
    return struct.pack("<I", 9) + entries(v)


def entries(v: Any) -> bytes:
    """An array: the code of its entries, their number, the entries."""
    if isinstance(v, np.ndarray):
        return struct.pack("<IQ", NUMBERS[v.dtype.str[1:]], len(v)) + v.tobytes()
    if v and isinstance(v[0], str):
        return struct.pack("<IQ", 8, len(v)) + b"".join(map(text, v))
    return struct.pack("<IQ", 9, len(v)) + b"".join(map(entries, v))


def entry(name: str, shape: tuple[int, ...], code: int, offset: int) -> bytes:
    """A row of the table of tensors."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sizes + struct.pack("<IQ", code, offset)


def stored(a: np.ndarray, kind: str) -> bytes:
    """The bytes of a tensor of this type."""
    if kind in DTYPES:
        return np.ascontiguousarray(a.astype(DTYPES[kind])).tobytes()
    return FORMATS[kind].quantize(a).file_blocks().tobytes()


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, tuple[str, np.ndarray]], *, version: int = 3,
               magic: bytes = b"GGUF") -> bytes:
    """A file. tensors: {name: (type, values)}."""
    alignment = metadata.get("general.alignment", 32)
    head = magic + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, v in metadata.items():
        head += text(key) + value(v)
    data = b""
    for name, (kind, a) in tensors.items():
        head += entry(name, a.shape, CODES[kind], len(data))
        data += stored(a, kind)
        data += bytes(-len(data) % alignment)
    return head + bytes(-len(head) % alignment) + data


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def byte_letters() -> list[str]:
    """The 256 characters that stand for the bytes in a byte-level vocabulary, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {}
    for byte in range(256):
        letters[byte] = chr(byte) if byte in plain else chr(256 + len([b for b in range(byte) if b not in plain]))
    return [letters[byte] for byte in range(256)]


def tokenizer_metadata(pre: str = "smollm") -> dict[str, Any]:
    """A tokenizer of 3 special tokens, 256 bytes and a few merges."""
    merges = ["Ġ t", "h e", "Ġt he", "i n", "1 2", "Ġ Ġ", "' s"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_letters(), *(m.replace(" ", "") for m in merges)]
    types = np.ones(len(tokens), np.int32)
    types[:3] = 3
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def model_metadata(c: Any, architecture: str = "llama") -> dict[str, Any]:
    """The keys of a LlamaConfig."""
    keys = {
        "block_count": c.layers,
        "context_length": c.positions,
        "embedding_length": c.width,
        "feed_forward_length": c.hidden,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.key_value_heads,
        "rope.freq_base": float(c.rope_base),
        "attention.layer_norm_rms_epsilon": c.eps,
        "vocab_size": c.vocab,
        "rope.dimension_count": c.width_of_heads,
    }
    named = {f"{architecture}.{key}": v for key, v in keys.items()}
    return {"general.architecture": architecture, "general.type": "model", **named}


def to_file_order(a: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of llama files: the halves of each rotary pair side by side."""
    halves = a.reshape(heads, 2, a.shape[0] // heads // 2, *a.shape[1:])
    return halves.swapaxes(1, 2).reshape(a.shape)


def model_tensors(model: ft.Llama, kind: str, architecture: str = "llama") -> dict[str, tuple[str, np.ndarray]]:
    """{name in the file: (type, values)}: matrices of this type, vectors in float32."""
    c = model.config
    tensors = {}
    for name, p in model.named_parameters().items():
        a = host(p)
        if name in TOP:
            stored_name = TOP[name]
        else:
            _, number, part, leaf = split_name(name)
            stored_name = f"blk.{number}.{NAMES[part]}.{leaf}"
            heads = {"attn.q": c.heads, "attn.k": c.key_value_heads}.get(part)
            if heads is not None and architecture == "llama":
                a = to_file_order(a, heads)
        tensors[stored_name] = (kind if a.ndim == 2 else "F32", a)
    return tensors


def split_name(name: str) -> tuple[str, str, str, str]:
    """blocks.0.attn.q.weight -> ("blocks", "0", "attn.q", "weight")"""
    top, number, *part, leaf = name.split(".")
    return top, number, ".".join(part), leaf


def small_llama(seed: int = 0, **settings: Any) -> ft.Llama:
    """Two layers, 4 heads of 16, 2 key/value heads, a tied head; random weights and norms."""
    sizes = dict(vocab=272, positions=64, width=64, layers=2, heads=4, key_value_heads=2, hidden=96, tied=True,
                 rope_base=500.0, eps=1e-5, std=0.2)
    model = ft.Llama(ft.LlamaConfig(**(sizes | settings)), seed=seed)
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        if len(p.shape) == 1:
            p.copy_(rng.uniform(0.5, 1.5, p.shape))
    return model


def write_model(file: Path, model: ft.Llama, kind: str = "Q4_1", architecture: str = "llama",
                changes: dict[str, Any] | None = None, drop: tuple[str, ...] = ()) -> Path:
    """Write a model with its tokenizer. changes: further or other keys of the metadata;  drop: keys that are left out
    """
    metadata = model_metadata(model.config, architecture) | tokenizer_metadata() | (changes or {})
    for key in drop:
        del metadata[key]
    file.write_bytes(gguf_bytes(metadata, model_tensors(model, kind, architecture)))
    return file
