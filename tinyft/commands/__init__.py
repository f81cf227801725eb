"""The commands that work on a user's own models and files: tune, eval, generate, chat, merge, embed, convert, compress,
distill, memory.

    arguments.py    the parser, and the values of options          settings.py   --method and --set
    opening.py      models, adapters, and the folder of results    rows.py       the rows of a data file as batches
    running.py      the folder of a run: config, log, curve        plan.py       memory and time of a run, measured
    layers.py       the folder of a compression            rule_plan.py, calibration.py       its plan and its data
    shipped.py      the rows of a file or a shipped text           training.py   the training of tune and distill
    students.py     the students of a teacher                      objectives.py the losses of distill
    tune.py  evaluating.py  generating.py  converting.py  compressing.py  distilling.py  accounting.py
                                                                   the commands themselves

Nothing heavy is imported until a command runs.
"""
from __future__ import annotations

import argparse

from .arguments import number, whole

__all__ = ["register"]

MODEL = "a shipped base (base-gpt), a Hugging Face style directory, or a .gguf file"
ADAPTER = "a folder with an adapter of tinyft or PEFT, or the folder of a run of tinyft tune"
DATA = (".txt (a text), .jsonl or .csv with the columns text; text and label; prompt and response; source and target; "
        "or messages, [{role, content}, ...]")
SHIPPED = "or a text that ships: names, intact, package, prose, source"
STUDENT = ("layers=2 (two of the teacher's layers), new,layers=2,width=64 (other sizes, random values), dense (of a "
           "Switch teacher), a config.json, or the directory of a model")


