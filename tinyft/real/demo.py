"""The run of `make real`: the base answers, `tinyft tune` trains, the tuned model answers the same prompts.

    out/train.jsonl, out/valid.jsonl    the examples as conversations, for `tinyft tune`
    out/tune                            the folder of its run: log, checkpoint, adapter
    out/real.json, out/real.png         the report, with all answers, and the figure
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .. import checks, kernels
from ..chat import chat_end, chat_prompt
from ..cli import parser
from ..commands.opening import open_adapter, open_model
from ..commands.running import check_out
from ..compare.run import machine
from ..data import Pairs
from ..files import write_atomically
from ..nn import Module
from ..predict import predict
from . import report as reports
from .tasks import TASKS, ChatTask, chat_task, summarise

__all__ = ["Settings", "run"]

MODEL = "work/real/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = "attn.[qkvo],mlp.gate,mlp.up,mlp.down"
TRAIN, VALID, TUNE = "train.jsonl", "valid.jsonl", "tune"
FILES_OF_A_RUN = {"config.json", "log.jsonl", "curve.svg", "checkpoint.safetensors", "adapter"}
MOST_STEPS = 250
MOST_TEST = 200
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    task            one of TASKS
    model           the file or folder of an instruction-tuned language model
    packed          True: the base keeps its weights of 4 bits, False: float32
    steps, batch    updates, and examples in each of them
    test, valid     examples of the table, and of a point of the learning curve
    shots           solved examples in a few-shot prompt
    r, alpha, lr    rank and scale of LoRA on all linear maps, and the learning rate
    evaluate_every  steps between two points of the learning curve; 0: none
    seed            chooses and orders the training examples, and draws LoRA's start
    """

    task: str = "names"
    model: str = MODEL
    packed: bool = False
    steps: int = 100
    batch: int = 8
    test: int = 200
    valid: int = 32
    shots: int = 4
    r: int = 8
    alpha: float = 16.0
    lr: float = 1e-3
    evaluate_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        checks.one_of("real: task", self.task, TASKS)
        checks.instance("real: model", self.model, (str, os.PathLike), "the path of a model")
        checks.flag("real: packed", self.packed)
        checks.whole("real: steps", self.steps, 1, MOST_STEPS)
        checks.whole("real: batch", self.batch, 1)
        checks.whole("real: test", self.test, 1, MOST_TEST)
        checks.whole("real: valid", self.valid, 1)
        checks.whole("real: shots", self.shots, 0, 16)
        checks.whole("real: evaluate_every", self.evaluate_every, 0)
        checks.whole("real: seed", self.seed, 0)
        checks.number("real: lr", self.lr, above=0)


def run(s: Settings, out: str | os.PathLike, say: Say | None = None, memory: bool = True) -> dict[str, Any]:
    """Run everything, print it, and write the files into the folder `out`. Returns the report.

    say     prints a text
    memory  True: peak memory of training on dense and on packed weights is measured too, in processes of their own

    The run of an earlier call in this folder is replaced. FileNotFoundError if the model is absent; ValueError,
    TypeError or OSError, before the work starts, for other arguments that cannot be used.
    """
    checks.instance("real: s", s, Settings, "Settings")
    out = Path(checks.instance("real: out", out, (str, os.PathLike), "the path of a folder"))
    say = partial(print, flush=True) if say is None else checks.function("real: say", say, "a function of one text")
    check_model_file(s.model)
    task = chat_task(s.task, s.test, s.seed)
    write_examples(s, task, out)
    report = new_report(s, task)
    say(reports.head(report))
    start, cpu = time.perf_counter(), time.process_time()
    fill(report, s, task, out, say)
    report["seconds"]["all"] = [round(time.perf_counter() - start, 1), round(time.process_time() - cpu, 1)]
    if memory:
        report["memory"] = measure_memory(s, out, say)
    say(reports.conclusions(report))
    say(f"\nWritten: {write(report, out)}")
    return report


# ---------------------------------------------------------------------------------------------------- before the start
def check_model_file(path: str | os.PathLike) -> None:
    """FileNotFoundError, with the command that gets the file, if there is none."""
    if not Path(path).exists():
        raise FileNotFoundError(f"make real wants the model {path}, got no such file: `make real-assets` fetches it")


def write_examples(s: Settings, task: ChatTask, out: Path) -> None:
    """Write the training and the first validation examples as conversations. An earlier run's folder is removed.

    ValueError if that folder holds anything else than a run of `tinyft tune`.
    """
    folder = out / TUNE
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= FILES_OF_A_RUN:
        shutil.rmtree(folder)
    check_out(os.fspath(folder), resume=False)
    out.mkdir(parents=True, exist_ok=True)
    valid = Pairs(*(part[: s.valid] for part in task.valid))
    write_atomically({out / TRAIN: as_lines(task, task.train), out / VALID: as_lines(task, valid)})


def as_lines(task: ChatTask, pairs: Pairs) -> bytes:
    """The content of a .jsonl file with one conversation a line."""
    lines = []
    for prompt, response in zip(*pairs, strict=True):
        messages = [*task.messages(prompt), {"role": "assistant", "content": response}]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def new_report(s: Settings, task: ChatTask) -> dict[str, Any]:
    """A report without results. JSON-able.

    rows      {name: {"kind": "simple", "base" or "tuned", metric: [mean, low, high]}}, intervals of 95 %
    answers   {name of a row: the answers to the test prompts}
    curve     the log of `tinyft tune`: {"loss": one per step, "points": [[steps, validation loss], ...]}
    seconds   {part: [seconds that passed, seconds of processor time over all threads]}
    """
    return {
        "settings": asdict(s) | {"model": os.fspath(s.model)},
        "instruction": task.instruction,
        "metrics": list(task.metrics),
        "train": len(task.train.prompts),
        "prompts": list(task.test.prompts),
        "responses": list(task.test.responses),
        "rows": {},
        "answers": {},
        "curve": {},
        "seconds": {},
        "memory": [],
        "machine": machine() | {"threads": kernels.get_num_threads(), "load": round(os.getloadavg()[0], 1)},
    }


