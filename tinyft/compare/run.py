"""The comparison: every method on one real task, beside training from scratch, the head alone, and models that need no network.

Five axes, those users choose by: bytes stored per task, peak memory of a training step, time of a step, held-out quality with its spread
over seeds, and what inference costs more than the base.  Every contender sees the same examples in the same order; a difference counts
as one only where its paired 95 % interval over seeds leaves out zero.
"""
from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import array, data, edit, kernels
from ..data import baselines
from ..files import write_atomically
from ..formats.huggingface import classifier, load
from ..methods import BitFit, Full, Houlsby, LoRA, Partial, PrefixTuning, PromptTuning
from ..models import BERT
from ..nn import Context, Module, no_grad
from ..optim import AdamW, linear_schedule
from ..train import evaluate, fit
from ..train.batch import compute_loss, read_batch
from .report import draw, table, verdict

__all__ = ["Settings", "PRESETS", "compare", "contenders"]

PROMPT = 16                                                                      # rows of the prompt, which take positions from the text


@dataclass(frozen=True)
class Contender:
    "A row of the table: a method and its rate.  method None trains everything from random weights; a text names a baseline."
    name: str
    method: edit.Method | None
    lr: float

    def model(self, settings: Settings, seed: int) -> Module:
        "The base with this contender on it, ready to train."
        model, _ = base(settings)
        if self.method is None:
            model = type(model)(model.config, seed=seed)
        if settings.classes:
            classifier(model, settings.classes, seed=seed)
        if self.method is not None:
            edit.attach(model, self.method, seed=seed)
        return model


def contenders(task: str) -> list[Contender]:
    "Every method, with the rate that was best for it on the validation modules of this task (tests/benchmarks/rates.py)."
    everything = "attn.[qkvo]", "mlp.up", "mlp.down"
    rows = [                                                                     # rates: intact, package, domain
        ("from scratch", None, (5e-4, 2e-3, 3e-3)),
        ("head only", Partial(k=0), (2e-3, 6e-3)),                               # a language model's tied head is its embedding: nothing to train
        ("BitFit", BitFit(), (1e-3, 3e-3, 2e-2)),
        ("prompt (p=16)", PromptTuning(p=PROMPT), (1e-3, 6e-3, 3e-2)),
        ("prefix (p=16)", PrefixTuning(p=16), (1e-3, 9e-3, 3e-2)),
        ("prefix, MLP", PrefixTuning(p=16, mlp=64), (1e-3, 3e-3, 6e-3)),
        ("LoRA (r=8; q, v)", LoRA(r=8, alpha=16), (2e-3, 4e-3, 9e-3)),
        ("LoRA (r=8; all)", LoRA(r=8, alpha=16, targets=everything), (2e-3, 2e-3, 1e-2)),
        ("Houlsby (m=16)", Houlsby(m=16), (3e-3, 3e-3, 1e-2)),
        ("top block", Partial(k=1), (1e-3, 2e-3, 5e-3)),
        ("full", Full(), (4e-4, 1e-3, 1e-3)),
    ]
    at = ("intact", "package", "domain").index(task)
    return [Contender(name, method, rates[at]) for name, method, rates in rows if at < len(rates)]


@dataclass(frozen=True)
class Settings:
    "What is compared.  train: examples (tokens for domain); test: at most so many held-out examples, of the split `split`; T: longest text."
    task: str = "intact"
    model: str = ""
    steps: int = 200
    seeds: int = 3
    train: int = 3000
    test: int = 1000
    batch: int = 32
    T: int = 64
    split: str = "test"
    names: tuple[str, ...] = ()

    lm = property(lambda self: self.task == "domain")
    classes = property(lambda self: 0 if self.lm else len(material(self, 0)[0].classes))
    quality = property(lambda self: "perplexity" if self.lm else "accuracy")

    def chosen(self) -> list[Contender]:
        rows = contenders(self.task)
        if not self.names:
            return rows
        asked = [n.lower() for n in self.names]
        hits = {n: [c for c in rows if n in (c.name.lower(), c.name.split(" (")[0].split(",")[0].lower())] for n in asked}
        if missing := [n for n in asked if not hits[n]]:
            raise ValueError(f"there is no method {missing[0]!r} to compare; there are {', '.join(c.name for c in rows)}")
        return [c for c in rows if any(c in found for found in hits.values())]


