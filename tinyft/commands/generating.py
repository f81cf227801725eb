"""`tinyft generate` and `tinyft chat`: text that a model writes."""
from __future__ import annotations

import argparse
import sys
import unicodedata
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..beam import GNMTPenalty, longest_reach
from ..data.files import read_rows
from ..models import EncoderDecoder
from ..nn import Module
from ..predict import positions_of_prompts, predict, search_texts
from ..tokens import encode_text, plain
from .arguments import UsageError
from .opening import as_json, is_language_model, open_adapter, open_model
from .rows import ChatFormat, chat_format, cut_at

__all__ = ["run_chat", "run_generate"]


def open_writer(args: argparse.Namespace, command: str) -> tuple[Module, Tokenizer]:
    """(model, tokenizer) of a model that writes text, with its adapter. ValueError for a model of another kind."""
    model, tokenizer = open_model(args.model, packed=args.packed, command=command)
    if args.adapter is not None:
        open_adapter(model, args.adapter)
    if not is_language_model(model):
        raise ValueError(f"{command} wants a causal language model, got a {type(model).__name__} in "
                         f"{args.model}")
    return model, plain(command, tokenizer)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `predict` for drawing tokens. UsageError for top-k or top-p without a temperature."""
    if args.temperature == 0 and (args.top_k is not None or args.top_p is not None):
        raise UsageError("--top-k and --top-p want --temperature > 0: at 0 the most probable token is written")
    options = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    return options | {"rng": np.random.default_rng(args.seed)}


def beam_options(args: argparse.Namespace) -> dict[str, Any] | None:
    """The options of `search_texts`; None without --beams. UsageError for options that want --beams or exclude it."""
    if args.beams is None:
        for option in ("length_penalty", "coverage", "n_best"):
            if getattr(args, option) is not None:
                raise UsageError(f"--{option.replace('_', '-')} wants --beams: it is an option of beam search")
        return None
    if args.temperature > 0:
        raise UsageError("--beams wants --temperature 0: beam search draws no tokens")
    lp = GNMTPenalty() if args.length_penalty is None else GNMTPenalty(args.length_penalty)
    longest_reach(lp, args.max_new_tokens)               # raises for a penalty that is out of range
    return {"beams": args.beams, "lp": lp, "coverage": args.coverage or 0.0, "n_best": args.n_best or 1}


# ── generate ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def run_generate(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status, 0."""
    if (args.prompt is None) == (args.file is None):
        raise UsageError("generate wants either --prompt or --file")
    if args.system is not None and not args.chat:
        raise UsageError("--system wants --chat: a plain prompt has no system message")
    options = sampling_options(args)
    search = beam_options(args)
    chats = read_prompts(args)
    model, tokenizer = open_writer(args, "generate")
    has_sources = isinstance(model, EncoderDecoder)
    if has_sources and any(isinstance(prompt, list) for prompt in chats):
        raise ValueError(f"the encoder-decoder {type(model).__name__} wants sources, got turns of a chat")
    mark = ""
    if any(isinstance(prompt, list) for prompt in chats):
        form = chat_format(tokenizer, args.template)
        mark = form.end
        prompts = [form.prompt(messages) for messages in chats]
    else:
        prompts = chats
    if search is None:
        written = predict(model, tokenizer, prompts, max_new_tokens=args.max_new_tokens, **options)
        searched: list[list[Any]] = [[(text, None)] for text in written]         # without a score
    else:
        end = tokenizer.token_to_id(mark) if mark else None
        search |= {} if end is None else {"end": end}    # a turn ends before the text does
        searched = search_texts(model, tokenizer, prompts, max_new_tokens=args.max_new_tokens, **search)
    found = []
    for texts in searched:
        found.append([(cut_at(text, mark), score) for text, score in texts])
    if args.json:
        print(as_json({"texts": [as_entry(prompt, texts) for prompt, texts in zip(prompts, found)]}))
        return 0
    for i, (prompt, texts) in enumerate(zip(prompts, found)):
        print("" if i == 0 else "\n", end="")
        for text, score in texts:
            whole = text if mark or has_sources else prompt + text
            print(whole if args.n_best is None else f"{score:9.4f}  {in_one_line(whole)}")
    return 0


def in_one_line(text: str) -> str:
    r"""The text with its line breaks and control characters as escapes, such as \n. Tabs stay."""
    shown = []
    for c in text:
        breaks = unicodedata.category(c) in ("Cc", "Zl", "Zp") and c != "\t"
        shown.append(c.encode("unicode_escape").decode() if breaks else c)
    return "".join(shown)


def as_entry(prompt: str, texts: list[tuple[str, float | None]]) -> dict[str, Any]:
    """The entry of one prompt in the JSON object: its best text, and those of a search with their scores."""
    entry: dict[str, Any] = {"prompt": prompt, "text": texts[0][0]}
    if texts[0][1] is not None:
        entry["n_best"] = [{"text": text, "score": score} for text, score in texts]
    return entry


def read_prompts(args: argparse.Namespace) -> list[Any]:
    """The prompts: texts, or with a chat format lists of messages up to the turn that the model writes."""
    if args.prompt is not None:
        prompts: list[Any] = [args.prompt]
    else:
        rows = read_rows(args.file, split_lines=True)
        if rows.kind == "chat":
            return [_until_last_user(messages) for (messages,) in rows.rows]
        prompts = [row[0] for row in rows.rows]
    if not args.chat:
        return prompts
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return [[*system, {"role": "user", "content": prompt}] for prompt in prompts]


def _until_last_user(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages up to the last turn of the user."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return messages[:last + 1]


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def run_chat(args: argparse.Namespace) -> int:
    """Read turns from standard input and print the answers. Returns the exit status, 0, at the end of the input."""
    options = sampling_options(args)
    model, tokenizer = open_writer(args, "chat")
    form = chat_format(tokenizer, args.template)
    mark = form.end
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    room = model.config.positions - positions_of_prompts(model) - args.max_new_tokens
    while True:
        line = read_turn()
        if line is None or line.strip() in ("/quit", "/exit"):
            return 0
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        messages = forget_oldest(messages, form, tokenizer, room)
        prompt = form.prompt(messages)
        (text,) = predict(model, tokenizer, [prompt], max_new_tokens=args.max_new_tokens, **options)
        answer = cut_at(text, mark).strip()
        print(answer, flush=True)
        messages.append({"role": "assistant", "content": answer})


def read_turn() -> str | None:
    """The next line of standard input; None at its end. A terminal shows a prompt."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as e:
        raise ValueError(f"chat wants turns in UTF-8, got other bytes ({e.reason})") from e
    return line if line else None


def forget_oldest(
    messages: list[dict[str, str]], form: ChatFormat, tokenizer: Tokenizer, room: int,
) -> list[dict[str, str]]:
    """The messages without the oldest turns that no longer fit into `room` tokens; the system message stays.

    ValueError if the last turn alone does not fit."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system):]
    while True:
        length = len(encode_text("chat", tokenizer, form.prompt([*system, *turns])))
        if length <= room:
            return [*system, *turns]
        if len(turns) <= 2:
            raise ValueError(f"this turn has {length:,} tokens with its chat format, and the model has room for "
                             f"{max(room, 0):,} beside the new ones: --max-new-tokens makes more room")
        print("(the oldest turn is forgotten: the context is full)", file=sys.stderr)
        turns = turns[2:]
