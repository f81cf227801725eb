"""The rows of a data file as batches for one model, and the chat format around messages."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..chat import TEMPLATES, chat_end, chat_prompt
from ..data import Batches, mlm_batches, text_batches
from ..data.files import Rows, near_name
from ..data.rows import Segments, document_batches, end_of_text, segment_batches
from ..data.sources import source_batches_and_cut
from ..models import EncoderDecoder
from ..models.blocks import Classifier
from ..nn import Module
from ..predict import class_names, positions_of_prompts
from ..tokens import encode_text, plain
from .arguments import UsageError
from .opening import is_language_model

__all__ = [
    "ChatFormat", "Prepared", "chat_format", "chat_segments", "check_kind", "cut_at", "find_labels", "longest_row",
    "make_batches", "message_rows", "room_for",
]

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Prepared:
    """The batches of a data file for one model.

    rows      the number of rows in the file
    note      the number of cut prompts or sources in words, or ""
    """

    batches: Batches
    rows: int
    note: str = ""


# ── the kind of a file, and the kind of a model ──────────────────────────────────────────────────────────────────────
def check_kind(rows: Rows, model: Module, *, chat: bool) -> None:
    """ValueError if the model cannot learn rows of this kind, or if --chat makes no sense for them."""
    if chat and rows.kind != "pairs":
        raise ValueError(f"--chat wants rows of prompt and response, got {rows.path} with rows of {rows.kind}")
    if rows.kind == "prompts":
        raise ValueError(f"{rows.line(0)} has a prompt and no response: there is nothing to learn")
    if isinstance(model, EncoderDecoder):
        if chat or rows.kind not in ("sources", "pairs"):
            kind = "chats" if chat else rows.kind
            raise ValueError(f"the encoder-decoder {type(model).__name__} wants rows of source and target, got "
                             f"{rows.path} with rows of {kind}")
        return
    if rows.kind == "sources":
        raise ValueError(f"the rows of {rows.path} (source and target) want an encoder-decoder, got a "
                         f"{type(model).__name__}: a causal language model reads prompt and response")
    is_masked = not isinstance(model.head, Classifier) and not is_language_model(model) and model.head is not None
    takes_text = is_language_model(model) or (is_masked and rows.kind == "text")
    if rows.kind != "labelled" and not takes_text:
        wanted = "a language model" if rows.kind == "text" else "a causal language model"
        raise ValueError(f"the rows of {rows.path} ({rows.kind}) want {wanted}, got a {type(model).__name__} with the "
                         f"head {type(model.head).__name__}")


def room_for(model: Module, max_len: int | None, default: int, option: str = "--max-len") -> int:
    """The longest row in tokens: max_len, or the default if that is None. Attached prompts take positions.

    option: the one that gives max_len, for the message. ValueError if the model has fewer positions than max_len."""
    room = model.config.positions - positions_of_prompts(model)
    if max_len is None:
        return min(default, room)
    if max_len > room:
        raise ValueError(f"{option} wants at most {room} tokens, the positions of this model, got {max_len}")
    return max_len


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def find_labels(rows: Rows) -> list[str]:
    """The names of the classes in a file, in order: whole numbers by their size, other names by the alphabet.

    ValueError for a single class. Whole numbers 0 ... n − 1 are their own class numbers."""
    names = {str(label) for _, label in rows.rows}
    if len(names) < 2:
        raise ValueError(f"{rows.path} wants labels of at least two classes, got only {', '.join(sorted(names))}")
    if all(name.isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def class_numbers(rows: Rows, model: Module) -> list[int]:
    """The class number of each row's label, for a model with a classifier.

    ValueError, naming the line, for a label that its head lacks."""
    names = [str(name) for name in class_names(model, None)]
    numbers = {name: i for i, name in enumerate(names)}
    by_number = {str(i): i for i in range(len(names))}
    known = by_number | numbers
    found = []
    for i, (_, label) in enumerate(rows.rows):
        if str(label) not in known:
            near = near_name(str(label), names)
            hint = f": did you mean {near!r}?" if near else ""
            some = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
            raise ValueError(f"{rows.line(i)}: the model's head has no class {str(label)!r}; its {len(names)} classes "
                             f"are {some}{hint}")
        found.append(known[str(label)])
    return found


# ── chats ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class ChatFormat:
    """The chat format of a model.

    template  as `chat_prompt` takes it: a tokenizer, or the name of a format
    """

    template: Any

    def text(self, messages: Messages) -> str:
        """The messages in this format."""
        return chat_prompt(list(messages), self.template, add_generation_prompt=False)

    def prompt(self, messages: Messages) -> str:
        """The messages, and the start of the assistant's turn that the model goes on with."""
        return chat_prompt(list(messages), self.template)

    @property
    def end(self) -> str:
        """The text that ends a turn."""
        return chat_end(self.template)


def chat_format(tokenizer: Tokenizer, name: str | None) -> ChatFormat:
    """The chat format of this name; for None the one that the tokenizer's files hold, ChatML if they hold none.

    UsageError, with a near name, for an unknown one."""
    if name is None:
        return ChatFormat("chatml" if getattr(tokenizer, "chat_template", None) is None else tokenizer)
    if name not in TEMPLATES:
        near = near_name(name, TEMPLATES)
        hint = f": did you mean {near}?" if near else ""
        raise UsageError(f"--template wants one of {', '.join(TEMPLATES)}, got {name!r}{hint}")
    return ChatFormat(name)


