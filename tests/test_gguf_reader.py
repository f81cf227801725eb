"""The reader of GGUF files, on good and on hostile bytes, and the tokenizer that the metadata describes."""
from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf_files import (
    CODES,
    entry,
    gguf_bytes,
    model_metadata,
    model_tensors,
    small_llama,
    text,
    tokenizer_metadata,
    value,
    write_model,
)
from helpers import host, time_limit

import tinyft as ft
from tinyft.compress import Q4_1
from tinyft.formats.gguf import read_gguf
from tinyft.formats.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer

# ── hostile files ────────────────────────────────────────────────────────────────────────────────────────────────────
METADATA = {"general.architecture": "llama", "a": 1, "b": 2.5, "c": True, "list": ["x", "yy"],
            "numbers": np.array([1, 2], np.int32), "nested": [np.array([1], np.int32), ["x"]]}
TENSORS = {"x": ("F32", np.arange(6, dtype=np.float32).reshape(2, 3)), "y": ("Q4_1", np.ones((2, 64), np.float32))}


def refused(file: Path, data: bytes, words: str) -> str:
    """The sentence with which the reader refuses these bytes, in little time."""
    file.write_bytes(data)
    with time_limit(1, 10), pytest.raises(ValueError, match=words) as caught:
        read_gguf(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    return message


def test_the_reader_gives_what_the_writer_wrote(tmp_path):
    for metadata in (METADATA, METADATA | {"general.alignment": 8}, METADATA | {"general.alignment": 256}):
        for version in (2, 3):
            (tmp_path / "x.gguf").write_bytes(gguf_bytes(metadata, TENSORS, version=version))
            found = read_gguf(tmp_path / "x.gguf")
            assert list(found.metadata) == list(metadata)
            assert found.metadata["list"] == ["x", "yy"]
            assert found.metadata["nested"][1] == ["x"]
            assert [found.metadata[key] for key in "abc"] == [1, 2.5, True]
            np.testing.assert_array_equal(found.metadata["numbers"], [1, 2])
            np.testing.assert_array_equal(found.tensors["x"].dense(), TENSORS["x"][1])
            assert found.tensors["y"].shape == (2, 64)
            np.testing.assert_array_equal(host(Q4_1(np.array(found.tensors["y"].blocks())).dequantize()), 1.0)
            assert not found.tensors["x"].data.flags.writeable


def test_every_truncation_is_refused(tmp_path):
    data = gguf_bytes(METADATA, TENSORS)
    size = len(data) - (-(-2 * 2 * 20 // 32) * 32 - 2 * 2 * 20)                  # without the padding at the end
    for length in range(size):
        refused(tmp_path / "x.gguf", data[:length], "is damaged|is no GGUF file")
    (tmp_path / "x.gguf").write_bytes(data[:size])
    read_gguf(tmp_path / "x.gguf")


def header(tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def key(name: str = "k") -> bytes:
    """The beginning of a file with one key, up to its value."""
    return header(0, 1) + text(name)


def array_value(code: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IIQ", 9, code, count) + data


ROOM = bytes(99)                                         # behind the header, so that counts fit
HUGE = (1 << 60, (1 << 64) - 1, 1 << 32, 1 << 63)
DEEP = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50 + struct.pack("<IQ", 0, 0)
HOSTILE = {
    "another magic": (b"GGML" + ROOM, "is no GGUF file: wanted the first four bytes b'GGUF', got b'GGML'"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + ROOM, "of version 1: wanted version 2 or 3"),
    "version 0": (b"GGUF" + struct.pack("<I", 0) + ROOM, "of version 0"),
    "version 4": (b"GGUF" + struct.pack("<I", 4) + ROOM, "of version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + ROOM, "big-endian"),
    "text of 2^60 bytes": (header(0, 1) + struct.pack("<Q", 1 << 60) + ROOM, "the length of the name of a key"),
    "a value of 2^60 bytes": (key() + struct.pack("<IQ", 8, 1 << 60) + ROOM, "length of the val"),
    "unknown type": (key() + struct.pack("<I", 13) + ROOM, "the unknown type 13"),
    "unknown type of entries": (key() + array_value(99, 1) + ROOM, "the unknown type 99"),
    "deep arrays": (key() + DEEP, "more than 4 arrays inside each other"),
    "a Boolean of 2": (key() + struct.pack("<IB", 7, 2) + ROOM, "wants 0 or 1"),
    "Booleans of 2": (key() + array_value(7, 2, b"\x01\x02") + ROOM, "wants 0 or 1"),
    "not UTF-8": (header(0, 1) + text(b"\xff\xfe") + ROOM, "is no UTF-8 text"),
    "not UTF-8 in a value": (key() + struct.pack("<I", 8) + text(b"\xff") + ROOM, "no UTF-8"),
    "not UTF-8 in a list": (key() + array_value(8, 1, text(b"\xc3")) + ROOM, "not UTF-8"),
    "a key twice": (header(0, 2) + (text("k") + value(1)) * 2 + ROOM, "the key 'k' stands twice"),
    "a text in a list": (key() + array_value(8, 2, text("x") + struct.pack("<Q", 1 << 60)), "ends beh"),
    "alignment 0": (key("general.alignment") + value(0) + ROOM, "alignment wants a power of two"),
    "alignment 24": (key("general.alignment") + value(24) + ROOM, "alignment wants a power"),
    "alignment of a text": (key("general.alignment") + value("x") + ROOM, "alignment wants a power"),
    "no axes": (header(1) + text("x") + ROOM, "has 0 axes"),
    "five axes": (header(1) + entry("x", (1,) * 5, 0, 0) + ROOM, "has 5 axes"),
    "2^32 - 1 axes": (header(1) + text("x") + struct.pack("<I", 2**32 - 1) + ROOM, "has 4294967295 axes"),
    "an empty axis": (header(1) + entry("x", (3, 0), 0, 0) + ROOM, "an axis of size 0"),
    "a product that overflows": (header(1) + entry("x", (1 << 32, 1 << 32, 1 << 32), 0, 0) + ROOM, "ends behind the"),
    "a product that is 0 in 64 bits": (header(1) + entry("x", (1 << 62, 4), 0, 0) + ROOM, "ends behind the end"),
    "an offset that wraps": (header(1) + entry("x", (4,), 0, (1 << 64) - 32) + ROOM, "ends behind the end"),
    "an unaligned offset": (header(1) + entry("x", (4,), 0, 4) + ROOM, "no multiple of 32"),
    "half a block": (header(1) + entry("x", (2, 40), 3, 0) + ROOM, "rows of a multiple of 32 weights, got 40"),
    "a tensor twice": (header(2) + entry("x", (4,), 0, 0) * 2 + ROOM, "the tensor 'x' stands twice"),
    "a shared place": (header(2) + entry("x", (4,), 0, 0) + entry("y", (4,), 0, 0) + ROOM, "share bytes"),
    "an overlap": (header(2) + entry("x", (20,), 0, 0) + entry("y", (4,), 0, 64) + bytes(299), "'x' and 'y' share"),
    "a long name": (header(1) + entry("x" * 300, (4,), 0, 0) + ROOM, "length of the name of a tensor is 300"),
    "a name of two lines": (header(1) + entry("x\ny", (4,), 14, 0) + ROOM, "of the type Q6_K"),
}
for huge in HUGE:
    HOSTILE[f"{huge} tensors"] = (header(huge, 0) + ROOM, "the number of tensors is")
    HOSTILE[f"{huge} keys"] = (header(0, huge) + ROOM, "the number of keys is")
    for code in (0, 4, 7, 8, 9, 12):
        data = key() + array_value(code, huge) + ROOM
        HOSTILE[f"{huge} entries of type {code}"] = (data, "the number of entries of the value of 'k' is")


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_are_refused_in_one_sentence(case, tmp_path):
    data, words = HOSTILE[case]
    refused(tmp_path / "x.gguf", data, words)


@pytest.mark.parametrize("code, name", [(2, None), (8, None), (14, "Q6_K"), (12, "Q4_K"), (6, "Q5_0"), (24, "I8"),
                                        (20, "IQ4_NL"), (31, "number 31"), (4, "number 4"),
                                        (2**32 - 1, "number 4294967295")])
def test_an_unread_type_is_named_with_those_that_are_read(code, name, tmp_path):
    data = header(1) + entry("x", (2, 64), code, 0) + bytes(999)
    if name is None:
        (tmp_path / "x.gguf").write_bytes(data)
        read_gguf(tmp_path / "x.gguf")
    else:
        words = f"holds the tensor 'x' of the type {name}; tinyft reads the types "
        message = refused(tmp_path / "x.gguf", data, words)
        assert all(kind in message for kind in CODES)


def test_many_empty_texts_and_arrays_take_bounded_time(tmp_path):
    """Each is an object of Python, eight bytes in the file."""
    many = 3_000_000
    refused(tmp_path / "x.gguf", key() + array_value(8, many, bytes(8 * many)), "more than 2,097,152")
    arrays = array_value(9, many, struct.pack("<IQ", 0, 0) * many)
    refused(tmp_path / "x.gguf", key() + arrays, "more than 2,097,152 texts and arrays")


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "device", "empty", "dangling"])
def test_special_files_are_refused_at_once(kind, tmp_path):
    file = tmp_path / "x.gguf"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "dangling":
        file.symlink_to(tmp_path / "nothing")
    elif kind == "directory":
        file.mkdir()
    elif kind == "empty":
        file.write_bytes(b"")
    wanted = (ValueError, "longer than 8 bytes") if kind == "empty" else (FileNotFoundError, "x.gguf")
    with time_limit(1, 10), pytest.raises(wanted[0], match=wanted[1]):
        ft.load(file)


def test_a_damaged_scale_is_refused_and_named(tmp_path):
    file = write_model(tmp_path / "m.gguf", small_llama(), "Q4_1")
    found = read_gguf(file).tensors["blk.1.ffn_up.weight"].data
    data = file.read_bytes()
    at = data.index(found.tobytes())
    file.write_bytes(data[:at] + b"\xff\x7f" + data[at + 2:])
    for packed in (False, True):
        with pytest.raises(ValueError, match="the tensor 'blk.1.ffn_up.weight' is damaged: Q4_1 wants finite scales"):
            ft.load(file, packed=packed)


# ── the tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_special_tokens_are_one_token_and_words_are_merged():
    tokenizer = build_tokenizer(tokenizer_metadata(), 300)
    assert tokenizer.encode("<|im_start|>the 12<|im_end|>").tokens == ["<|im_start|>", "t", "he", "Ġ", "1", "2",
                                                                       "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("the é 漢<|im_end|>").ids) == "the é 漢"
    for odd in ("", " ", "\n\n", "é 漢字 🙂", "\x00\x7f", "a" * 1000):
        assert tokenizer.decode(tokenizer.encode(odd).ids) == odd


def test_each_rule_cuts_digits_and_contractions_as_it_should():
    """Pieces of "THE 123  4'S x\n\n": a rule of its own for each name."""
    line = "in 123  4'S x\n\n"
    expected = {
        "gpt-2": ["in", "Ġ123", "Ġ", "Ġ4", "'", "S", "Ġx", "ĊĊ"],
        "smollm": ["in", "Ġ", "1", "2", "3", "ĠĠ", "4", "'", "S", "Ġx", "ĊĊ"],
        "qwen2": ["in", "Ġ", "1", "2", "3", "Ġ", "Ġ", "4", "'S", "Ġx", "ĊĊ"],
        "llama-bpe": ["in", "Ġ", "123", "Ġ", "Ġ", "4", "'S", "Ġx", "ĊĊ"],
    }
    for name, pieces in expected.items():
        tokenizer = build_tokenizer(tokenizer_metadata(name), 300)
        assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(line)] == pieces, name
    assert set(expected) <= PRE_TOKENIZERS.keys()


def test_the_rules_of_a_whole_word_of_the_first_token_and_of_the_normal_form():
    llama = build_tokenizer(tokenizer_metadata("llama-bpe") | {"tokenizer.ggml.add_bos_token": True}, 300)
    assert llama.encode("in").tokens == ["<|im_start|>", "in"]
    assert llama.encode("in", add_special_tokens=False).tokens == ["in"]
    metadata = tokenizer_metadata("llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]
    assert build_tokenizer(metadata, 300).encode("in").tokens[0] == "<|im_start|>", "the rule's default"
    metadata = tokenizer_metadata("smollm")
    del metadata["tokenizer.ggml.add_bos_token"]
    assert build_tokenizer(metadata, 300).encode("in").tokens == ["in"]
    composed, decomposed = "\u00e9", "e\u0301"
    qwen, smollm = (build_tokenizer(tokenizer_metadata(pre), 300) for pre in ("qwen2", "smollm"))
    assert qwen.encode(decomposed).ids == qwen.encode(composed).ids
    assert smollm.encode(decomposed).ids != smollm.encode(composed).ids


@pytest.mark.parametrize("changes, words", [
    ({"model": "llama"}, "tokenizer.ggml.model wants gpt2, a byte-level BPE, got 'llama'"),
    ({"model": 3}, "got 3"),
    ({"model": np.array([1, 2], np.int32)}, "tokenizer.ggml.model wants gpt2"),
    ({"pre": "tekken"}, "tokenizer.ggml.pre wants one of gpt-2, .*got 'tekken'"),
    ({"pre": None}, "tokenizer.ggml.pre wants a text, got None"),
    ({"pre": ["smollm"]}, "tokenizer.ggml.pre wants a text"),
    ({"tokens": None}, "tokens wants a list of texts, got None"),
    ({"tokens": ["a"] * 3}, "holds a token twice"),
    ({"tokens": [str(i) for i in range(301)]}, "holds 301 tokens; the embedding has 300 rows"),
    ({"tokens": np.arange(3, dtype=np.int32)}, "tokens wants a list of texts"),
    ({"merges": ["ab"]}, "merges wants two tokens and a space between them, got 'ab'"),
    ({"merges": ["a b c"]}, "merges wants two tokens"),
    ({"merges": [" a"]}, "merges wants two tokens"),
    ({"merges": ["xx yy"]}, "the tokenizer is damaged"),
    ({"merges": ["a b"]}, "the tokenizer is damaged"),
    ({"token_type": np.ones(2, np.int32)}, "token_type wants a whole number for each of 266 tokens"),
    ({"token_type": np.ones(266, np.float32)}, "token_type wants a whole number"),
    ({"token_type": None}, "token_type wants a whole number"),
    ({"eos_token_id": 266}, "eos_token_id wants the number of a token below 266, got 266"),
    ({"bos_token_id": "x"}, "bos_token_id wants the number"),
    ({"padding_token_id": -2}, "padding_token_id wants the number"),
    ({"add_bos_token": 1}, "add_bos_token wants true or false, got 1"),
])
def test_a_tokenizer_that_is_not_read_is_refused(changes, words):
    metadata = tokenizer_metadata()
    for name, changed in changes.items():
        key = f"tokenizer.ggml.{name}"
        metadata.pop(key)
        if changed is not None:
            metadata[key] = changed
    with pytest.raises(ValueError, match=words) as caught:
        build_tokenizer(metadata, 300)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_tokenizer_and_ids_that_stand_for_none(tmp_path):
    model = small_llama()
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(model_metadata(model.config), model_tensors(model, "F32")))
    assert ft.load(tmp_path / "m.gguf")[1] is None
    metadata = tokenizer_metadata() | {"tokenizer.ggml.bos_token_id": 2**32 - 1}
    del metadata["tokenizer.ggml.padding_token_id"]
    del metadata["tokenizer.chat_template"]
    tokenizer = build_tokenizer(metadata, 300)
    assert tokenizer.special_tokens == {"eos": "<|im_end|>", "unk": "<|endoftext|>"}
    assert tokenizer.chat_template is None
