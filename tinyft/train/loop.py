"""The one training loop, and evaluation.

What a batch may be, and its loss: objective.py.

The order of a step: begin, forward, penalties, backward, clip, update, step, clear gradients.
"""
from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import array, edit, kernels, precision
from ..array import Array
from ..files import read_tensors, sweep, write_tensors
from ..models.blocks import Classifier, check_ids
from ..nn import Module, no_grad
from ..optim import AdamW, GradScaler, Optimizer, Schedule, constant_schedule
from ..tensor import Tensor
from .batch import Targets, check_labels, compute_loss, read_batch


class Diverged(ArithmeticError):
    "The loss is not a finite number."


@dataclass
class History:
    """What happened: the loss of every step, (step, metrics) of every evaluation, why it stopped early, and the numbers (from 0) of the steps
    that float16 skipped."""
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    stopped: str = ""
    skipped: list[int] = field(default_factory=list)


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def fit(model: Module, batches: Any, steps: int, optimizer: Optimizer | None = None, schedule: Schedule | None = None, *,
        clip: float | None = 1.0, accumulate: int = 1, seed: int = 0, out: str | os.PathLike | None = None, resume: bool = False,
        save_every: int = 100, progress: bool = True, evaluate: Callable[[], dict[str, float]] | None = None, every: int = 0,
        patience: int = 0, watch: str = "loss", autocast: Any = None, capture: bool = False) -> History:
    """Train what the model's attached methods train (without any: everything), for `steps` updates.

    batches     an iterable of batches, gone through again and again; one with state()/load(state) resumes at once (data.Batches)
    optimizer   AdamW(1e-3) if None;   schedule: (t, T) -> factor on the rate;   clip: largest norm of all gradients together
    accumulate  batches per update, each weighted by what it asks, so that the gradient is that of one large batch
    out         a folder: the state is written to out/checkpoint.safetensors every `save_every` steps and at the end, atomically
    resume      go on from there: bitwise as if never stopped.  With nothing there it starts afresh
    evaluate    called every `every` steps, gives metrics; with patience > 0 training stops after that many without a better metric
                `watch` (what ends in loss or perplexity falls, all else rises), and the best state is put back
    autocast    "bfloat16" or "float16": products in 16 bits (tinyft.autocast); float16 with a GradScaler, which skips steps that overflow
    capture     on CuPy, replay steps as CUDA graphs (tinyft.capture); of shapes beyond the first eight, run them.  On NumPy it changes nothing.
                CannotCapture for what no graph can hold: several batches an update, float16, a method with work of its own around a step

    Ctrl-C finishes the step, writes the state and raises KeyboardInterrupt.  A loss or gradient that is not finite raises Diverged
    before anything is updated or written."""
    run = Run(model, batches, steps, optimizer or AdamW(1e-3), schedule or constant_schedule(), clip, accumulate, seed, evaluate, every, patience, watch,
              autocast, capture)
    kernels.keep_memory()
    path = None if out is None else Path(out) / "checkpoint.safetensors"
    if path:
        sweep(path)
    saved = read_tensors(path) if path and resume and path.exists() else None
    model.train()
    try:
        with _interruptible() as interrupted, _bar(progress, steps) as bar:
            for _ in run.walk(saved):
                bar.update(run.done - bar.n)
                bar.set_postfix_str(run.says(), refresh=False)
                if interrupted():
                    if path:
                        write_tensors(path, *run.state())
                    raise KeyboardInterrupt(f"stopped after step {run.done} of {steps}" + ("; fit(..., resume=True) goes on" if path else ""))
                if path and save_every and run.done % save_every == 0:
                    write_tensors(path, *run.state())
        run.put_best()
        if path:
            write_tensors(path, *run.state())
    finally:
        model.eval()
        model.zero_grad()
    return run.history