def chat_segments(messages: Messages, form: ChatFormat) -> Segments:
    """The texts of a chat in its format; the model learns to write the assistant's turns, with the mark of their end.

    White space after that mark belongs to the next turn. ValueError for a chat without an assistant turn, and for a
    format that changes earlier turns when a later one is added."""
    segments: list[tuple[str, bool]] = []
    done = ""                                            # the text of the segments so far
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = form.prompt(messages[:i])
        text = form.text(messages[:i + 1])
        if not before.startswith(done) or not text.startswith(before):
            raise ValueError("the chat format wants to keep the text of earlier turns, got one that changes it")
        response = text[len(before):].rstrip()
        segments += [(before[len(done):], False), (response, True)]
        done = before + response
    if not segments:
        raise ValueError("a chat wants an assistant turn to learn, got none")
    return segments


def message_rows(rows: Rows, *, chat: bool) -> list[list[dict[str, str]]] | None:
    """The messages of each row; None for rows that are no chats. chat: a prompt and its response are two turns."""
    if rows.kind == "chat":
        return [messages for (messages,) in rows.rows]
    if not chat:
        return None
    found = []
    for prompt, *responses in rows.rows:
        found.append([{"role": "user", "content": prompt}])
        found[-1] += [{"role": "assistant", "content": response} for response in responses]
    return found


def cut_at(text: str, mark: str) -> str:
    """The text before the first mark; all of it if there is none, or if the mark is empty."""
    return text.partition(mark)[0] if mark else text


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def make_batches(
    rows: Rows, model: Module, tokenizer: Tokenizer, batch: int, max_len: int, seed: int, *,
    chat: bool, template: str | None,
) -> Prepared:
    """The batches of a file for a model that `check_kind` has accepted. ValueError, naming the line, for a bad row.

    chat      a prompt and its response are two turns of a chat
    template  the name of the chat format; None for the model's own"""
    count = len(rows.rows)
    tokenizer = plain("the command", tokenizer)
    if rows.kind == "labelled":
        form = "gpt" if model.head.last else "bert"
        texts = [text for text, _ in rows.rows]
        examples = (texts, np.array(class_numbers(rows, model)))
        made = text_batches(examples, tokenizer, batch, max_len, seed, form=form, group_by_length=True)
        return Prepared(made, count)
    if isinstance(model, EncoderDecoder):
        return _source_batches(rows, model, tokenizer, batch, max_len, seed)
    if rows.kind == "text":
        texts = [text for (text,) in rows.rows]
        if is_language_model(model):
            return Prepared(document_batches(texts, tokenizer, batch, max_len, seed, rows.line), count)
        return Prepared(_masked_batches(rows, texts, model, tokenizer, batch, max_len, seed), count)
    segments = _segments(rows, tokenizer, chat=chat, template=template)
    made, cut = segment_batches(segments, tokenizer, batch, max_len, seed, rows.line)
    note = f"{cut} of {count} prompts are cut on the left" if cut else ""
    return Prepared(made, count, note)


def _source_batches(
    rows: Rows, model: EncoderDecoder, tokenizer: Tokenizer, batch: int, max_len: int, seed: int,
) -> Prepared:
    """Batches of sources and targets: encoder and decoder read at most max_len tokens."""
    made, cut = source_batches_and_cut(rows.rows, tokenizer, batch, max_len, max_len, seed, start=model.config.start,
                                       place=rows.line)
    return Prepared(made, len(rows.rows), f"{cut} of {len(rows.rows)} sources are cut on the right" if cut else "")


def _segments(rows: Rows, tokenizer: Tokenizer, *, chat: bool, template: str | None) -> list[Segments]:
    """The segments of each row of prompt and response, or of messages."""
    chats = message_rows(rows, chat=chat)
    if chats is None:
        return [[(prompt, False), (response, True)] for prompt, response in rows.rows]
    form = chat_format(tokenizer, template)
    segments = []
    for i, messages in enumerate(chats):
        try:
            segments.append(chat_segments(messages, form))
        except (TypeError, ValueError) as e:
            raise ValueError(f"{rows.line(i)}: {e}") from e
    return segments


def _masked_batches(
    rows: Rows, texts: list[str], model: Module, tokenizer: Tokenizer, batch: int, max_len: int, seed: int,
) -> Batches:
    """Batches of masked language modelling over all texts, one after the other."""
    tokens: list[int] = []
    for text in texts:
        tokens += encode_text("the command", tokenizer, text)
    T = min(max_len, len(tokens) + 2)                    # [CLS] and [SEP] stand around a window
    if T < 3:
        raise ValueError(f"{rows.line(0)}: a text wants at least one token, got none")
    vocab = model.embed.in_features
    return mlm_batches(tokens, T, batch, vocab=vocab, seed=seed, tokenizer=tokenizer)


def longest_row(texts: Sequence[str], tokenizer: Tokenizer) -> int:
    """The number of tokens of the longest text, with an end of text."""
    has_end = end_of_text(tokenizer) is not None
    return max(len(encode_text("the command", tokenizer, text)) for text in texts) + has_end


def first_batches(batches: Any, count: int) -> list[dict[str, np.ndarray]]:
    """The first batches of a stream, which does not advance."""
    stream = copy.copy(batches)                          # the position is of the copy, the examples are shared
    return [next(stream) for _ in range(count)]