def register(commands: argparse._SubParsersAction) -> None:
    """Add the commands to the subparsers of `tinyft`. Each calls the function of its name with the arguments."""
    _add_tune(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_merge(commands)
    _add_embed(commands)
    _add_convert(commands)
    _add_compress(commands)
    _add_distill(commands)
    _add_memory(commands)


def _command(commands: argparse._SubParsersAction, name: str, text: str, example: str) -> argparse.ArgumentParser:
    """The parser of one command, with a line of help and an example."""
    return commands.add_parser(
        name, help=text, description=text, epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_model(c: argparse.ArgumentParser, adapter: str | None = ADAPTER) -> None:
    """The options of a model, and of an adapter if `adapter` is its help."""
    c.add_argument("--model", required=True, metavar="MODEL", help=MODEL)
    c.add_argument("--packed", action="store_true", help="keep the 4-bit or 8-bit weights of a .gguf file as they are")
    if adapter:
        c.add_argument("--adapter", metavar="DIR", help=adapter)


def _add_template(c: argparse.ArgumentParser) -> None:
    """The option of a chat format."""
    c.add_argument("--template", metavar="NAME", help="chat format: chatml, smollm2, qwen2, llama3 ... "
                   "(default: the model's own, or chatml)")


# ── training and evaluation ──────────────────────────────────────────────────────────────────────────────────────────
def _add_tune(commands: argparse._SubParsersAction) -> None:
    c = _command(
        commands, "tune", "fine-tune a model on your data with any method",
        "tinyft tune --model base-gpt --data train.jsonl --test test.jsonl --method lora --set r=8 "
        "--set 'targets=attn.[qv]' --steps 200 --lr 1e-3 --out work/run",
    )
    # No defaults here: with --resume, an option that is not given is that of the run (tune.py holds the defaults).
    c.add_argument("--model", metavar="MODEL", help=MODEL)
    c.add_argument("--packed", action="store_true", default=None,
                   help="train on the 4-bit or 8-bit weights of a .gguf file, which stay as they are")
    c.add_argument("--method", metavar="METHOD", help="a method of `tinyft methods` (default: lora)")
    c.add_argument("--set", metavar="FIELD=VALUE", action="append",
                   help="a hyper-parameter of the method, such as r=8 or targets=attn.q,attn.v; may be repeated")
    _add_training(c)
    c.set_defaults(run=_tune)


def _add_training(c: argparse.ArgumentParser) -> None:
    """The options of a training, its data and its folder. Their defaults are in training.py."""
    c.add_argument("--data", metavar="DATA", help=f"{DATA}; {SHIPPED}")
    c.add_argument("--test", metavar="DATA", help="held-out data of the same kind, evaluated during the training "
                   "(default: of a text that ships, its held-out part)")
    c.add_argument("--out", metavar="DIR", required=True, help="a new folder for the run; with --resume: its folder")
    c.add_argument("--resume", action="store_true", help="go on with the run in --out; other options may be left out")
    c.add_argument("--steps", type=whole(1), help="updates (default: 200)")
    c.add_argument("--lr", type=number(above=0), help="learning rate (default: 1e-3)")
    c.add_argument("--batch", type=whole(1), help="rows in a batch (default: 16)")
    c.add_argument("--accumulate", type=whole(1), help="batches in an update (default: 1)")
    c.add_argument("--max-len", type=whole(2), help="tokens of a row (default: 256, or the model's positions)")
    c.add_argument("--seed", type=whole(0), help="of the order of the rows, dropout and initial values (default: 0)")
    c.add_argument("--schedule", choices=("constant", "linear", "cosine"), help="of the learning rate "
                   "(default: cosine)")
    c.add_argument("--warmup", type=number(0), help="steps of warm-up; below 1: a share of the steps (default: 0.05)")
    c.add_argument("--weight-decay", type=number(0), help="of AdamW (default: 0)")
    c.add_argument("--clip", type=number(above=0), help="largest norm of the gradients (default: 1)")
    c.add_argument("--autocast", choices=("bfloat16", "float16"), help="matrix products in 16 bits")
    c.add_argument("--recompute", action="store_true", default=None,
                   help="less memory for a third more time: activations are computed again in the backward pass")
    c.add_argument("--chat", action="store_true", default=None,
                   help="prompts and responses are turns of a chat: the model's chat format is put around them")
    _add_template(c)
    c.add_argument("--evaluate-every", type=whole(1), help="steps between evaluations (default: a fifth of the steps)")
    c.add_argument("--save-every", type=whole(1), help="steps between checkpoints (default: 50)")
    c.add_argument("--json", action="store_true", help="print one JSON object at the end, and nothing else, on stdout")


def _add_eval(commands: argparse._SubParsersAction) -> None:
    c = _command(
        commands, "eval", "loss, perplexity, accuracy or exact match of a model on your data",
        "tinyft eval --model base-gpt --adapter work/run --data test.jsonl",
    )
    _add_model(c)
    c.add_argument("--data", metavar="DATA", required=True, help=f"{DATA}; {SHIPPED}")
    c.add_argument("--batch", type=whole(1), default=16, help="rows in a batch (default: 16)")
    c.add_argument("--max-len", type=whole(2), help="tokens of a row (default: the model's positions, at most 1024)")
    c.add_argument("--chat", action="store_true", help="prompts and responses are turns of a chat")
    _add_template(c)
    c.add_argument("--generate", action="store_true",
                   help="write a response to each prompt; report the exact matches, and token F1 of targets and names")
    c.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    c.set_defaults(run=_eval)


# ── writing text ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _add_sampling(c: argparse.ArgumentParser, new_tokens: int) -> None:
    """The options of generation."""
    c.add_argument("--max-new-tokens", type=whole(1), default=new_tokens, help=f"(default: {new_tokens})")
    c.add_argument("--temperature", type=number(0), default=0.0, help="0 writes the most probable token (default)")
    c.add_argument("--top-k", type=whole(1), help="draw from the k most probable tokens")
    c.add_argument("--top-p", type=number(above=0, high=1), help="draw from the smallest set with this probability")
    c.add_argument("--seed", type=whole(0), default=0, help="of the draws (default: 0)")


def _add_generate(commands: argparse._SubParsersAction) -> None:
    c = _command(
        commands, "generate", "continue a prompt, or every prompt of a file",
        "tinyft generate --model base-gpt --prompt 'Return the' --max-new-tokens 30 --temperature 0.8",
    )
    _add_model(c)
    c.add_argument("--prompt", help="the text to continue")
    c.add_argument("--file", metavar="FILE", help="prompts: .txt, one a line; .jsonl or .csv with the column prompt, "
                   "text or messages")
    c.add_argument("--chat", action="store_true", help="a prompt is a user's turn in the chat format of the model")
    c.add_argument("--system", help="the system message; with --chat")
    _add_template(c)
    _add_sampling(c, 40)
    c.add_argument("--beams", type=whole(1), metavar="N", help="beam search with N live texts, in the place of the "
                   "most probable token")
    c.add_argument("--length-penalty", type=number(), metavar="X", help="a score is log P / ((5 + tokens) / 6)^X: "
                   "larger ones favour longer texts, 0 compares log P (default: 0.6)")
    c.add_argument("--coverage", type=number(0), metavar="X", help="lower the score of a target that leaves parts of "
                   "its source without attention, X times the log of their attention (default: 0)")
    c.add_argument("--n-best", type=whole(1), metavar="K", help="the K best texts of the search, with their scores")
    c.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    c.set_defaults(run=_generate)


def _add_chat(commands: argparse._SubParsersAction) -> None:
    c = _command(
        commands, "chat", "talk with a model, a turn a line; the end of the input, or /quit, ends it",
        "tinyft chat --model model.gguf --system 'Answer in one sentence.'",
    )
    _add_model(c)
    c.add_argument("--system", help="the system message")
    _add_template(c)
    _add_sampling(c, 200)
    c.set_defaults(run=_chat)


# ── files in, files out ──────────────────────────────────────────────────────────────────────────────────────────────
def _add_merge(commands: argparse._SubParsersAction) -> None:
    c = _command(
        commands, "merge", "write a base with its adapter worked in, as a directory that transformers reads",
        "tinyft merge --model base-gpt --adapter work/run --out work/merged",
    )
    c.add_argument("--model", required=True, metavar="MODEL", help=MODEL)
    c.add_argument("--adapter", required=True, metavar="DIR", help=ADAPTER)
    _add_directory(c)
    c.set_defaults(run=_merge)


def _add_directory(c: argparse.ArgumentParser) -> None:
    """The options of a command that writes a model's directory."""
    c.add_argument("--out", metavar="DIR", required=True, help="a new folder for the model")
    c.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
                   help="of the parameters in the file (default: float32)")
    c.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _add_embed(commands: argparse._SubParsersAction) -> None:
    c = _command(
        commands, "embed", "one vector for each text of a file",
        "tinyft embed --model path/to/all-MiniLM-L6-v2 --texts texts.txt --out vectors.npy",
    )
    _add_model(c, adapter=None)
    c.add_argument("--texts", metavar="FILE", required=True, help=".txt, a text a line; .jsonl or .csv with text")
    c.add_argument("--out", metavar="FILE", required=True, help=".npy, an array (texts, width); or .jsonl")
    c.add_argument("--batch", type=whole(1), default=32, help="texts in a batch (default: 32)")
    c.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    c.set_defaults(run=_embed)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    c = _command(
        commands, "convert", "write a model as a directory that transformers reads, or an adapter as one for PEFT",
        "tinyft convert --model model.gguf --out work/model --dtype float16",
    )
    c.add_argument("--model", required=True, metavar="MODEL", help=MODEL)
    c.add_argument("--adapter", metavar="DIR", help="write this adapter alone, as a folder that PEFT reads (a "
                   "bottleneck adapter: AdapterHub); the model is its base")
    _add_directory(c)
    c.set_defaults(run=_convert)


def _add_compress(commands: argparse._SubParsersAction) -> None:
    c = _command(
        commands, "compress", "write a model with 1 to 8 bits a weight, which all other commands open",
        "tinyft compress --model base-gpt --method gptq --bits 4 --group 64 --out work/small",
    )
    # No defaults here: with --resume, an option that is not given is that of the run (compressing.py holds them).
    c.add_argument("--model", metavar="MODEL", help=MODEL)
    c.add_argument("--method", metavar="RULE", help="rtn, gptq, awq, nf4 ... (default: gptq); rtn and nf4 need no data")
    c.add_argument("--bits", type=whole(1), help="bits of a weight, 1 to 8 (default: the rule's, 4)")
    c.add_argument("--group", metavar="N", help="neighbours in a row that share a scale; none: the whole row "
                   "(default: the rule's, 64)")
    c.add_argument("--set", metavar="FIELD=VALUE", action="append",
                   help="another setting of the rule, such as grid=symmetric or act_order=true; may be repeated")
    c.add_argument("--targets", metavar="GLOB", action="append",
                   help="modules whose weights are compressed, such as mlp.up; may be repeated (default: every linear "
                   "map inside the blocks)")
    c.add_argument("--data", metavar="FILE", help=f"calibration data: {DATA} (default: text that ships with "
                   "tinyft). An encoder-decoder wants sources and targets")
    c.add_argument("--sequences", type=whole(1), help="calibration sequences, or pairs (default: 32)")
    c.add_argument("--length", type=whole(1), help="tokens of a sequence, at most those of a source or a target "
                   "(default: 512, or the model's positions)")
    c.add_argument("--seed", type=whole(0), help="of the choice of the sequences (default: 0)")
    c.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                   help="of the parameters that stay dense, in the file (default: float32)")
    c.add_argument("--out", metavar="DIR", required=True, help="a new folder; with --resume: that of a run")
    c.add_argument("--resume", action="store_true", help="go on with the run in --out; other options may be left out")
    c.add_argument("--json", action="store_true", help="print one JSON object at the end, and nothing else, on stdout")
    c.set_defaults(run=_compress)


