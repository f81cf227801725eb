"""`tinyft eval`: loss, perplexity, accuracy, and with --generate the scores of written texts, on a data file."""
from __future__ import annotations

import argparse
from typing import Any

from tokenizers import Tokenizer

from .. import checks
from ..data.files import Rows
from ..models import EncoderDecoder
from ..models.blocks import Classifier
from ..nn import Module
from ..predict import positions_of_prompts, predict
from ..tokens import encode_text, plain
from ..train import evaluate
from .arguments import UsageError
from .opening import as_json, open_adapter, open_model
from .rows import chat_format, chat_segments, check_kind, cut_at, longest_row, make_batches, message_rows, room_for
from .scores import score_texts
from .shipped import read_data

__all__ = ["run"]

LONGEST_ROW = 1024                                       # tokens, unless --max-len says more
SHOWN = 3                                                # responses in the printed result


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns the exit status, 0."""
    rows = read_data(args.data, "test")
    if args.generate and rows.kind not in ("pairs", "sources", "chat"):
        raise UsageError(f"--generate wants rows of prompt and response, of source and target or of messages, got "
                         f"{rows.path} with {rows.kind}")
    model, tokenizer = open_model(args.model, packed=args.packed, command="eval")
    if args.adapter is not None:
        open_adapter(model, args.adapter)
    if rows.kind == "labelled" and not isinstance(model.head, Classifier):
        raise ValueError(f"{rows.path} has labels, and this model has no classifier: --adapter DIR names the folder of "
                         "an adapter that was trained on labels")
    check_kind(rows, model, chat=args.chat)
    max_len = room_for(model, args.max_len, LONGEST_ROW)
    made = make_batches(rows, model, tokenizer, args.batch, max_len, 0, chat=args.chat, template=args.template)
    result: dict[str, Any] = {"rows": made.rows, **evaluate(model, made.batches)}
    samples: list[dict[str, str]] = []
    if args.generate:
        samples = generate_responses(rows, model, tokenizer, args.batch, chat=args.chat, template=args.template)
        wanted = [sample["response"] for sample in samples]
        written = [sample["written"] for sample in samples]
        result |= score_texts(rows, wanted, written)
    if args.json:
        print(as_json(result | ({"samples": samples} if samples else {})))
        return 0
    for name, value in result.items():
        print(f"{name:<12} {value:,.4f}" if isinstance(value, float) else f"{name:<12} {value:,}")
    for sample in samples[:SHOWN]:
        print(f"\nprompt     {checks.brief(sample['prompt'])}\nwanted     {checks.brief(sample['response'])}\n"
              f"written    {checks.brief(sample['written'])}")
    return 0


def generate_responses(
    rows: Rows, model: Module, tokenizer: Tokenizer, batch: int, *, chat: bool, template: str | None,
) -> list[dict[str, str]]:
    """For each row its prompt, its last response, and the response that the model writes greedily.

    ValueError, naming the line, for a prompt that leaves no room for its response."""
    tokenizer = plain("eval", tokenizer)
    prompts, responses, mark = split_rows(rows, tokenizer, chat=chat, template=template)
    longest = longest_row(responses, tokenizer)
    if not isinstance(model, EncoderDecoder):
        check_room(rows, prompts, model, tokenizer, longest)
    written = predict(model, tokenizer, prompts, batch_size=batch, max_new_tokens=longest)
    found = []
    for prompt, response, text in zip(prompts, responses, written, strict=True):
        found.append({"prompt": prompt, "response": cut_at(response, mark), "written": cut_at(text, mark)})
    return found


def check_room(rows: Rows, prompts: list[str], model: Module, tokenizer: Tokenizer, longest: int) -> None:
    """ValueError, naming the line, for a prompt that leaves no room for `longest` new tokens."""
    room = model.config.positions - positions_of_prompts(model) - longest
    for i, prompt in enumerate(prompts):
        length = len(encode_text("eval", tokenizer, prompt))
        if length > room:
            raise ValueError(f"{rows.line(i)}: the prompt has {length:,} tokens; at most {max(room, 0):,} leave room "
                             f"for {longest:,} new ones")


def split_rows(
    rows: Rows, tokenizer: Tokenizer, *, chat: bool, template: str | None,
) -> tuple[list[str], list[str], str]:
    """(prompts, responses, mark): for each row the text before its last response, and that response.

    mark: the end of an assistant's turn in the chat format, which the responses of chats hold; "" for other rows."""
    chats = message_rows(rows, chat=chat)
    if chats is None:
        return [prompt for prompt, _ in rows.rows], [response for _, response in rows.rows], ""
    form = chat_format(tokenizer, template)
    mark = form.end
    prompts = []
    responses = []
    for messages in chats:
        segments = chat_segments(messages, form)
        prompts.append("".join(text for text, _ in segments[:-1]))
        responses.append(segments[-1][0])
    return prompts, responses, mark


