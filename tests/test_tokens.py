"""Tokenizers other than the shipped one: other special tokens, other ids, padding and truncation switched on."""
from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from helpers import host_only
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tinyft import data, tokens
from tinyft.data import IGNORE, Record

pytestmark = host_only

TEXT = "one two three four five six"
WORDS = TEXT.split()
SPECIAL = ["[SEP]", "[PAD]", "<|endoftext|>", "[UNK]", "[MASK]", "[CLS]"]     # not in the order of the shipped one


def word_piece(special: list[str]) -> Tokenizer:
    """BERT's kind: its special tokens come last, and its template adds [CLS] and [SEP]."""
    vocabulary = [*WORDS, "fi", "##ve", *special]
    ids = {token: i for i, token in enumerate(vocabulary)}
    out = Tokenizer(models.WordPiece(ids, unk_token=special[0]))
    out.normalizer = normalizers.BertNormalizer()
    out.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if "[CLS]" in special and "[SEP]" in special:
        pairs = [(token, ids[token]) for token in ("[CLS]", "[SEP]")]
        out.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=pairs)
    out.add_special_tokens(special)
    return out


def byte_pairs(special: list[str]) -> Tokenizer:
    """GPT-2's kind: bytes, without merges, and the special tokens in the middle."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters[:100], *special, *letters[100:]]
    out = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    out.add_special_tokens(special)
    return out


def unigram(special: list[str]) -> Tokenizer:
    """Pieces with probabilities, and the special tokens first."""
    pieces = [*special, *WORDS, "▁", *sorted(set("".join(WORDS)))]
    out = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    out.pre_tokenizer = pre_tokenizers.Metaspace()
    out.add_special_tokens(special)
    return out


KINDS: dict[str, Callable] = {"WordPiece": word_piece, "BPE": byte_pairs, "Unigram": unigram}
EVERY = pytest.mark.parametrize("kind", KINDS)


def with_padding(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as sentence models ship it: texts are cut, and filled up."""
    pad = tokenizer.token_to_id("[PAD]")
    tokenizer.enable_padding(length=40, pad_id=pad, pad_token="[PAD]")
    tokenizer.enable_truncation(3, stride=1)
    return tokenizer


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    """The ids of some tokens."""
    return [tokenizer.token_to_id(token) for token in tokens]


@EVERY
def test_padding_and_truncation_of_a_tokenizer_are_not_applied_inside_texts(kind):
    """The ids are those of the same tokenizer without them; and the tokenizer that was given keeps both."""
    plain = KINDS[kind](SPECIAL)
    padded = with_padding(KINDS[kind](SPECIAL))
    before = padded.to_str()
    cls, sep, end = ids_of(plain, "[CLS]", "[SEP]", "<|endoftext|>")
    text = plain.encode(TEXT, add_special_tokens=False).ids
    assert len(text) > 3
    assert padded.encode(TEXT, add_special_tokens=False).ids != text
    assert data.encode(padded, TEXT, 64) == [cls, *text, sep]
    assert data.encode(padded, TEXT, 64, "gpt") == [*text, end]
    assert data.encode(padded, TEXT, 5) == [cls, *text[:3], sep]
    assert padded.to_str() == before


@EVERY
def test_the_mask_is_true_at_the_tokens_of_the_text_alone(kind):
    """Padding has the tokenizer's own id."""
    tokenizer = with_padding(KINDS[kind](SPECIAL))
    cls, sep, pad = ids_of(tokenizer, "[CLS]", "[SEP]", "[PAD]")
    (batch,) = data.text_batches([("two", 0), (TEXT, 1)], tokenizer, 2, 64).once()
    for row, mask, text in zip(batch["ids"], batch["mask"], ("two", TEXT), strict=True):
        assert row[mask].tolist() == data.encode(tokenizer, text, 64)
        assert row[mask][0] == cls and row[mask][-1] == sep
        assert (row[~mask] == pad).all()
    assert not batch["mask"].all()


@EVERY
def test_masked_batches_have_the_special_tokens_of_their_tokenizer(kind):
    """[CLS] and [SEP] stand around every row, [MASK] replaces, and no special token is drawn or predicted."""
    tokenizer = KINDS[kind](SPECIAL)
    cls, sep, mask = ids_of(tokenizer, "[CLS]", "[SEP]", "[MASK]")
    text = tokenizer.encode(TEXT * 9, add_special_tokens=False).ids
    batches = data.mlm_batches(text, 8, 4, tokenizer=tokenizer, p=1.0)
    special = ids_of(tokenizer, *SPECIAL)
    drawn = set()
    for batch in [next(batches) for _ in range(20)]:
        ids, labels = batch["ids"], batch["labels"]
        assert (ids[:, 0] == cls).all() and (ids[:, -1] == sep).all()
        chosen = labels != IGNORE
        assert not np.isin(labels[chosen], special).any()
        drawn |= set(ids[chosen].tolist())
    assert drawn & set(special) == {mask}
    assert max(drawn) < tokenizer.get_vocab_size()


RECORDS = (Record("a", "prose", "train", "one two"), Record("b", "prose", "train", "three"),
           Record("c", "source", "train", "four five six"))