class Run:
    "One call of fit: what it was asked, and where it stands."

    def __init__(self, model: Module, batches: Any, steps: int, optimizer: Optimizer, schedule: Schedule, clip: float | None, accumulate: int,
                 seed: int, evaluate: Callable | None, every: int, patience: int, watch: str, autocast: Any = None, capture: bool = False):
        if steps < 0 or accumulate < 1:
            raise ValueError(f"fit wants steps >= 0 and accumulate >= 1; got {steps} and {accumulate}")
        methods = [f"{a.name}: {a.method!r}" for a in edit.attached(model)]
        self.autocast = None if autocast is None else str(precision.half(autocast))
        self.scaler = GradScaler(enabled=self.autocast == "float16")
        self.expected = {"over": "ignore", "invalid": "ignore"} if self.scaler.enabled else {}     # what NumPy need not warn of
        self.asked = {"steps": steps, "accumulate": accumulate, "clip": clip, "optimizer": repr(optimizer), "methods": "; ".join(methods),
                      "autocast": self.autocast}
        self.model, self.steps, self.opt, self.schedule, self.clip, self.accumulate = model, steps, optimizer, schedule, clip, accumulate
        self.evaluate, self.every, self.patience, self.watch = evaluate, every, patience, watch
        self.source, self.rng, self.history = Source(batches), np.random.default_rng(seed), History()
        self.phase, self.t, self.done, self.best, self.tokens, self.since = 0, 0, 0, None, 0, time.perf_counter()
        many = [a for a in edit.attached(model) if type(a.method).phases is not edit.Method.phases]
        if len(many) > 1:
            raise ValueError(f"only one method may bring phases; here {', '.join(a.name for a in many)} do")
        self.capture, self.replay = capture and array.backend() == "cupy", None
        if self.capture:
            self.check_capture()
        self.phased = many[0] if many else None
        self.phases = self.phased.method.phases() if self.phased else [edit.Phase(1.0)]

    def walk(self, saved: tuple[dict, dict] | None) -> Iterator[None]:
        "Every step of every phase.  A resumed run goes on in the phase that the checkpoint names; setups that ran are not run again."
        total, given, at = 0.0, 0, self.check(saved[1]) if saved else 0
        for number, phase in enumerate(self.phases):
            self.phase, total = number, total + phase.share
            T, given = round(total * self.steps) - given, round(total * self.steps)
            self.t = 0
            if self.phase < at:
                continue
            if phase.setup and not (saved and self.phase == at):
                phase.setup(self.model, self.phased.edits, self.source, self.rng)
            self.opt.start(edit.trained(self.model))
            self.replay = kernels.capture(self.whole, self.whole) if self.capture else None
            if saved and self.phase == at:
                self.load(*saved)
            while self.t < T and not self.history.stopped:
                self.step(T)
                self.t, self.done = self.t + 1, self.done + 1
                if self.evaluate and self.every and self.done % self.every == 0:
                    self.judge()
                yield

    def step(self, T: int) -> None:
        here = edit.attached(self.model)
        for a in here:
            a.method.begin(a.edits, self.t, T, self.rng)
        questions, factor, norm = [read_batch(self.source.next()) for _ in range(self.accumulate)], self.schedule(self.t, T), None
        self.tokens += sum(int(np.prod(q.ids.shape[:2])) for q in questions)
        if self.replay:
            loss, norm = self.replayed(questions[0], factor)
        else:
            loss = self.backward(questions, self.rng)
        value = self.update(loss, factor, norm)
        for a in here if self.scaler.finite else ():                             # a skipped step has no gradients to look at
            a.method.step(a.edits, self.t, T)
        self.opt.zero_grad()
        self.history.losses.append(value)

    def backward(self, questions: list[Targets], rng: np.random.Generator) -> Array:
        "Gradients of the mean over all that is asked, with penalties.  Returns that mean."
        whole, total = sum(q.weight for q in questions), None
        for q in questions:
            loss = self.loss(q, rng)
            if len(questions) > 1:
                loss = loss * (q.weight / whole)                                 # Σ of numerators over Σ of weights, not a mean of means
            with np.errstate(**self.expected):
                self.scaler.scale(loss).backward()
            total = loss.data if total is None else total + loss.data
        return total

    def loss(self, q: Targets, rng: np.random.Generator) -> Tensor:
        with precision.autocast(self.autocast or "bfloat16", enabled=self.autocast is not None), np.errstate(**self.expected):
            ctx, loss = compute_loss(self.model, q, rng)
            for a in edit.attached(self.model):
                loss = loss + a.method.penalty(a.edits, self.model, ctx)
        return loss

    def update(self, loss: Array, factor: float, norm: Array | None) -> float:
        """One update, unless a replay has made it: norm is that of the gradients then.  Returns the loss; Diverged, with nothing updated, if it or
        the gradient (that of float16: for no scale) is not finite."""
        try:
            with self.scaler.skipping(loss):
                norm = self.opt.launch_step(factor, self.clip, loss, self.scaler.get_scale()) if norm is None else norm
                value, norm = array.numbers(loss, norm)                          # the one time that a step waits for a device
                self.opt.check_norm(norm)
        except FloatingPointError as e:
            if not math.isfinite(float(loss)):
                raise Diverged(f"the loss is {float(loss)} at step {self.done + 1} (rate {self.opt.lr * factor:.2g}): lower the rate or "
                               "warm up longer; tinyft.detect_anomaly() names the op where it began") from e
            raise Diverged(f"{e} at step {self.done + 1}: lower the rate or warm up longer; tinyft.detect_anomaly() names the op") from e
        if not self.scaler.finite:
            self.history.skipped.append(self.done)
        self.scaler.update()
        return value if self.scaler.finite else float(loss)

    # ── a step as one CUDA graph ──
    def whole(self, asked: dict[str, Any], factor: float, rng: np.random.Generator) -> tuple[Array, Array]:
        "A step on one batch, from the forward pass to the update: its loss, and the norm of its gradients."
        loss = self.backward([Targets(**asked)], rng)
        norm = self.opt.launch_step(factor, self.clip, loss)
        self.opt.zero_grad()
        return loss, norm

    def replayed(self, q: Targets, factor: float) -> tuple[Array, Array]:
        "The same, replayed; what a forward pass says of wrong numbers is said before."
        check_ids(q.ids, self.model.embed.in_features)
        if self.model.head is not None:
            check_labels(q.labels, self.model.head.out_features)
        return self.replay(vars(q) | {"weight": 1}, float(factor), self.rng)         # a weight counts beside others only

    def check_capture(self) -> None:
        if self.accumulate > 1:
            raise array.CannotCapture(f"gradients of {self.accumulate} batches are added up before an update: capture wants accumulate=1")
        for a in edit.attached(self.model):
            if (kind := type(a.method)).begin is not edit.Method.begin or kind.step is not edit.Method.step:
                raise array.CannotCapture(f"{kind.__name__} has work of its own before or after each step, which a replay would leave out: "
                                          "fit it without capture")

    def judge(self) -> None:
        "Evaluate; remember the best; say when to stop."
        self.model.eval()
        metrics = {k: float(v) for k, v in self.evaluate().items()}
        self.model.train()
        self.history.evaluations.append((self.done, metrics))
        if not self.patience:
            return
        if self.watch not in metrics:
            raise KeyError(f"fit watches {self.watch!r}, which evaluate does not give: it gives {', '.join(metrics)}")
        sign = -1 if self.watch.endswith(("loss", "perplexity")) else 1
        scores = [sign * m[self.watch] if math.isfinite(m[self.watch]) else -math.inf for _, m in self.history.evaluations]
        if scores[-1] == max(scores) and scores.index(scores[-1]) == len(scores) - 1:
            self.best = self.values()
        if len(scores) - 1 - scores.index(max(scores)) >= self.patience:
            self.history.stopped = f"no better {self.watch} in {self.patience} evaluations"

    def put_best(self) -> None:
        if self.best is not None:
            self.load_values(self.best)

    def says(self) -> str:
        rate = self.tokens / max(time.perf_counter() - self.since, 1e-9)
        return f"loss {self.history.losses[-1]:.3f}, {rate:,.0f} tokens/s"

    # ── what a checkpoint holds ──
    def slots(self) -> dict[str, Any]:
        "Everything that training changes: edits with their buffers, and the base's tensors that train.  Tensors and arrays by name."
        mine = {f"edit/{n}": v for a in edit.attached(self.model) for n, v in edit.named_state(self.model, a).items() if n not in a.base}
        return mine | {f"base/{n}": p for n, p in edit.base_parameters(self.model).items() if p.requires_grad}

    def values(self) -> dict[str, np.ndarray]:
        "Copies of all that, and of the masks on tensors."
        slots = self.slots()
        arrays = {n: v.data if isinstance(v, Tensor) else v for n, v in slots.items()}
        masks = {f"mask/{n}": v.mask for n, v in slots.items() if isinstance(v, Tensor) and v.mask is not None}
        return {n: np.array(array.asnumpy(a)) for n, a in (arrays | masks).items()}

    def load_values(self, values: dict[str, np.ndarray]) -> None:
        slots, given = self.slots(), {n for n in values if not n.startswith("mask/")}
        if wrong := sorted(n for n in slots.keys() | given if n not in given or n not in slots or slots[n].shape != values[n].shape):
            raise ValueError(f"this checkpoint is of another run: {', '.join(wrong[:3])} {'...' * (len(wrong) > 3)} "
                             f"{'is' if len(wrong) == 1 else 'are'} not in both, or of another shape")
        for n, v in slots.items():
            if not isinstance(v, Tensor):
                v[...] = array.put_like(values[n], v, v.dtype)                   # a buffer keeps its identity
                continue
            v.copy_(values[n])
            mask = values.get(f"mask/{n}")
            if mask is None:
                v.mask = None
            elif v.mask is None or v.mask.shape != mask.shape:
                v.mask = array.put_like(mask, v.data)
            else:
                v.mask[...] = array.put_like(mask, v.data)

    def check(self, facts: dict[str, Any]) -> int:
        "The phase a checkpoint stopped in.  ValueError if it is not of this run, naming the first difference."
        if not isinstance(facts, dict) or "phase" not in facts:
            raise ValueError("this is no checkpoint of fit: it does not say where the run stood")
        for k, mine in self.asked.items():
            if facts.get(k, mine) != mine:
                raise ValueError(f"this checkpoint is of another run: its {k}: {facts[k] or 'none'}; here: {mine or 'none'}")
        return facts["phase"]

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        "(arrays, facts): all that a later process needs to go on as if nothing had happened."
        arrays = {f"value/{k}": v for k, v in self.values().items()} | {f"optimizer/{k}": v for k, v in self.opt.state_dict().items()}
        arrays |= {f"best/{k}": v for k, v in (self.best or {}).items()}
        h = self.history
        return arrays, dict(self.asked, phase=self.phase, t=self.t, done=self.done, rng=self.rng.bit_generator.state,
                            batches=self.source.state(), losses=h.losses, evaluations=h.evaluations, stopped=h.stopped,
                            skipped=h.skipped, scaler=self.scaler.state_dict())

    def load(self, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        part = lambda head: {k[len(head):]: v for k, v in arrays.items() if k.startswith(head)}
        self.source.load(facts["batches"])
        self.load_values(part("value/"))
        self.opt.load_state_dict(part("optimizer/"))
        self.best, self.t, self.done = part("best/") or None, facts["t"], facts["done"]
        self.rng.bit_generator.state = facts["rng"]
        self.scaler.load_state_dict(facts.get("scaler", self.scaler.state_dict()))
        self.history = History(facts["losses"], [(s, m) for s, m in facts["evaluations"]], facts["stopped"], facts.get("skipped", []))


class Source:
    "Batches without end.  An iterable that can say where it stands is asked; any other is counted, and advanced when resuming."

    def __init__(self, batches: Iterable):
        self.batches, self.count, self.it = batches, 0, iter(batches)

    def next(self) -> Any:
        try:
            b = next(self.it)
        except StopIteration:
            self.it = iter(self.batches)
            b = next(self.it, None)
            if b is None:
                raise ValueError("the batches have come to an end: give a list, or an object that can be iterated again") from None
        self.count += 1
        return b

    def state(self) -> Any:
        return {"own": self.batches.state_dict()} if hasattr(self.batches, "state_dict") else {"count": self.count}

    def load(self, state: Any) -> None:
        if ("own" in state) != hasattr(self.batches, "load_state_dict"):
            raise ValueError("this checkpoint is of a run over another kind of batches: one says where it stands, the other is counted")
        if "own" in state:
            self.batches.load_state_dict(state["own"])
            self.it = iter(self.batches)
        else:
            while self.count < state["count"]:
                self.next()


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    "Ctrl-C raises a flag instead of tearing a step apart; a second one stops at once."
    hit: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def handler(sig: int, frame: Any) -> None:
        if hit:
            raise KeyboardInterrupt
        hit.append(sig)
    old = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(hit)
    finally:
        signal.signal(signal.SIGINT, old)


def _bar(progress: bool, steps: int) -> Any:
    return tqdm(total=steps, disable=not (progress and sys.stderr.isatty()), unit="step", leave=False)


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────
def evaluate(model: Module, batches: Iterable) -> dict[str, float]:
    """Loss (mean over everything asked), perplexity and accuracy over an iterable of batches; for classes macro-F1 as well.

    A data.Batches has no end; of it every example is taken once.  No dropout, no gradients; the model's mode is left as it was."""
    batches = batches.once() if hasattr(batches, "once") else batches
    was, parts, guesses, truths = [(m, m.training) for m in model.modules()], [], [], []
    model.eval()
    try:
        with no_grad():
            for batch in batches:
                q = read_batch(batch)
                ctx, loss = compute_loss(model, q)
                parts.append((float(loss.data), q.weight))
                guesses.append(array.asnumpy(ctx.output.data).reshape(len(q.labels), -1).argmax(-1))
                truths.append(q.labels)
    finally:
        for m, training in was:
            m.training = training
    if not sum(w for _, w in parts):
        raise ValueError("evaluate was given no batches")
    guess, truth = np.concatenate(guesses), np.concatenate(truths)
    guess, truth, (loss, perplexity) = guess[truth != -100], truth[truth != -100], pool(*zip(*parts))
    out = {"loss": loss, "perplexity": perplexity, "accuracy": float((guess == truth).mean())}
    if isinstance(getattr(model, "head", None), Classifier):
        from ..data.baselines import macro_f1
        out["macro_f1"] = macro_f1(truth, guess)
    return out


def pool(losses: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The loss and the perplexity of all batches together, from each batch's mean loss and how much it was the mean of (its tokens).

    ℓ = Σ wᵢ ℓᵢ / Σ wᵢ,  perplexity e^ℓ, with ℓ cut off at 700, where e^ℓ overflows."""
    loss = sum(w * l for w, l in zip(weights, losses)) / sum(weights)
    return loss, math.exp(min(loss, 700))


def perplexity(model: Module, batches: Iterable) -> float:
    "e to the mean negative log-likelihood of a token, over all tokens of all batches: not the mean of perplexities."
    return evaluate(model, batches)["perplexity"]


