"""The tokenizer of a GGUF file: byte-level BPE, from the keys tokenizer.ggml.* of its metadata.

    model           "gpt2": byte-level BPE. "llama", which is SentencePiece, and others are refused
    pre             the name of the rule that cuts a text into words, a key of PRE_TOKENIZERS
    tokens          the vocabulary, in the order of the ids;  merges: "Ġ t" and so on, the earliest first
    token_type      a number for each token: 3 control, 4 user-defined
    bos_token_id, eos_token_id, padding_token_id, unknown_token_id

Control tokens such as <|im_end|> are special tokens. The tokenizer's attribute `special_tokens` names the token of each
kind, as for a directory (tokenizer.py), and `chat_template` is the text of tokenizer.chat_template, or None.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..files import refuse_damage
from .gguf import is_one_of, shown

__all__ = ["PRE_TOKENIZERS", "build_tokenizer"]

CONTROL, USER_DEFINED = 3, 4
KINDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
MISSING_ID = (-1, 0xFFFFFFFF)                            # of older files: no token of this kind


@dataclass(frozen=True)
class PreTokenizer:
    """The rule that cuts a text into words; BPE merges inside a word only.

    pattern     a regular expression whose matches are the words; None: GPT-2's own
    digits      True: each digit is a word of its own, cut out before the pattern applies
    nfc         True: the text is brought into the normal form NFC first
    merge_whole True: a word that is a token stays whole, whatever the merges say
    bos         True: the first token of the text is `bos`, unless add_bos_token says no"""
    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    merge_whole: bool = False
    bos: bool = False


QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|"
         r"\s+")
LLAMA3 = QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
# The rules by their names in tokenizer.ggml.pre. Two names of one rule are two models that share it.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "gpt2": PreTokenizer(),
    "olmo": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "starcoder": PreTokenizer(digits=True),
    "qwen2": PreTokenizer(QWEN2, nfc=True),
    "llama-bpe": PreTokenizer(LLAMA3, merge_whole=True, bos=True),
    "llama3": PreTokenizer(LLAMA3, merge_whole=True, bos=True),
}


def build_tokenizer(metadata: dict[str, Any], rows: int) -> Tokenizer | None:
    """The tokenizer that the metadata describes, or None if it describes none.

    rows: of the model's embedding, the most tokens that it may have. ValueError for a tokenizer that is not read here,
    and for a damaged one."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if not is_one_of(kind, ("gpt2",)):
        raise ValueError(f"tokenizer.ggml.model wants gpt2, a byte-level BPE, got {shown(kind)}: open the model's "
                         "directory, with its tokenizer.json, instead of the GGUF file")
    pre = read_text(metadata, "tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre wants one of {', '.join(PRE_TOKENIZERS)}, got {shown(pre)}")
    rule = PRE_TOKENIZERS[pre]
    tokens = read_tokens(metadata, rows)
    merges = read_merges(metadata)
    named = read_special(metadata, tokens)
    with refuse_damage("the tokenizer"):
        vocabulary = {token: number for number, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule.merge_whole))
        if rule.nfc:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizer(rule)
        tokenizer.decoder = decoders.ByteLevel()
        add_tokens(tokenizer, tokens, read_types(metadata, tokens))
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        if read_flag(metadata, "add_bos_token", default=rule.bos) and "bos" in named:
            bos = named["bos"]
            tokenizer.post_processor = processors.TemplateProcessing(
                f"{bos} $A", f"{bos} $A {bos} $B", [(bos, vocabulary[bos])])
        tokenizer.encode("a b")                          # some damage is noticed only here, as a panic
    tokenizer.special_tokens = named
    tokenizer.chat_template = read_text(metadata, "tokenizer.chat_template", optional=True)
    return tokenizer


def pre_tokenizer(rule: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """The rule in the words of the tokenizers library. Its last step writes each byte as one character."""
    parts: list[pre_tokenizers.PreTokenizer] = []
    if rule.digits:
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    if rule.pattern is not None:
        parts.append(pre_tokenizers.Split(Regex(rule.pattern), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.pattern is None))
    return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)


def add_tokens(tokenizer: Tokenizer, tokens: list[str], types: np.ndarray) -> None:
    """Mark the control tokens as special, and cut the user-defined ones out of a text before BPE, in place."""
    added = []
    for number in np.flatnonzero((types == CONTROL) | (types == USER_DEFINED)).tolist():
        if tokens[number]:                               # the library has no empty added token
            added.append(AddedToken(tokens[number], normalized=False, special=bool(types[number] == CONTROL)))
    tokenizer.add_tokens(added)


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_text(metadata: dict[str, Any], key: str, *, optional: bool = False) -> str | None:
    """A text. None if it is missing and may be."""
    value = metadata.get(key)
    if not isinstance(value, str) and not (optional and value is None):
        raise ValueError(f"{key} wants a text, got {shown(value)}")
    return value


def read_flag(metadata: dict[str, Any], name: str, *, default: bool) -> bool:
    """tokenizer.ggml.`name`: True or False."""
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if type(value) is not bool:
        raise ValueError(f"tokenizer.ggml.{name} wants true or false, got {shown(value)}")
    return value


def read_tokens(metadata: dict[str, Any], rows: int) -> list[str]:
    """The vocabulary, at most `rows` different texts."""
    tokens = read_texts(metadata, "tokens")
    if len(tokens) > rows:
        raise ValueError(f"tokenizer.ggml.tokens holds {len(tokens):,} tokens; the embedding has {rows:,} rows")
    if len(set(tokens)) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens holds a token twice")
    return tokens


def read_texts(metadata: dict[str, Any], name: str) -> list[str]:
    """tokenizer.ggml.`name`: a list of texts that is not empty."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"tokenizer.ggml.{name} wants a list of texts, got {shown(value)}")
    return value


def read_merges(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges as pairs of tokens."""
    merges = []
    for merge in read_texts(metadata, "merges"):
        left, space, right = merge.partition(" ")
        if not left or not space or not right or " " in right:
            raise ValueError(f"tokenizer.ggml.merges wants two tokens and a space between them, got {shown(merge)}")
        merges.append((left, right))
    return merges


def read_types(metadata: dict[str, Any], tokens: list[str]) -> np.ndarray:
    """The type of each token, a whole number."""
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type wants a whole number for each of {len(tokens):,} tokens, "
                         f"got {shown(types)}")
    return types


def read_special(metadata: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    """{kind: token} of the special tokens that the metadata names by their ids."""
    named = {}
    for kind, name in KINDS.items():
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is None or is_one_of(number, MISSING_ID):
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            raise ValueError(f"tokenizer.ggml.{name}_token_id wants the number of a token below {len(tokens):,}, "
                             f"got {shown(number)}")
        named[kind] = tokens[number]
    return named