@EVERY
def test_pretraining_ends_texts_with_the_end_of_its_tokenizer(kind, monkeypatch):
    """Texts are neither padded nor cut."""
    monkeypatch.setattr(data.text, "snapshot", lambda: RECORDS)
    tokenizer = with_padding(KINDS[kind](SPECIAL))
    (end,) = ids_of(tokenizer, "<|endoftext|>")
    plain = KINDS[kind](SPECIAL)
    one, two = (plain.encode(text, add_special_tokens=False).ids for text in ("one two", "three"))
    assert data.pretraining("prose", "train", tokenizer).tolist() == [*one, end, *two, end]


NEEDS = {
    "encode": (lambda t: data.encode(t, TEXT, 9), ("[CLS]", "[SEP]")),
    "encode gpt": (lambda t: data.encode(t, TEXT, 9, "gpt"), ("<|endoftext|>",)),
    "text_batches": (lambda t: data.text_batches([("one", 0)], t, 1, 9), ("[CLS]", "[SEP]")),
    "mlm_batches": (lambda t: data.mlm_batches([0] * 9, 5, 1, tokenizer=t), ("[CLS]", "[SEP]", "[MASK]")),
    "pretraining": (lambda t: data.pretraining("prose", "valid", t), ("<|endoftext|>",)),
    "task": (lambda t: data.task("domain", tokenizer=t), ("<|endoftext|>",)),
}


@pytest.mark.parametrize("name, missing", [(name, token) for name, (_, needs) in NEEDS.items() for token in needs])
def test_a_missing_special_token_is_named_in_one_sentence(name, missing):
    """With all but this token it works; a tokenizer that needs fewer is not refused."""
    call, needs = NEEDS[name]
    others = [token for token in SPECIAL if token != missing]
    with pytest.raises(ValueError, match=re.escape(missing)) as error:
        call(word_piece(others))
    assert re.fullmatch(r"[^\n]* wants a tokenizer with the special token [^\n]*, got one without it", str(error.value))
    if name not in ("pretraining", "task"):                # these two read all of the shipped text
        call(word_piece(["[UNK]", *needs]))


def test_other_spellings_and_the_names_that_load_found():
    """<s>, </s> and <mask> are found; a name that `load` put on the tokenizer goes before every spelling."""
    tokenizer = unigram(["<unk>", "<mask>", "</s>", "<pad>", "<s>", "[begin]"])
    assert tokens.special_ids("f", tokenizer, "cls", "sep", "mask", "pad", "eos", "bos") == [4, 2, 1, 3, 2, 4]
    tokenizer.special_tokens = {"cls": "[begin]", "sep": "missing"}
    assert tokens.special_ids("f", tokenizer, "cls", "sep") == [5, 2]
    assert data.encode(tokenizer, "two", 9)[0] == 5
    assert data.encode(with_padding_of("<pad>", tokenizer), "two", 9)[0] == 5       # a copy has the names too


def with_padding_of(pad: str, tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, now with padding."""
    tokenizer.enable_padding(length=20, pad_token=pad)
    return tokenizer


@pytest.mark.parametrize("special, wanted", [
    (["[UNK]", "<|endoftext|>", "[PAD]"], "[PAD]"), (["[UNK]", "<|endoftext|>"], "<|endoftext|>"), (["[UNK]"], None),
])
def test_the_id_of_padding(special, wanted):
    """The padding token, else the end of text, else 0."""
    tokenizer = word_piece(special)
    assert tokens.padding_id(tokenizer) == (0 if wanted is None else tokenizer.token_to_id(wanted))


def test_a_copy_reads_the_names_of_special_tokens_as_the_original_does():
    tokenizer = with_padding(byte_pairs(SPECIAL))
    assert tokenizer.token_to_id("[MASK]") in data.encode(tokenizer, "a [MASK]", 30)
    tokenizer.encode_special_tokens = True
    assert tokenizer.token_to_id("[MASK]") not in data.encode(tokenizer, "a [MASK]", 30)


class OneWord:
    """A pre-tokenizer written in Python, which cannot be copied."""

    def pre_tokenize(self, text):
        """Leave the text in one piece."""


def test_a_tokenizer_that_cannot_be_copied():
    """It is used as it is; with padding it is refused, and the sentence says what helps."""
    tokenizer = word_piece(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(OneWord())
    assert data.encode(tokenizer, "two", 9)[1:-1] == ids_of(tokenizer, "two")
    with pytest.raises(ValueError, match=r"wants a tokenizer without padding .*; got .*: call its no_padding\(\)"):
        data.encode(with_padding(tokenizer), "two", 9)


def test_a_text_that_the_tokenizer_cannot_encode():
    """A vocabulary without a token for unknown words."""
    tokenizer = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "one": 2}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="text_batches wants a text that the tokenizer can encode, got 'two': "):
        data.text_batches([("one", 0), ("two", 1)], tokenizer, 1, 9)


def test_a_vocabulary_with_gaps():
    """Its size is its largest id and one."""
    tokenizer = Tokenizer(models.WordLevel({"[CLS]": 5, "[SEP]": 9, "[MASK]": 3, "a": 70, "b": 2}, unk_token="a"))
    batches = data.mlm_batches([70, 2] * 9, 8, 2, tokenizer=tokenizer)
    assert batches.collate.vocab == 71
    with pytest.raises(ValueError, match="below the vocab of 50, got the id 70"):
        data.mlm_batches([70, 2] * 9, 8, 2, vocab=50, tokenizer=tokenizer)
