"""The run of `make real`: the base answers, LoRA trains, the tuned model answers the same prompts.

Everything is checked before the work starts. The report is written to out/real.json, the figure to out/real.png, the
adapter to out/adapter.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .. import checks, data, edit, kernels
from ..adapters import save_adapter
from ..chat import chat_end, chat_prompt
from ..compare.run import machine
from ..data import Batches, Pairs
from ..files import write_atomically
from ..formats.huggingface import load
from ..methods import LoRA
from ..nn import Module
from ..optim import AdamW, linear_schedule
from ..predict import predict
from ..train import History, evaluate, fit
from . import report as reports
from .tasks import TASKS, ChatTask, chat_task, summarise

__all__ = ["Settings", "run"]

MODEL = "work/real/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ("attn.[qkvo]", "mlp.gate", "mlp.up", "mlp.down")
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
    batch: int = 16
    test: int = 200
    valid: int = 32
    shots: int = 4
    r: int = 8
    alpha: float = 16.0
    lr: float = 1e-3
    evaluate_every: int = 50
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
    """Run everything, print it, and write out/real.json, out/real.png and out/adapter. Returns the report.

    say     prints a text
    memory  True: peak memory of training on dense and on packed weights is measured too, in processes of their own

    FileNotFoundError if the model's file is absent; ValueError, TypeError or OSError, before the work starts, for
    other arguments that cannot be used.
    """
    checks.instance("real: s", s, Settings, "Settings")
    out = Path(checks.instance("real: out", out, (str, os.PathLike), "the path of a folder"))
    say = partial(print, flush=True) if say is None else checks.function("real: say", say, "a function of one text")
    check_model_file(s.model)
    out.mkdir(parents=True, exist_ok=True)
    start, cpu = time.perf_counter(), time.process_time()
    model, tokenizer = open_model(s)
    task, batches, valid_batches = prepare(s, model, tokenizer)
    report = new_report(s, task)
    say(reports.head(report))
    fill(report, s, model, tokenizer, task, batches, valid_batches, say)
    save_adapter(model, out / "adapter")
    report["seconds"]["all"] = [round(time.perf_counter() - start, 1), round(time.process_time() - cpu, 1)]
    if memory:
        report["memory"] = measure_memory(s, say)
    say(reports.conclusions(report))
    say(f"\nWritten: {write(report, out)}")
    return report


# ---------------------------------------------------------------------------------------------------- model and data
def check_model_file(path: str | os.PathLike) -> None:
    """FileNotFoundError, with the command that gets the file, if there is none."""
    if not Path(path).exists():
        raise FileNotFoundError(f"make real wants the model {path}, got no such file: `make real-assets` fetches it")


def open_model(s: Settings) -> tuple[Module, Tokenizer]:
    """The base model with dense or packed weights, and its tokenizer, which knows the model's chat format."""
    check_model_file(s.model)
    return load(s.model, packed=True) if s.packed else load(s.model)


def prepare(s: Settings, model: Module, tokenizer: Tokenizer) -> tuple[ChatTask, Batches, Batches]:
    """The task, its training batches, and batches of its first validation examples."""
    task = chat_task(s.task, s.test, s.seed)
    train = encode_pairs(task, task.train, tokenizer)
    valid = encode_pairs(task, Pairs(*(part[: s.valid] for part in task.valid)), tokenizer)
    batches = data.response_batches(train, s.batch, seed=s.seed, group_by_length=True)
    return task, batches, data.response_batches(valid, s.batch, shuffle=False)


