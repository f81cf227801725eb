"""The cells of the table: training one contender with one seed, its costs, and the simple models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .. import array, data, edit
from ..data import baselines
from ..formats.huggingface import classifier, load
from ..methods import Full
from ..models import BERT
from ..models.blocks import Classifier
from ..nn import Context, Module, no_grad
from ..optim import AdamW, linear_schedule
from ..train import Diverged, evaluate, fit
from ..train.batch import compute_loss, read_batch
from .settings import PROMPT_ROWS, Contender, Settings

__all__ = [
    "BASE", "Material", "build", "check_base", "evaluate_base", "limit_text_length", "load_base", "load_material",
    "measure_costs", "run_simple", "train_one",
]  # fmt: skip

FULL = Contender("full", Full(), 1e-4)
SHORTEST_TEXT = 8  # tokens: a comparison on shorter texts makes no sense
BASE = "base, untouched"  # the name of its row


# ---------------------------------------------------------------------------------------------------- models and data
def load_base(s: Settings) -> tuple[Module, Tokenizer]:
    """A new copy of the base model, and its tokenizer."""
    return load(base_name(s))


def base_name(s: Settings) -> str:
    """The directory of the base model, or the name of a shipped one."""
    return s.model or ("base-gpt" if s.lm else "base-bert")


def build(s: Settings, c: Contender, seed: int) -> Module:
    """A new copy of the base model with the contender's method attached, and a classifier if the task has classes.

    A contender without a method trains from scratch: its model has the base's architecture and random weights.
    """
    model, _ = load_base(s)
    if c.method is None:
        model = type(model)(model.config, seed=seed)
    if s.classes:
        classifier(model, s.classes, seed=seed)
    if c.method is not None:
        edit.attach(model, c.method, seed=seed)
    return model


def check_base(s: Settings) -> None:
    """Raise ValueError, in one sentence, for a base model that cannot do the task, or for one without a tokenizer."""
    model, tokenizer = load_base(s)
    if tokenizer is None:
        raise ValueError(f"the comparison wants a model with its tokenizer, got no tokenizer.json in {s.model}")
    rows = model.embed.in_features
    if tokenizer.get_vocab_size() > rows:
        raise ValueError(
            f"the comparison wants an embedding for every token, got {tokenizer.get_vocab_size()} tokens in the "
            f"tokenizer of {s.model} and {rows} rows in the embedding"
        )
    if s.lm and (isinstance(model, BERT) or isinstance(getattr(model, "head", None), Classifier)):
        raise ValueError(
            f"the task {s.task} wants a language model such as GPT-2, got a {type(model).__name__} in {s.model}; "
            "--task intact or --task package takes it"
        )
    for name, p in model.named_parameters().items():
        if not np.isfinite(array.asnumpy(p.data).astype(np.float32)).all():
            raise ValueError(f"the comparison wants a model of finite weights, got NaN or infinity in {name}")


def limit_text_length(s: Settings) -> Settings:
    """The settings with T, the longest text in tokens, lowered to fit the model.

    The rows of prompt tuning's soft prompt take positions too. All contenders get the same texts, so T is lowered for
    all of them. ValueError if fewer than SHORTEST_TEXT positions remain for a text.
    """
    model, _ = load_base(s)
    positions = model.pos.in_features  # rows of the table of positions
    for_text = positions - PROMPT_ROWS
    if for_text < SHORTEST_TEXT:
        wanted = PROMPT_ROWS + SHORTEST_TEXT
        raise ValueError(f"the comparison wants a model of at least {wanted} positions; this one has {positions}")
    return replace(s, T=min(s.T, for_text))


@dataclass(frozen=True)
class Material:
    """The data of one seed."""

    task: data.Task
    train: data.Batches
    held_out: Any  # Examples, or windows (n, T) for domain
    test: list[dict]  # batches of held_out
    prose: list[dict]  # domain: batches of held-out prose, on which forgetting is measured


@lru_cache(maxsize=1)
def whole_domain(model: str) -> data.Task:
    """The task domain with all training tokens, by the tokenizer of this model: the text is tokenised once."""
    _, tokenizer = load(model)
    return data.task("domain", tokenizer=tokenizer)


@lru_cache(maxsize=4)
def load_material(s: Settings, seed: int) -> Material:
    """The task with this seed, its training batches and its test batches.

    Cached: all contenders of a worker process share the same object.
    """
    model, tokenizer = load_base(s)
    if s.lm:
        whole = whole_domain(base_name(s))
        task = replace(whole, train=data.stretch(whole.train, seed, s.train))  # as data.task gives it
        train = data.lm_batches(task.train, s.T, s.batch, seed)
        test = data.held_out_batches(getattr(task, s.split), s.T, s.test)
        prose = data.held_out_batches(task.kept, s.T, s.test)  # of the base's own domain
        held_out = np.concatenate([batch["ids"] for batch in test])
        return Material(task, train, held_out, test, prose)
    task = data.task(s.task, seed, s.train)
    form = "bert" if isinstance(model, BERT) else "gpt"  # the special tokens that a text gets
    held_out = by_length(getattr(task, s.split), s.test)
    options = {"form": form, "group_by_length": True}
    train = data.text_batches(task.train, tokenizer, s.batch, s.T, seed, **options)
    test = data.text_batches(held_out, tokenizer, s.batch, s.T, seed, **options)
    return Material(task, train, held_out, list(test.once()), [])


def by_length(examples: data.Examples, count: int) -> data.Examples:
    """The first `count` examples, shortest first: batches of texts of similar length need less padding."""
    texts = examples.texts[:count]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return data.Examples([texts[i] for i in order], examples.labels[order])


# ---------------------------------------------------------------------------------------------------- quality
def train_one(s: Settings, c: Contender, seed: int) -> dict[str, Any]:
    """Train one contender with one seed; {metric: value} on held-out data, and "seconds", the time that it took.

    For domain, "prose" is the perplexity on the base's own domain, which shows forgetting. A run that diverges has no
    metrics but "diverged": True.
    """
    start = time.time()
    material = load_material(s, seed)
    model = build(s, c, seed)
    batches = material.train
    # The batches are shared (load_material is cached): back to the start, so every contender sees the same ones.
    batches.load_state_dict({**batches.state_dict(), "epoch": 0, "batch": 0})
    try:
        with np.errstate(all="ignore"):  # NumPy's warnings of overflow would fill the screen
            fit(model, batches, s.steps, AdamW(c.lr), linear_schedule(0.1), seed=seed, progress=False)
            metrics = measure(s, model, material)
    except Diverged:
        metrics = {"diverged": True}
    return metrics | {"seconds": time.time() - start}


def measure(s: Settings, model: Module, material: Material) -> dict[str, Any]:
    """{metric: value} of a model on the held-out data; {"diverged": True} if the quality is not a finite number.

    JSON has no NaN, so a metric that is not finite is left out.
    """
    metrics = evaluate(model, material.test)
    if s.lm:
        metrics["prose"] = evaluate(model, material.prose)["perplexity"]
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return finite if s.quality in finite else {"diverged": True}


def evaluate_base(s: Settings) -> dict[str, float]:
    """{metric: value} of the untouched base on held-out data: one number per metric, the same for every seed.

    {} for classification, since the base has no classifier.
    """
    if not s.lm:
        return {}
    model, _ = load_base(s)
    return measure(s, model, load_material(s, 0))


def run_simple(s: Settings, seed: int) -> dict[str, dict[str, float]]:
    """{name: {metric: value}} on held-out data, of models for which no network is trained.

    Classification: majority class, TF-IDF with logistic regression. Domain: unigrams, bigrams.
    """
    m = load_material(s, seed)
    if s.lm:
        model, _ = load_base(s)
        V = model.embed.in_features
        unigrams = baselines.unigram_perplexity(m.task.train, m.held_out[:, 1:], V)
        bigrams = baselines.bigram_perplexity(m.task.train, m.task.valid, m.held_out, V)
        return {"unigrams": {"perplexity": unigrams}, "bigrams": {"perplexity": bigrams}}
    metrics = {}
    for name, predicted in baselines.simple(m.task.train, m.task.valid, m.held_out, s.classes).items():
        metrics[name] = {
            "accuracy": baselines.accuracy(m.held_out.labels, predicted),
            "macro_f1": baselines.macro_f1(m.held_out.labels, predicted),
        }
    return metrics


# ---------------------------------------------------------------------------------------------------- costs
def measure_costs(s: Settings, c: Contender, rounds: int = 5) -> dict[str, Any]:
    """The costs of one contender, by name.

    trained, head      number of trained parameters outside the classifier, and inside
    stored             bytes to store for the task: what was trained; from scratch, the whole model
    memory             peak bytes of array memory in a training step
    step_ms            milliseconds of a training step
    step_ratio         its time relative to a step of full fine-tuning
    inference_ratio    time of a forward pass relative to the base without the method

    Each round measures both sides of a ratio, one after the other; the result is the median of the rounds' ratios.
    """
    batch = next(load_material(s, 0).train.once())  # the same batch for all; its longest text has length T
    model = build(s, c, 0)
    unchanged = build(s, FULL if c.method is not None else c, 0)  # full fine-tuning adds nothing to the base
    steps = paired_times(make_step(build(s, c, 0), batch), make_step(build(s, FULL, 0), batch), rounds)
    inferences = paired_times(partial(infer, model, batch), partial(infer, unchanged, batch), rounds)
    with array.peak_memory() as peak:  # weights, activations, gradients, moments
        make_step(build(s, c, 0), batch)()
    count = edit.count(model)
    stored = count.nbytes if c.method is not None else sum(p.data.nbytes for p in model.parameters())
    return {
        "trained": count.trained,
        "head": count.head,
        "stored": stored,
        "memory": peak["bytes"],
        "step_ms": 1e3 * float(np.median([own for own, _ in steps])),
        "step_ratio": float(np.median([own / full for own, full in steps])),
        "inference_ratio": float(np.median([own / base for own, base in inferences])),
    }


def paired_times(f: Callable[[], Any], g: Callable[[], Any], rounds: int) -> list[tuple[float, float]]:
    """(seconds of f, seconds of g), `rounds` times, after one round that is not counted: first calls are slower."""
    times = [(timed(f), timed(g)) for _ in range(rounds + 1)]
    return times[1:]


def make_step(model: Module, batch: Any) -> Callable[[], None]:
    """A function that runs one training step of the model on this batch: forward, backward, update.

    Only its time and memory are measured, so the learning rate does not matter.
    """
    optimizer = AdamW(1e-4).start(edit.trained(model))
    rng = np.random.default_rng(0)
    targets = read_batch(batch)
    model.train()

    def step() -> None:
        with np.errstate(all="ignore"), suppress(FloatingPointError):  # a step that overflows takes as long
            _, loss = compute_loss(model, targets, rng)
            loss.backward()
            optimizer.step(clip=1.0)
        model.zero_grad()

    return step


def infer(model: Module, batch: Any) -> None:
    """One forward pass."""
    with no_grad():
        model(batch["ids"], Context(mask=batch.get("mask")))


def timed(f: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------- the forecast
def measure_pace(s: Settings) -> tuple[float, float]:
    """(seconds of one step of full fine-tuning, seconds of one evaluation on all test batches), in this process.

    Both are estimated from a few batches.
    """
    material = load_material(s, 0)
    model = build(s, FULL, 0)
    steps = [make_step(model, batch) for batch in islice(material.train, 8)]  # 8 batches: their lengths differ
    for step in steps:  # the first call is slower
        step()
    step_seconds = sum(timed(step) for step in steps) / len(steps)
    some = material.test[::4]  # every fourth, so that short and long texts both count
    evaluation = sum(timed(partial(infer, model, batch)) for batch in some) * len(material.test) / len(some)
    return step_seconds, evaluation


def forecast(s: Settings, pace: tuple[float, float], rows: int, jobs: int) -> float:
    """Seconds that the comparison will take: training, evaluations, costs and the start.

    pace: as measure_pace gives it. rows: the number of contenders. jobs: runs at a time.
    The constants are rough estimates: a contender's step takes 0.9 of a full step, each run 1 s more, a row's costs
    20 steps, the start 15 s."""
    step, evaluation = pace
    evaluations = 2 if s.lm else 1
    training = s.seeds * (0.9 * step * s.steps + evaluations * evaluation + 1)
    return rows * (training / jobs + 20 * step) + 15
