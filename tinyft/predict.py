"""Predictions for texts: the class of each, or the text that a language model continues it with.

    labels, probabilities = predict(model, tokenizer, ["a text", "another"])          a classifier
    continuations = predict(model, tokenizer, ["Once upon"], max_new_tokens=10)       a language model
    targets = predict(model, tokenizer, ["ein Haus"], max_new_tokens=10)              an encoder-decoder
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from . import array, checks
from .beam import beam_search
from .data import encode, pad
from .data.rows import end_of_text
from .data.sources import encode_source
from .decode import generate, pad_left, refuse_unknown
from .keywords import checked_keywords
from .models import EncoderDecoder
from .models.attention import Attention
from .models.blocks import Classifier
from .nn import Context, Module, evaluation_mode
from .tokens import encode_text, plain, special_ids

__all__ = ["Predictions", "ScoredText", "predict", "search_texts"]


@checked_keywords
class Predictions(NamedTuple):
    """The classes of N texts.

    labels         N class names, or class ids where there are no names
    probabilities  (N, classes), each row sums to 1"""

    labels: list
    probabilities: np.ndarray


class ScoredText(NamedTuple):
    """A text that a model wrote.

    score  of beam search: log P(text | prompt or source) / lp(the number of its tokens) + cp. The coverage penalty
           cp ≤ 0 is 0 unless `coverage` is given"""

    text: str
    score: float


def predict(
    model: Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 32,
    max_len: int | None = None,
    max_new_tokens: int = 20,
    **options: Any,
) -> Predictions | list[str]:
    """The predictions for a list of texts, in its order.

    A classifier (tinyft.classifier, or a loaded one) gives Predictions: labels, probabilities. A causal language model
    gives a list of texts: for each, the text that it writes after it. An encoder-decoder gives the target that it
    writes for each source. Texts of similar length share a batch. Each text gets the result that it gets alone, unless
    tokens are drawn at random: one generator serves the whole batch. Dropout is inactive; the mode of every module
    stays as it was.

    names           the class names, in the order of the classes; else those that the model's directory gave. Without
                    names, labels are class ids
    batch_size      texts in one batch
    max_len         tokens of a text that a classifier reads, special tokens included; longer texts are cut. None: as
                    many as the model has positions for
    max_new_tokens  tokens that a language model writes at most; it ends a text earlier with <|endoftext|>, or with the
                    end of text that its tokenizer has
    options         of `generate`, such as temperature=0.8, rng=numpy.random.default_rng(0)

    TypeError for a model that gives neither classes nor text, and for arguments of another kind. ValueError for texts
    that are too long to be continued, for an empty source, and for names of another number than the classes."""
    refuse_unknown(options, predict, generate)
    _check_arguments(model, texts, batch_size, max_new_tokens)
    tokenizer = plain("predict", tokenizer)              # without the padding and truncation that its file may ask for
    classifies = isinstance(getattr(model, "head", None), Classifier)
    if classifies and options:
        raise TypeError(f"predict: {min(options)} is an option of language models, and this model is a classifier")
    if not classifies and names is not None:
        raise TypeError("predict: names are the names of classes, and this model is a language model")
    if not classifies and max_len is not None:
        raise TypeError("predict: max_len cuts the texts of a classifier, and this model is a language model")
    with evaluation_mode(model):
        if not classifies:
            return _write(model, tokenizer, texts, batch_size, max_new_tokens, options)
        names = class_names(model, names)
        room = model.config.positions - positions_of_prompts(model)
        if max_len is not None:
            room = min(room, checks.whole("predict: max_len", max_len, least=1))
        return _classify(model, tokenizer, texts, names, batch_size, room)


def _check_arguments(model: Any, texts: Any, batch_size: Any, max_new_tokens: Any) -> None:
    """TypeError or ValueError for arguments of `predict` of another kind or value."""
    checks.instance("predict", model, Module, "a model, a Module, as its first argument")
    checks.instance("predict", texts, (list, tuple), "a list of texts")
    for text in texts:
        checks.instance("predict", text, str, "a list of texts")
    checks.whole("predict: batch_size", batch_size, least=1)
    checks.whole("predict: max_new_tokens", max_new_tokens, least=1)
    head = getattr(model, "head", None)
    is_causal = any(isinstance(m, Attention) and m.causal for m in model.modules())
    if not isinstance(head, Classifier) and (head is None or not is_causal):
        raise TypeError(f"predict wants a classifier or a causal language model, got a {type(model).__name__} that "
                        "gives neither classes nor text: tinyft.classifier(model, classes) makes a classifier")


def positions_of_prompts(model: Module) -> int:
    """The number of positions that attached methods take before the text: the rows of a soft prompt, a shift."""
    ids = np.zeros((1, 1), np.int64)
    if isinstance(model, EncoderDecoder):                # its prompts stand before the source
        ctx = model.encode(ids)
    else:
        ctx = Context()
        model(ids, ctx)
    return ctx.ids.shape[1] - 1 + ctx.position_shift


def class_names(model: Module, names: Sequence[str] | None) -> list:
    """One name for each class: those given, else those of the model's directory, else the class ids.

    ValueError if there are not as many names as classes."""
    classes = model.head.out_features
    if names is None:
        stored = getattr(model, "_kept_config", {}).get("id2label") or {}       # {"0": "negative", "1": "positive"}
        by_id = {int(key): name for key, name in stored.items()}
        is_default = all(name == f"LABEL_{i}" for i, name in by_id.items())
        is_complete = sorted(by_id) == list(range(classes))
        return [by_id[i] for i in range(classes)] if is_complete and not is_default else list(range(classes))
    checks.instance("predict: names", names, (list, tuple), "a list of class names")
    if len(names) != classes:
        raise ValueError(f"predict wants one name for each of the {classes} classes, got {len(names)} names")
    return list(names)


def batches_by_length(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The indices of the rows in batches, from the shortest rows to the longest."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]


def _classify(
    model: Module, tokenizer: Tokenizer, texts: Sequence[str], names: list, batch_size: int, max_len: int,
) -> Predictions:
    """The class of each text, read as in training: [CLS] text [SEP], or text <|endoftext|> for a GPT."""
    form = "gpt" if model.head.last else "bert"
    rows = [encode(tokenizer, text, max_len, form) for text in texts]
    probabilities = np.zeros((len(texts), len(names)))
    for chosen in batches_by_length(rows, batch_size):
        ids, mask = pad([rows[i] for i in chosen], max_len)
        logits = array.asnumpy(model(ids, mask=mask).data).astype(np.float64)      # (B, classes)
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities[chosen] = e / e.sum(axis=1, keepdims=True)
    labels = [names[i] for i in probabilities.argmax(axis=1)]
    return Predictions(labels, probabilities)


def _write(
    model: Module, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int, max_new_tokens: int,
    options: dict[str, Any],
) -> list[str]:
    """The text that the model writes after each prompt, or for each source. options: of `generate`."""
    end, batches = _read_prompts(model, tokenizer, texts, batch_size, max_new_tokens)
    options = {"end": end, **options}                    # the caller's `end` wins
    written = [""] * len(texts)
    for chosen, ids, facts in batches:
        out = generate(model, ids, max_new_tokens, **facts, **options)
        start = 1 if ids is None else ids.shape[1]       # after the start token, or after the prompt
        for i, new in zip(chosen, out[:, start:].tolist(), strict=True):
            written[i] = decode_until(tokenizer, new, options["end"])
    return written


def search_texts(
    model: Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 20,
    **options: Any,
) -> list[list[ScoredText]]:
    """The n_best continuations of each text by beam search, or targets of each source: best first, with their scores.

    options         of `beam_search`, such as beams=4, n_best=2, lp=GNMTPenalty(1.0)
    the others      as in `predict`

    TypeError and ValueError as in `predict` and in `beam_search`; TypeError for a classifier."""
    refuse_unknown(options, search_texts, beam_search)
    _check_arguments(model, texts, batch_size, max_new_tokens)
    if isinstance(model.head, Classifier):
        raise TypeError("beam search wants a language model, got a classifier")
    tokenizer = plain("search_texts", tokenizer)
    found: list[list[ScoredText]] = [[] for _ in texts]
    with evaluation_mode(model):
        end, batches = _read_prompts(model, tokenizer, texts, batch_size, max_new_tokens)
        options = {"end": end, **options}
        for chosen, ids, facts in batches:
            for i, hypotheses in zip(chosen, beam_search(model, ids, max_new_tokens, **facts, **options), strict=True):
                for h in hypotheses:
                    text = decode_until(tokenizer, list(h.tokens), options["end"])
                    found[i].append(ScoredText(text, h.score))
    return found


def _read_prompts(
    model: Module, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int, max_new_tokens: int,
) -> tuple[int | None, list[tuple[list[int], Any, dict[str, Any]]]]:
    """(the token that ends a text, batches). A batch: the indices of its texts, then ids and facts for `generate`.

    ValueError for prompts that are too long to be continued, and for an empty source."""
    batches: list[tuple[list[int], Any, dict[str, Any]]] = []
    if isinstance(model, EncoderDecoder):
        [end] = special_ids("predict", tokenizer, "eos")                         # ends sources and targets
        rows = [encode_source(tokenizer, text, end) for text in texts]
        for chosen in batches_by_length(rows, batch_size):
            ids, mask = pad([rows[i] for i in chosen], multiple=1)
            batches.append((chosen, None, {"source_ids": ids, "source_mask": mask}))
        return end, batches
    end = end_of_text(tokenizer)                         # ends a text, and stands before an empty one
    rows = []
    for text in texts:
        ids = encode_text("predict", tokenizer, text)
        if not ids and end is None:
            raise ValueError("predict cannot continue an empty text: the tokenizer has no end of text to begin with")
        rows.append(ids or [end])
    room = model.config.positions - positions_of_prompts(model)
    longest = max((len(row) for row in rows), default=0)
    if longest + max_new_tokens > room:
        raise ValueError(f"predict wants texts of at most {room - max_new_tokens} tokens, since {max_new_tokens} new "
                         f"ones follow and the model has {room} positions; got one of {longest}")
    for chosen in batches_by_length(rows, batch_size):
        ids, mask = pad_left([rows[i] for i in chosen])
        batches.append((chosen, ids, {"mask": None if mask.all() else mask}))
    return end, batches


def decode_until(tokenizer: Tokenizer, tokens: list[int], end: int | None) -> str:
    """The text of the tokens before the first `end`; of all of them if there is none."""
    return tokenizer.decode(tokens[:tokens.index(end)] if end in tokens else tokens)