# ---------------------------------------------------------------------------------------------------- the run
def fill(report: dict, s: Settings, task: ChatTask, out: Path, say: Say) -> None:
    """Enter the rows, the answers and the learning curve. Each row is printed as soon as it is there."""

    def enter(name: str, kind: str, answers: list[str]) -> None:
        report["rows"][name] = {"kind": kind, **{m: summarise(v) for m, v in task.score(answers).items()}}
        report["answers"][name] = answers
        say(reports.line(name, report))

    def timed(part: str, f: Callable, *arguments: Any) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        result = f(*arguments)
        report["seconds"][part] = [round(time.perf_counter() - start, 1), round(time.process_time() - cpu, 1)]
        return result

    prompts = task.test.prompts
    for name, answers in timed("simple", task.baselines).items():
        enter(name, "simple", answers)
    model, tokenizer = open_base(s)
    enter("zero-shot", "base", timed("zero-shot", answer, task, prompts, model, tokenizer))
    if s.shots:
        name = f"{s.shots}-shot"
        enter(name, "base", timed(name, answer, task, prompts, model, tokenizer, s.shots))
    del model  # tinyft tune opens it again: two copies would take twice the memory
    timed("training", tune, s, out, say)
    report["curve"] = read_log(out / TUNE / "log.jsonl")
    model, tokenizer = open_base(s)
    open_adapter(model, os.fspath(out / TUNE))
    enter("LoRA", "tuned", timed("LoRA", answer, task, prompts, model, tokenizer))


def open_base(s: Settings) -> tuple[Module, Tokenizer]:
    """The base model with dense or packed weights, and its tokenizer, which knows the model's chat format."""
    check_model_file(s.model)
    return open_model(os.fspath(s.model), packed=s.packed, command="tune")


def answer(
    task: ChatTask, prompts: Sequence[str], model: Module, tokenizer: Tokenizer, shots: int = 0, batch: int = 32
) -> list[str]:
    """The model's greedy answers to N prompts, of at most task.longest tokens. shots: solved examples before each."""
    texts = [chat_prompt(task.messages(prompt, shots), tokenizer) for prompt in prompts]
    end = tokenizer.token_to_id(chat_end(tokenizer))
    answers = predict(model, tokenizer, texts, batch_size=batch, max_new_tokens=task.longest, end=end)
    return [text.strip() for text in answers]


# ---------------------------------------------------------------------------------------------------- training
def tune_arguments(s: Settings, out: Path) -> list[str]:
    """The command line of `tinyft tune`: LoRA on all linear maps of the blocks; prompts have no labels."""
    arguments = ["tune", "--model", os.fspath(s.model), "--data", os.fspath(out / TRAIN)]
    if s.evaluate_every:
        arguments += ["--test", os.fspath(out / VALID), "--evaluate-every", str(s.evaluate_every)]
    arguments += ["--method", "lora", "--set", f"r={s.r}", "--set", f"alpha={s.alpha}", "--set", f"targets={TARGETS}"]
    arguments += ["--steps", str(s.steps), "--batch", str(s.batch), "--lr", str(s.lr), "--seed", str(s.seed)]
    arguments += ["--schedule", "linear", "--warmup", "0.1", "--out", os.fspath(out / TUNE)]
    return arguments + (["--packed"] if s.packed else [])


def tune(s: Settings, out: Path, say: Say) -> None:
    """Run `tinyft tune` in this process, and print its command line first."""
    arguments = tune_arguments(s, out)
    say(f"\ntinyft {shlex.join(arguments)}")
    args = parser().parse_args(arguments)
    args.run(args)
    say("")


def read_log(path: Path) -> dict[str, list]:
    """{"loss": the loss of every step, "points": [[steps, validation loss], ...]} of a log of `tinyft tune`."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    points = [[entry["step"], entry["test_loss"]] for entry in entries if "test_loss" in entry]
    return {"loss": [entry["loss"] for entry in entries if "loss" in entry], "points": points}


def measure_memory(s: Settings, out: Path, say: Say) -> list[dict[str, Any]]:
    """Peak memory of training on dense and, for a GGUF file, on packed weights."""
    from .memory import measure

    has_packed = os.fspath(s.model).endswith(".gguf")
    found = [measure(s, out, packed=packed) for packed in ((False, True) if has_packed else (False,))]
    say(reports.memory(found))
    return found


# ---------------------------------------------------------------------------------------------------- the end
def write(report: dict, out: Path) -> str:
    """Write real.json and real.png; their names, for the last line. Without matplotlib there is no figure."""
    files = {}
    try:
        from .figure import draw

        files[out / "real.png"] = draw(report)
    except ImportError:
        pass
    files[out / "real.json"] = json.dumps(report, indent=1, allow_nan=False).encode()
    write_atomically(files)
    return ", ".join(str(path) for path in sorted([*files, out / TUNE]))


def settings_from(arguments: dict[str, Any]) -> Settings:
    """Settings from the arguments of the command line that were given."""
    known = {field.name for field in fields(Settings)}
    return Settings(**{name: value for name, value in arguments.items() if name in known and value is not None})