PRESETS = {
    ("quick", "intact"): Settings("intact"),
    ("quick", "package"): Settings("package", train=1000),
    ("quick", "domain"): Settings("domain", steps=120, seeds=3, train=200_000, test=64, batch=16, T=112),
    ("full", "intact"): Settings("intact", steps=600, seeds=5, train=6000, test=3000),
    ("full", "package"): Settings("package", steps=600, seeds=5, train=3000, test=3000, T=96),
    ("full", "domain"): Settings("domain", steps=400, seeds=5, train=900_000, test=256, batch=16, T=112),
}


# ── what a contender works on ────────────────────────────────────────────────────────────────────────────────────────
def base(s: Settings) -> tuple[Module, Any]:
    "A fresh copy of the base model, and its tokenizer."
    return load(s.model or ("base-gpt" if s.lm else "base-bert"))


def fitting(s: Settings) -> Settings:
    "The same with texts short enough that this model's positions hold them and a prompt.  ValueError for a model too short for any."
    positions = base(s)[0].pos.in_features
    if positions < PROMPT + 8:
        raise ValueError(f"the comparison wants a model of at least {PROMPT + 8} positions; this one has {positions}")
    return replace(s, T=min(s.T, positions - PROMPT))


@lru_cache(maxsize=4)
def material(s: Settings, seed: int) -> tuple[data.Task, data.Batches, list]:
    "The task at this seed, its training batches, its test batches."
    model, tokenizer = base(s)
    task = data.task(s.task, seed, s.train, tokenizer) if s.lm else data.task(s.task, seed, s.train)
    if s.lm:
        return task, data.lm_batches(task.train, s.T, s.batch, seed), list(data.lm_batches(held_out(s, task), s.T, s.batch).once())
    form = "bert" if isinstance(model, BERT) else "gpt"
    asked = held_out(s, task)
    order = sorted(range(len(asked.texts)), key=lambda i: len(asked.texts[i]))   # like lengths together: less padding
    asked = data.Examples([asked.texts[i] for i in order], asked.labels[order])
    train, test = (data.text_batches(e, tokenizer, s.batch, s.T, seed, form=form, group_by_length=True) for e in (task.train, asked))
    return task, train, list(test.once())


def held_out(s: Settings, task: data.Task) -> Any:
    "What the contenders are judged on: the first examples (windows, for domain) of a split none of them has seen."
    part = getattr(task, s.split)
    return part[:s.test * s.T] if s.lm else data.Examples(part.texts[:s.test], part.labels[:s.test])


def prose(s: Settings, task: data.Task) -> list:
    "Held-out prose, on which a language model can forget."
    return list(data.lm_batches(task.kept[:s.test * s.T], s.T, s.batch).once())


# ── one cell of the table ────────────────────────────────────────────────────────────────────────────────────────────
def train_one(s: Settings, c: Contender, seed: int) -> dict[str, float]:
    "Train one contender with one seed; its held-out metrics."
    start = time.time()
    task, batches, test = material(s, seed)
    model = c.model(s, seed)
    batches.load_state_dict({**batches.state_dict(), "seed": seed, "epoch": 0, "batch": 0})
    fit(model, batches, s.steps, AdamW(c.lr), linear_schedule(0.1), seed=seed, progress=False)
    out = evaluate(model, test)
    if s.lm:
        out["prose"] = evaluate(model, prose(s, task))["perplexity"]
    return out | {"seconds": time.time() - start}


def simple_models(s: Settings, seed: int) -> dict[str, dict[str, float]]:
    "What needs no network: majority and TF-IDF + logistic regression; unigrams, bigrams and the untouched base."
    task, _, test = material(s, seed)
    if s.lm:
        model, _ = base(s)
        text, V = held_out(s, task), model.embed.in_features
        return {"unigrams": {"perplexity": baselines.unigram_perplexity(task.train, text, V)},
                "bigrams": {"perplexity": baselines.bigram_perplexity(task.train, task.valid, text, V)},
                "base, untouched": {"perplexity": evaluate(model, test)["perplexity"], "prose": evaluate(model, prose(s, task))["perplexity"]}}
    asked = held_out(s, task)
    guesses = baselines.simple(task.train, task.valid, asked, len(task.classes))
    return {k: {"accuracy": baselines.accuracy(asked.labels, g), "macro_f1": baselines.macro_f1(asked.labels, g)} for k, g in guesses.items()}