def _add_distill(commands: argparse._SubParsersAction) -> None:
    c = _command(
        commands, "distill", "train a small model, the student, on the outputs of a larger one, its teacher",
        "tinyft distill --teacher base-bert --student layers=2 --loss distilbert --data prose --steps 500 "
        "--out work/student",
    )
    # No defaults here: with --resume, an option that is not given is that of the run (distilling.py holds them).
    c.add_argument("--teacher", metavar="MODEL", help=f"{MODEL}. It does not train")
    c.add_argument("--student", metavar="STUDENT", help=STUDENT)
    c.add_argument("--layers-from", metavar="MAP", help="the teacher's layers that --student layers=N copies: spread "
                   "(evenly from the first to the last; default), every_other, or their numbers, such as 0,2,5")
    c.add_argument("--loss", metavar="LOSS", help="hinton (default), word-level, distilbert, tinybert (layer by "
                   "layer), sequence-level (the teacher's best texts are the targets), interpolation (of its best "
                   "texts, those most like the targets); none: the labels alone, for comparison")
    c.add_argument("--set", metavar="FIELD=VALUE", action="append",
                   help="a setting of the loss, such as temperature=4, soft=0.7, alpha=0.5 or beams=5; may be repeated")
    c.add_argument("--cache", metavar="DIR", help="keep the teacher's outputs in this folder: the teacher runs once "
                   "for each row, also for other students")
    c.add_argument("--logits", type=whole(1), help="largest logits of a position that --cache keeps (default: 64)")
    _add_training(c)
    c.set_defaults(run=_distill)