def encode_pairs(task: ChatTask, pairs: Pairs, tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """(ids of the conversation before the answer, ids of the answer and its end) of each pair."""
    end = tokenizer.token_to_id(chat_end(tokenizer))
    rows = []
    for prompt, response in zip(*pairs, strict=True):
        before = chat_prompt(task.messages(prompt), tokenizer)
        prompt_ids = tokenizer.encode(before, add_special_tokens=False).ids
        rows.append((prompt_ids, [*tokenizer.encode(response, add_special_tokens=False).ids, end]))
    return rows


def answer(
    task: ChatTask, prompts: Sequence[str], model: Module, tokenizer: Tokenizer, shots: int = 0, batch: int = 32
) -> list[str]:
    """The model's answers to N prompts, greedy, of at most task.longest tokens. shots: solved examples before each."""
    texts = [chat_prompt(task.messages(prompt, shots), tokenizer) for prompt in prompts]
    end = tokenizer.token_to_id(chat_end(tokenizer))
    answers = predict(model, tokenizer, texts, batch_size=batch, max_new_tokens=task.longest, end=end)
    return [text.strip() for text in answers]


# ---------------------------------------------------------------------------------------------------- the run
def new_report(s: Settings, task: ChatTask) -> dict[str, Any]:
    """A report without results. JSON-able.

    rows      {name: {"kind": "simple", "base" or "tuned", metric: [mean, low, high]}}, intervals of 95 %
    answers   {name of a row: the answers to the test prompts}
    curve     {"loss": one per step, "points": [[steps, {"loss": ..., metric: ...}], ...] on validation examples}
    seconds   {part: [seconds that passed, seconds of processor time over all threads]}
    """
    return {
        "settings": asdict(s),
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
        "machine": machine() | {"threads": kernels.get_num_threads(), "load": os.getloadavg()[0]},
    }


def fill(
    report: dict, s: Settings, model: Module, tokenizer: Tokenizer, task: ChatTask, batches: Batches,
    valid_batches: Batches, say: Say,
) -> None:
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
    evaluate_now = partial(check, s, task, model, tokenizer, valid_batches)
    for name, answers in timed("simple", task.baselines).items():
        enter(name, "simple", answers)
    enter("zero-shot", "base", timed("zero-shot", answer, task, prompts, model, tokenizer))
    if s.shots:
        enter(f"{s.shots}-shot", "base", timed(f"{s.shots}-shot", answer, task, prompts, model, tokenizer, s.shots))
    before = [(0, timed("first point", evaluate_now))] if s.evaluate_every else []
    history = timed("training", train, s, model, batches, evaluate_now)
    report["curve"] = {"loss": history.losses, "points": before + history.evaluations}
    report["trained"] = edit.count(model).trained
    enter("LoRA", "tuned", timed("LoRA", answer, task, prompts, model, tokenizer))


def train(
    s: Settings, model: Module, batches: Batches, evaluate: Callable | None = None, progress: bool = True
) -> History:
    """Attach LoRA to all linear maps of the blocks, and train it. Prompts have no labels: see data.response_batches."""
    edit.attach(model, LoRA(r=s.r, alpha=s.alpha, targets=TARGETS), seed=s.seed)
    return fit(
        model, batches, s.steps, AdamW(s.lr), linear_schedule(0.1), seed=s.seed, progress=progress,
        evaluate=evaluate, evaluate_every=s.evaluate_every if evaluate else 0,
    )


def check(s: Settings, task: ChatTask, model: Module, tokenizer: Tokenizer, batches: Batches) -> dict[str, float]:
    """A point of the learning curve: the loss and the first metric on the first validation examples."""
    answers = answer(task, task.valid.prompts[: s.valid], model, tokenizer)
    name, metric = next(iter(task.metrics.items()))
    scores = metric(task.valid.responses[: s.valid], [task.read(text) for text in answers])
    return {"loss": evaluate(model, batches)["loss"], name: float(scores.mean())}


def measure_memory(s: Settings, say: Say) -> list[dict[str, Any]]:
    """Peak memory of training on dense and on packed weights."""
    from .memory import measure

    found = [measure(s, packed=packed) for packed in (False, True)]
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
    return ", ".join(str(path) for path in sorted([*files, out / "adapter"]))


def settings_from(arguments: dict[str, Any]) -> Settings:
    """Settings from the arguments of the command line that were given."""
    known = {field.name for field in fields(Settings)}
    return Settings(**{name: value for name, value in arguments.items() if name in known and value is not None})