def costs(s: Settings, c: Contender, rounds: int = 5) -> dict[str, Any]:
    """Stored bytes, peak memory of training, and paired ratios: a step's time to full fine-tuning's, inference's to the base's.
    Each round times both, one after the other; the figure is the median of the rounds' ratios."""
    batch = next(material(s, 0)[1].once())                                       # the same for all; its longest text fills T
    full = Contender("full", Full(), 1e-4)
    mine, other = (stepper(x.model(s, 0), batch) for x in (c, full))
    plain = replace(c, method=Full() if c.method is not None else None).model(s, 0)
    asked = c.model(s, 0)
    step = [(timed(mine), timed(other)) for _ in range(rounds + 1)][1:]
    look = [(timed(lambda: infer(asked, batch)), timed(lambda: infer(plain, batch))) for _ in range(rounds + 1)][1:]
    with array.peak_memory() as peak:                                            # weights, activations, gradients, moments
        stepper(c.model(s, 0), batch)()
    n = edit.count(asked)
    stored = n.nbytes if c.method is not None else sum(p.data.nbytes for p in asked.parameters())
    ratio = lambda pairs: float(np.median([a / b for a, b in pairs]))
    return {"trained": n.trained, "head": n.head, "stored": stored, "memory": peak["bytes"], "step_ms": 1e3 * float(np.median([a for a, _ in step])),
            "step_ratio": ratio(step), "inference_ratio": ratio(look)}


def stepper(model: Module, batch: Any) -> Callable[[], None]:
    "One training step as a function: forward, backward, update."
    opt, rng, q = AdamW(1e-4).start(edit.trained(model)), np.random.default_rng(0), read_batch(batch)
    model.train()

    def step() -> None:
        _, loss = compute_loss(model, q, rng)
        loss.backward()
        opt.step(clip=1.0)
        model.zero_grad()
    return step


def infer(model: Module, batch: Any) -> None:
    with no_grad():
        model(batch["ids"], Context(mask=batch.get("mask")))