# ── costs ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _add_memory(commands: argparse._SubParsersAction) -> None:
    c = _command(
        commands, "memory", "the memory and the operations of a fine-tuning, without running it",
        "tinyft memory --model base-gpt --method lora --batch 4 --length 128 --budget 8GB",
    )
    c.add_argument("--model", metavar="MODEL", help=MODEL)
    c.add_argument("--packed", action="store_true", help="keep the 4-bit or 8-bit weights of a .gguf file as they are")
    c.add_argument("--config", metavar="NAME", help="in place of a model, the sizes of a known one without weights: "
                   "gpt2, gpt3, bert-large, llama-7b, t5-base ...")
    c.add_argument("--method", metavar="METHOD", help="a method of `tinyft methods` (default: everything trains)")
    c.add_argument("--set", metavar="FIELD=VALUE", action="append", default=[],
                   help="a hyper-parameter of the method, such as r=8; may be repeated")
    c.add_argument("--batch", type=whole(1), default=1, help="rows in a batch (default: 1)")
    c.add_argument("--length", type=whole(1), default=128, help="tokens of a row (default: 128)")
    c.add_argument("--source-length", type=whole(1), metavar="N", help="tokens of a source, for an encoder-decoder "
                   "(default: as many as --length)")
    c.add_argument("--weights", metavar="KIND", help="float32, float16, bfloat16, or for the maps of the blocks "
                   "nf4, nf4-double, int8, q4_0, q4_1, q8_0")
    c.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="(default: adamw)")
    c.add_argument("--autocast", choices=("bfloat16", "float16"), help="matrix products in 16 bits")
    c.add_argument("--accumulate", type=whole(1), default=1, help="batches in an update (default: 1)")
    c.add_argument("--recompute", action="store_true", help="compute the activations of a block again in backward")
    c.add_argument("--budget", metavar="BYTES", help="also find the largest batch for this memory, such as 8GB or 8GiB")
    c.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    c.set_defaults(run=_memory)


# ── the commands: each imports its module when it runs ───────────────────────────────────────────────────────────────
def _tune(args: argparse.Namespace) -> int:
    from .tune import run
    return run(args)


def _eval(args: argparse.Namespace) -> int:
    from .evaluating import run
    return run(args)


def _generate(args: argparse.Namespace) -> int:
    from .generating import run_generate
    return run_generate(args)


def _chat(args: argparse.Namespace) -> int:
    from .generating import run_chat
    return run_chat(args)


def _merge(args: argparse.Namespace) -> int:
    from .converting import run_merge
    return run_merge(args)


def _embed(args: argparse.Namespace) -> int:
    from .converting import run_embed
    return run_embed(args)


def _convert(args: argparse.Namespace) -> int:
    from .converting import run_convert
    return run_convert(args)


def _compress(args: argparse.Namespace) -> int:
    from .compressing import run
    return run(args)


def _distill(args: argparse.Namespace) -> int:
    from .distilling import run
    return run(args)


def _memory(args: argparse.Namespace) -> int:
    from .accounting import run
    return run(args)
