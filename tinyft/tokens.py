"""The special tokens of a tokenizer, and encoding without the padding and truncation that it may hold.

    special_ids("encode", tokenizer, "cls", "sep")      the ids of [CLS] and [SEP] in this tokenizer
    plain("encode", tokenizer)                          the tokenizer, or a copy that neither pads nor truncates

A kind of special token ("cls") has several spellings, and any id. `formats.load` puts a dict `special_tokens` on its
tokenizer, {kind: token} as tokenizer_config.json names them. Without it, the usual spellings are looked up.
"""
from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from . import checks

__all__ = ["SPELLINGS", "all_special", "encode_text", "padding_id", "plain", "special_ids", "special_token"]

# The spellings of each kind of special token, the usual one first.
SPELLINGS = {
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "bos": ("<|endoftext|>", "<s>"),
    "eos": ("<|endoftext|>", "</s>"),
}


def special_token(tokenizer: Tokenizer, kind: str) -> str | None:
    """The token of this kind, a key of SPELLINGS; None if the tokenizer has none."""
    named = getattr(tokenizer, "special_tokens", {}).get(kind)
    candidates = SPELLINGS[kind] if named is None else (named, *SPELLINGS[kind])
    for token in candidates:
        if tokenizer.token_to_id(token) is not None:
            return token
    return None


def special_ids(name: str, tokenizer: Tokenizer, *kinds: str) -> list[int]:
    """The ids of the special tokens of these kinds. ValueError, naming the first that the tokenizer lacks.

    name: the function that needs them; the message begins with it."""
    tokens = [special_token(tokenizer, kind) for kind in kinds]
    for kind, token in zip(kinds, tokens, strict=True):
        if token is None:
            wanted = " or ".join(SPELLINGS[kind])
            raise ValueError(f"{name} wants a tokenizer with the special token {wanted}, got one without it")
    return [tokenizer.token_to_id(token) for token in tokens]


def all_special(tokenizer: Tokenizer) -> dict[str, int]:
    """{token: id} of every special token: those of the usual kinds, and those that the tokenizer marks as special."""
    found = {}
    for kind in SPELLINGS:
        token = special_token(tokenizer, kind)
        if token is not None:
            found[token] = tokenizer.token_to_id(token)
    for number, token in tokenizer.get_added_tokens_decoder().items():
        if token.special:
            found[token.content] = number
    return found


def padding_id(tokenizer: Tokenizer) -> int:
    """The id that fills a batch where its mask is False: of the padding token, else of the end of text, else 0.

    A model gives the same output for every such id."""
    for kind in ("pad", "eos"):
        token = special_token(tokenizer, kind)
        if token is not None:
            return tokenizer.token_to_id(token)
    return 0


def plain(name: str, tokenizer: Any) -> Tokenizer:
    """The tokenizer if it neither pads nor truncates, else a copy that does neither. The given one is not changed.

    Padding and truncation are stored in tokenizer.json. A tokenizer applies them to every text, before the special
    tokens are added. TypeError for another kind of object, ValueError for a tokenizer that cannot be copied."""
    wanted = "a tokenizers.Tokenizer (of a tokenizer of transformers, its backend_tokenizer)"
    checks.instance(f"{name}: tokenizer", tokenizer, Tokenizer, wanted)
    if tokenizer.padding is None and tokenizer.truncation is None:
        return tokenizer
    try:
        copy = Tokenizer.from_str(tokenizer.to_str())
    except Exception as e:                                 # the library raises plain Exception
        raise ValueError(f"{name} wants a tokenizer without padding and truncation, or one that can be copied; got one "
                         f"for which neither holds ({e}): call its no_padding() and no_truncation()") from e
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = tokenizer.encode_special_tokens             # not a part of to_str()
    copy.special_tokens = getattr(tokenizer, "special_tokens", {})
    copy.chat_template = getattr(tokenizer, "chat_template", None)
    return copy


def encode_text(name: str, tokenizer: Tokenizer, text: Any) -> list[int]:
    """The ids of a text without special tokens. TypeError for an object that is no string.

    ValueError if the tokenizer cannot encode it: some have no token for an unknown word.
    tokenizer: as `plain` gives it.  name: the function that needs the ids; the message begins with it."""
    checks.instance(f"{name}: text", text, str, "a string")
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as e:                                 # the library raises plain Exception
        cause = " ".join(str(e).split())
        raise ValueError(f"{name} wants a text that the tokenizer can encode, got {checks.brief(text)}: {cause}") from e