def timed(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────
def compare(s: Settings, out: Path, jobs: int | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    "Run the comparison; print it as it goes; write out/compare.json and out/compare.png.  Returns what the file holds."
    s = fitting(s)
    rows, start = s.chosen(), time.time()
    jobs = jobs or (min(2, os.cpu_count() or 1) if array.backend() == "numpy" else 1)
    say(headline(s, material(s, 0)[0]))
    with workers(jobs) as pool:
        apart = lambda f, *args: f(*args) if pool is None else pool.submit(f, *args).result()
        say(f"about {forecast(apart(pace, s), s, rows, jobs) / 60:.1f} minutes on this machine ({len(rows)} contenders, {jobs} at a time)")
        price = {c.name: apart(costs, s, c) for c in tqdm(rows, "costs", disable=not sys.stderr.isatty(), leave=False)}
        results: dict[str, list] = {c.name: [None] * s.seeds for c in rows}
        for c, seed, metrics in progress(s, rows, pool):
            results[c.name][seed] = metrics
    for seed in range(s.seeds):
        for name, metrics in simple_models(s, seed).items():
            results.setdefault(name, [None] * s.seeds)[seed] = metrics
    report = {"settings": asdict(s), "results": results, "costs": price, "seconds": round(time.time() - start, 1), "machine": machine(),
              "rates": {c.name: c.lr for c in rows}}
    write_atomically({out / "compare.json": json.dumps(report, indent=1).encode()})
    say(table(report) + "\n\n" + verdict(report))
    figure = f", {out / 'compare.png'}" if draw(report, out / "compare.png") else " (no figure: matplotlib is missing)"
    say(f"\n{time.time() - start:.0f} s.  Written: {out / 'compare.json'}{figure}")
    return report


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    "Processes of one thread each, so that they do not wait for one another; None for one job, which runs here."
    if jobs == 1:
        kernels.keep_memory()
        yield None
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_worker) as pool:
        try:
            with _inherited():
                for _ in range(jobs):
                    pool.submit(int)                                             # starts a process
            yield pool
        except BaseException:                                                    # Ctrl-C too: nothing that still runs is waited for
            for process in active_children():
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _worker() -> None:
    tqdm.set_lock(threading.RLock())                                             # its own is shared by processes, and none is needed
    kernels.keep_memory()


@contextmanager
def _inherited() -> Iterator[None]:
    "What a process takes over when it starts: one thread for its BLAS, and no ear for Ctrl-C, which a terminal sends to every process."
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    old = {n: os.environ.get(n) for n in names}
    os.environ.update(dict.fromkeys(names, "1"))
    block = getattr(signal, "pthread_sigmask", lambda *_: None)                  # a Ctrl-C that comes now waits for the finally
    block(getattr(signal, "SIG_BLOCK", 0), {signal.SIGINT})
    try:
        yield
    finally:
        for n, v in old.items():
            os.environ.pop(n) if v is None else os.environ.__setitem__(n, v)
        block(getattr(signal, "SIG_UNBLOCK", 0), {signal.SIGINT})


def progress(s: Settings, rows: list[Contender], pool: ProcessPoolExecutor | None) -> Iterator[tuple[Contender, int, dict]]:
    "Every contender with every seed; a line for each as it ends."
    units = [(c, seed) for seed in range(s.seeds) for c in rows]
    with tqdm(total=len(units), unit="run", disable=not sys.stderr.isatty(), leave=False) as bar:
        if pool is None:
            for c, seed in units:
                yield _told(bar, s, c, seed, train_one(s, c, seed))
            return
        waiting = {pool.submit(train_one, s, c, seed): (c, seed) for c, seed in units}
        for done in as_completed(waiting):
            yield _told(bar, s, *waiting[done], done.result())


def _told(bar: tqdm, s: Settings, c: Contender, seed: int, metrics: dict) -> tuple[Contender, int, dict]:
    bar.update()
    bar.write(f"  {c.name:<18} seed {seed}   {s.quality} {metrics[s.quality]:.3f}   ({metrics['seconds']:.0f} s)", file=sys.stderr)
    return c, seed, metrics


def headline(s: Settings, task: data.Task) -> str:
    what = {"intact": "is a sentence of Python's documentation intact, or were two of its words swapped?",
            "package": f"which of {len(task.classes)} packages does a docstring come from? (their names are masked)",
            "domain": "a language model of English prose learns Python source; what does it forget?"}[s.task]
    unit = "tokens" if s.lm else "examples"
    return (f"{s.task}: {what}\n{s.train:,} training {unit}, {s.seeds} seeds, {s.steps} steps of {s.batch}; "
            "test modules are in no training text, pretraining included")


def pace(s: Settings) -> tuple[float, float]:
    "Seconds of one full fine-tuning step, and of one evaluation, as this process runs them."
    _, batches, test = material(s, 0)
    model = Contender("full", Full(), 1e-4).model(s, 0)
    some = [stepper(model, b) for b in islice(batches, 8)]
    for step in some:                                                            # the first time is slower
        step()
    return sum(map(timed, some)) / len(some), sum(timed(lambda: infer(model, b)) for b in test[::4]) * len(test) / len(test[::4])


def forecast(paces: tuple[float, float], s: Settings, rows: list[Contender], jobs: int) -> float:
    "Seconds the comparison will take: training, evaluations, costs, the start."
    step, asks = paces
    return len(rows) * (s.seeds * (0.9 * step * s.steps + (2 if s.lm else 1) * asks + 1) / jobs + 20 * step) + 15


def machine() -> dict[str, Any]:
    from .. import __version__
    return {"python": platform.python_version(), "numpy": np.__version__, "tinyft": __version__, "system": platform.system(),
            "processor": platform.machine(), "cores": os.cpu_count(), "backend": array.backend()}
