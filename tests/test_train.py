"""The training loop: the order of a step, accumulation, phases, evaluation, bad input, and runs that are killed and resumed.

Run as a script, `python test_train.py RECIPE FOLDER`, this file trains one of RECIPES, printing a line per step: the tests kill it.
"""
from __future__ import annotations

import errno
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import host

import tinyft
from tinyft import (
    BERT,
    GPT,
    SGD,
    AdamW,
    BERTConfig,
    Diverged,
    Edit,
    GPTConfig,
    History,
    LoRA,
    Method,
    Parameter,
    Phase,
    array,
    attach,
    cosine_schedule,
    evaluate,
    fit,
    ops,
    perplexity,
    train,
)
from tinyft.data import Batches
from tinyft.files import read_tensors, write_tensors
from tinyft.nn import Context
from tinyft.optim.optimizers import Optimizer
from tinyft.tensor import OPS, op
from tinyft.train.batch import compute_loss, read_batch

V, P, C, CLASSES = 19, 12, 12, 3


def gpt(dropout: float = 0.0, seed: int = 0) -> GPT:
    return GPT(GPTConfig(V, P, C, 2, 3, 16, dropout), seed)


def bert(seed: int = 0, classes: int | None = None) -> BERT:
    model = BERT(BERTConfig(V, P, 2, C, 2, 3, 16), seed)
    if classes:
        model.new_head(classes, np.random.default_rng(seed))
    return model


def tokens(n: int = 4, T: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (n, T))


def padded(lengths: list[int], T: int = 8, seed: int = 0) -> dict:
    "Rows of these lengths."
    return {"ids": tokens(len(lengths), T, seed), "mask": np.arange(T)[None] < np.array(lengths)[:, None]}


def numbers(model: Any) -> dict[str, np.ndarray]:
    return {n: np.array(host(v)) for n, v in model.state_dict().items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(v.dtype == b[n].dtype and np.array_equal(v, b[n]) for n, v in a.items())


# ── runs that can be stopped ─────────────────────────────────────────────────────────────────────────────────────────
class Sparse(Edit):
    "W + δ, δ held where μ is False."

    def __init__(self, shape: tuple):
        self.delta, self.mu = Parameter(array.asarray(np.zeros(shape, np.float32))), array.asarray(np.ones(shape, bool))

    def tensor(self, name: str, p: Any) -> Any:
        return p + self.delta if name == "weight" else p


@dataclass(frozen=True)
class Ticket(Method):
    "Train δ, keep the places where it moved most, rewind, train these.   buffer: whether μ is stored in the edit, or only on the tensor."
    share: float = 0.3
    buffer: bool = True
    targets: Any = "attn.[qv]"

    def edit(self, path: str, module: Any, rng: np.random.Generator) -> Edit:
        return Sparse(module.weight.shape)

    def phases(self) -> list[Phase]:
        return [Phase(0.5), Phase(0.5, self.rewind)]

    def rewind(self, model: Any, edits: dict[str, Edit], batches: Any, rng: np.random.Generator) -> None:
        for e in edits.values():
            far = np.abs(host(e.delta))
            chosen = array.asarray(far >= np.quantile(far, 1 - self.share))
            if self.buffer:
                e.mu[...] = chosen
            e.delta.mask = e.mu if self.buffer else chosen
            e.delta.copy_(np.zeros(far.shape, np.float32))


def stream(n: int = 11) -> Batches:
    return Batches(list(tokens(n)), 2, seed=3)


def lora() -> tuple:
    model = gpt(dropout=0.1)
    attach(model, LoRA(r=2, dropout=0.1))
    return model, stream(), dict(steps=14, optimizer=AdamW(0.02), schedule=cosine_schedule(warmup=3), accumulate=2)


def full() -> tuple:
    return gpt(dropout=0.1), stream(), dict(steps=14, optimizer=AdamW(0.01))


def phases() -> tuple:
    model = gpt(dropout=0.1)
    attach(model, Ticket())
    return model, stream(), dict(steps=14, optimizer=AdamW(0.01), schedule=cosine_schedule(warmup=2))


def phases_with_a_mask_on_the_tensor() -> tuple:
    model = gpt()
    attach(model, Ticket(buffer=False))
    return model, stream(), dict(steps=14, optimizer=AdamW(0.01))


def early_stopping() -> tuple:
    model = bert(classes=CLASSES)
    attach(model, LoRA(r=2))
    batches = [{"ids": tokens(4, seed=s), "labels": tokens(4, seed=s)[:, 0] % CLASSES} for s in range(3)]
    return model, batches, dict(steps=60, optimizer=AdamW(0.02), evaluate=lambda: {"loss": overshoot(model)}, evaluate_every=2, patience=3)


def overshoot(model: Any) -> float:
    "Falls while B grows towards a length, and rises when it has outgrown it."
    return abs(0.3 - float(np.linalg.norm(host(model.blocks[0].attn.q.edits["lora"].B))))


def a_list_of_batches() -> tuple:
    model = gpt(dropout=0.1)
    attach(model, LoRA(r=2), name="base")                                        # a name that a checkpoint must not trip over
    return model, [tokens(2, seed=s) for s in range(5)], dict(steps=14, optimizer=SGD(0.1, momentum=0.9), accumulate=2)


RECIPES: dict[str, Callable[[], tuple]] = {f.__name__: f for f in (
    lora, full, phases, phases_with_a_mask_on_the_tensor, early_stopping, a_list_of_batches)}


class Killed(BaseException):
    "Stands for SIGKILL: nobody catches it."


def do(recipe: str, out: Path | None, resume: bool = True, at: Callable[[int], None] = lambda n: None, **other: Any) -> tuple[Any, History]:
    "Run a recipe from new objects; `at` is called in every step with its number in this process."
    model, batches, asked = RECIPES[recipe]()
    schedule, count = asked.pop("schedule", lambda t, T: 1.0), [0]

    def watched(t: int, T: int) -> float:
        count[0] += 1
        at(count[0])
        return schedule(t, T)
    history = fit(model, batches, schedule=watched, out=out, resume=resume, **{"save_every": 3, "progress": False, "seed": 7, **asked, **other})
    return model, history


def kill_at(n: int) -> Callable[[int], None]:
    def at(step: int) -> None:
        if step == n:
            raise Killed
    return at


def left(folder: Path) -> tuple[dict, dict]:
    "What a run wrote: values, moments, the best; losses, evaluations, data order, random state."
    return read_tensors(folder / "checkpoint.safetensors")


def check_resume(recipe: str, folder: Path, moments: list[int]) -> None:
    "Killed in the n-th step of each try, and resumed, a run ends bitwise where one ends that never stopped."
    model, history = do(recipe, folder / "straight")
    for n in moments:
        with pytest.raises(Killed):
            do(recipe, folder / "killed", at=kill_at(n))
    again, other = do(recipe, folder / "killed")
    assert history == other, "the history differs"
    (a, facts), (b, others) = left(folder / "straight"), left(folder / "killed")
    assert same(a, b), f"differ: {[n for n in a if n not in b or not np.array_equal(a[n], b[n])][:5]}"
    assert facts == others
    assert same(numbers(model), numbers(again))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_and_resumed_run_is_bitwise_one_that_never_stopped(recipe, tmp_path):
    check_resume(recipe, tmp_path / "a", [2, 5, 1, 4])
    draw = random.Random(recipe)
    check_resume(recipe, tmp_path / "b", [draw.randint(1, 5) for _ in range(3)])


@pytest.mark.parametrize("what, recipe", [
    ("the moments", "lora"), ("the random state", "lora"), ("the data", "lora"), ("the step", "lora"), ("the data", "a_list_of_batches"),
    ("the values", "full"), ("the moments", "phases"), ("the masks", "phases"), ("the masks", "phases_with_a_mask_on_the_tensor"),
    ("the best", "early_stopping")])
def test_a_resume_that_forgets_something_is_caught(what, recipe, tmp_path, monkeypatch):
    right = train.loop.Run.load_state_dict

    def forgetful(self: train.loop.Run, arrays: dict, facts: dict) -> None:
        rng = self.rng.bit_generator.state
        if what == "the data":
            facts = facts | {"batches": self.stream.state_dict()}
        if what == "the values":
            arrays = arrays | train.checkpoint.copy_values(self)
        if what == "the masks":
            arrays = {k: v for k, v in arrays.items() if not k.startswith("mask/")}
            facts = facts | {"shared_masks": {}}
        if what == "the moments":
            arrays = {k: v for k, v in arrays.items() if not k.startswith("optimizer/")}
        right(self, arrays, facts)
        if what == "the random state":
            self.rng.bit_generator.state = rng
        if what == "the best":
            self.best = None
        if what == "the step":
            self.t += 1
    monkeypatch.setattr(train.loop.Run, "load_state_dict", forgetful)
    stops = {"early_stopping": [11], "phases": [9, 4], "phases_with_a_mask_on_the_tensor": [9, 4]}
    with pytest.raises(AssertionError):
        check_resume(recipe, tmp_path, stops.get(recipe, [5, 3]))


def test_early_stopping_in_that_recipe_does_stop_early_and_put_the_best_back(tmp_path):
    model, history = do("early_stopping", tmp_path)
    losses = [m["loss"] for _, m in history.evaluations]
    best = int(np.argmin(losses))
    assert history.stopped and len(history.losses) < 60 and 0 < best < len(losses) - 1 and len(losses) - 1 - best == 3
    arrays, facts = left(tmp_path)
    assert facts["history"]["stopped"] == history.stopped
    assert overshoot(model) == losses[best] != losses[-1]
    again, same_history = do("early_stopping", tmp_path)                         # resuming a finished run does nothing
    assert same_history == history and same(numbers(again), numbers(model))


def child(recipe: str, out: Path, suicide: str = "") -> subprocess.Popen:
    "The same run in a process of its own.  suicide: 'fsync 2' = SIGKILL instead of the second call of os.fsync."
    env = {**os.environ, "PYTHONPATH": str(Path(tinyft.__file__).parents[1]), "TINYFT_BACKEND": array.backend(), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, recipe, str(out), suicide], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def after(process: subprocess.Popen, lines: int, sig: int | None = None) -> tuple[int, str]:
    "Wait until the child took so many steps; send a signal, at whatever it is doing then; its exit status and what it complained of."
    for _ in range(lines):
        process.stdout.readline()
    if sig is not None:
        process.send_signal(sig)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.slow
def test_a_process_killed_at_random_moments_and_resumed_ends_bitwise_the_same(tmp_path):
    do("lora", tmp_path / "straight")
    draw, stopped = random.Random(1), []
    for suicide in ("", "", "fsync 1", "", "replace 2"):                         # fsync: in the midst of a write;  replace: written, not yet moved
        lines = 99 if suicide else draw.randint(1, 4)
        stopped.append(after(child("lora", tmp_path / "killed", suicide), lines, None if suicide else signal.SIGKILL)[0])
    assert stopped == [-signal.SIGKILL] * 5
    assert left(tmp_path / "killed")[1]["done"] < 14, "killed too late to show anything"
    assert list((tmp_path / "killed").glob(".*")), "a kill in the middle of a write leaves its half behind"
    code, err = after(child("lora", tmp_path / "killed"), 0)
    assert code == 0, err
    (a, facts), (b, others) = left(tmp_path / "straight"), left(tmp_path / "killed")
    assert same(a, b) and facts == others
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["checkpoint.safetensors"]      # and the next run sweeps it up


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_writes_the_state_and_the_run_goes_on_bitwise(tmp_path):
    do("lora", tmp_path / "straight")
    code, err = after(child("lora", tmp_path / "stopped"), 2, signal.SIGINT)
    assert code in (-signal.SIGINT, 130) and "KeyboardInterrupt: stopped after step" in err
    done = left(tmp_path / "stopped")[1]["done"]
    assert done >= 2 and f"after step {done} of 14; fit(..., resume=True) goes on" in err
    do("lora", tmp_path / "stopped")
    (a, facts), (b, others) = left(tmp_path / "straight"), left(tmp_path / "stopped")
    assert same(a, b) and facts == others


def test_ctrl_c_in_a_step_is_answered_after_it_and_a_second_one_at_once(tmp_path):
    def press(times: int) -> Callable[[int], None]:
        return lambda n: [os.kill(os.getpid(), signal.SIGINT) for _ in range(times)] if n == 4 else None
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="after step 4 of 14"):
        do("lora", tmp_path / "once", at=press(1))
    assert left(tmp_path / "once")[1]["done"] == 4
    with pytest.raises(KeyboardInterrupt):
        do("lora", tmp_path / "twice", at=press(2))
    assert left(tmp_path / "twice")[1]["done"] == 3 and signal.getsignal(signal.SIGINT) is before


# ── checkpoints that do not fit, are damaged, or cannot be written ───────────────────────────────────────────────────
def another(**other: Any) -> Callable[[Path], None]:
    return lambda out: do("lora", out, **other)


def another_method(out: Path) -> None:
    model = gpt(dropout=0.1)
    attach(model, LoRA(r=2, alpha=99, dropout=0.1))
    fit(model, stream(), 14, AdamW(0.02), out=out, resume=True, accumulate=2, progress=False)


def another_model(out: Path) -> None:
    model = GPT(GPTConfig(V, P, 24, 2, 3))
    attach(model, LoRA(r=2, dropout=0.1))
    fit(model, stream(), 14, AdamW(0.02), out=out, resume=True, accumulate=2, progress=False)


def other_data(batches: Any) -> Callable[[Path], None]:
    def go(out: Path) -> None:
        model, _, asked = lora()
        fit(model, batches, out=out, resume=True, progress=False, **asked)
    return go


@pytest.mark.parametrize("go, words", [
    (another(steps=15), "its steps: 14; here: 15"), (another(accumulate=1), "its accumulate: 2; here: 1"),
    (another(optimizer=AdamW(0.03)), r"its optimizer: AdamW\(lr=0.02"), (another(optimizer=tinyft.Adam(0.02)), "here: Adam"),
    (another(optimizer=SGD(0.02)), "here: SGD"), (another(clip=None), "its clip: 1.0"), (another_method, "its methods: lora: LoRA.*alpha=99"),
    (another_model, "another run: .*blocks.0.attn.q.edits.lora.A"), (other_data([tokens()]), "another kind of batches"),
    (other_data(stream(12)), "examples 12, got 11")])
def test_resuming_another_run_is_refused_naming_the_difference(go, words, tmp_path):
    with pytest.raises(Killed):
        do("lora", tmp_path, at=kill_at(8))
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match=words) as e:
        go(tmp_path)
    assert "\n" not in str(e.value)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_refused_resume_leaves_the_model_as_it_was(tmp_path):
    do("full", tmp_path)
    model, batches, asked = full()
    before = numbers(model)
    with pytest.raises(ValueError, match="here: SGD"):
        fit(model, batches, 14, SGD(1.0), out=tmp_path, resume=True, progress=False)
    assert same(numbers(model), before)


def test_a_damaged_checkpoint_gives_one_sentence(tmp_path):
    do("full", tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    good = path.read_bytes()
    for cut in (0, 5, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged") as e:
            do("full", tmp_path)
        assert "\n" not in str(e.value)
    for place in (3, 60, len(good) // 2, len(good) - 1):                         # one bit, in the header and in the numbers
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1:])
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged"):
            do("full", tmp_path)
    write_tensors(path, {"x": np.zeros(3)}, {"sum": "of something else"})
    with pytest.raises(ValueError, match="no checkpoint of fit"):
        do("full", tmp_path)


def full_disk(*args: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["fsync", "replace", "write"])
def test_a_full_disk_leaves_the_old_checkpoint_whole_and_no_rubbish(where, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        do("lora", tmp_path, at=kill_at(5))
    path = tmp_path / "checkpoint.safetensors"
    before = path.read_bytes()
    if where == "write":                                                         # the system itself stops the write half way
        resource = pytest.importorskip("resource", reason="needs POSIX limits")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    else:
        monkeypatch.setattr(os, where, full_disk)
    try:
        with pytest.raises(OSError, match=r"could not write .*checkpoint\.safetensors.* what was there before is untouched"):
            do("lora", tmp_path)
    finally:
        monkeypatch.undo()
        if where == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    do("lora", tmp_path)
    do("lora", tmp_path / "straight")
    assert same(left(tmp_path)[0], left(tmp_path / "straight")[0])


# ── the order of a step ──────────────────────────────────────────────────────────────────────────────────────────────
class Recorder(Edit):
    def __init__(self, log: list, passing: Callable):
        self.w, self._log, self._passing = Parameter(array.asarray([1.0])), log, passing

    def after(self, x: Any, y: Any, ctx: Context) -> Any:
        self._log.append("forward")
        return self._passing(y * self.w)


class Recording(Method):
    "Writes down when it is called, and what it sees."
    targets = "norm"

    def __init__(self, log: list):
        self.log = log

        @op("... -> ...")
        def passing(x):
            return x, (lambda g: log.append("backward") or g,)
        OPS.pop("passing")
        self.passing = passing

    def edit(self, path: str, module: Any, rng: np.random.Generator) -> Edit:
        return Recorder(self.log, self.passing)

    def begin(self, edits: dict, t: int, T: int, rng: np.random.Generator) -> None:
        assert next(iter(edits.values())).w.grad is None
        self.log.append(f"begin {t} of {T}")

    def penalty(self, edits: dict, model: Any, ctx: Context) -> Any:
        assert ctx.output is not None and ctx.last_hidden_state is not None
        self.log.append("penalty")
        return 0.0

    def step(self, edits: dict, t: int, T: int) -> None:
        assert next(iter(edits.values())).w.grad is not None
        self.log.append(f"step {t} of {T}")


class Spy(Optimizer):
    "Moves by its gradients, and keeps them."

    def __init__(self, log: list, lr: float = 0.01):
        super().__init__(lr, 0.0, None)
        self.log = log

    def start(self, named: dict) -> Spy:
        self.log.append("start")
        return super().start(named)

    def launch_step(self, factor: float = 1.0, clip: float | None = None, loss: Any = None, scale: float = 1.0) -> Any:
        self.gradients = {n: np.array(host(p.grad)) for g in self.groups for n, p in g.tensors.items() if p.grad is not None}
        self.log.append(f"update at {factor} clipped at {clip}")
        return super().launch_step(factor, clip, loss, scale)

    def update(self, group: Any, lr: float) -> None:
        group.w -= lr * group.g


def test_a_step_is_begin_forward_penalty_backward_update_step_and_clear():
    log, model = [], gpt()
    attach(model, Recording(log))
    fit(model, [tokens()], 2, Spy(log), lambda t, T: (t + 1) / T, clip=0.5, accumulate=2, progress=False)
    once = ["forward", "penalty", "backward"] * 2
    assert log == ["start", "begin 0 of 2", *once, "update at 0.5 clipped at 0.5", "step 0 of 2",
                   "begin 1 of 2", *once, "update at 1.0 clipped at 0.5", "step 1 of 2"]
    assert all(p.grad is None for p in model.parameters()) and not model.training


def test_every_phase_counts_its_own_steps_and_starts_with_a_fresh_optimiser():
    seen: list = []

    class Both(Ticket):
        def begin(self, edits: dict, t: int, T: int, rng: np.random.Generator) -> None:
            optimizer = seen[0]
            fresh = not any(host(m).any() for g in optimizer.groups for m in g.moments)
            seen.append((t, T, fresh, optimizer.t, next(iter(edits.values())).delta.mask is not None))
    model = gpt()
    attach(model, Both(), name="both")
    seen.append(AdamW(0.01))
    history = fit(model, stream(), 7, seen[0], progress=False)
    assert seen[1:] == [(0, 4, True, 0, False), (1, 4, False, 1, False), (2, 4, False, 2, False), (3, 4, False, 3, False),
                        (0, 3, True, 0, True), (1, 3, False, 1, True), (2, 3, False, 2, True)]
    assert len(history.losses) == 7
    moved = {p: host(e.delta) != 0 for p, e in tinyft.edit.attached(model)[0].edits.items()}
    masks = {p: host(e.mu) for p, e in tinyft.edit.attached(model)[0].edits.items()}
    assert all((moved[p] <= masks[p]).all() and 0 < moved[p].sum() <= 0.31 * masks[p].size + 1 for p in masks)
    attach(model, Both(), name="again")
    with pytest.raises(ValueError, match="at most one method with several training phases, got both, again"):
        fit(model, stream(), 7, progress=False)


# ── accumulation ─────────────────────────────────────────────────────────────────────────────────────────────────────
def uneven_text() -> tuple[Any, list[dict]]:
    return gpt().to(dtype=np.float64), [padded([8, 8, 8], seed=1), padded([3, 2, 2], seed=2), padded([5, 8, 2], seed=3)]


def uneven_classes() -> tuple[Any, list[dict]]:
    rare = np.array([0.2, 1.0, 5.0])
    return bert(classes=CLASSES).to(dtype=np.float64), [
        {"ids": tokens(2, seed=s), "labels": np.array(y), "class_weight": rare} for s, y in enumerate(([0, 0], [2, 2], [1, 2]))]


def gradients(model: Any, batches: list[dict], accumulate: int) -> dict[str, np.ndarray]:
    spy = Spy([], lr=1e-30)
    history = fit(model, batches, 1, spy, accumulate=accumulate, clip=None, progress=False)
    return spy.gradients | {"loss": np.array(history.losses)}


def micro_is_macro(make: Callable[[], tuple]) -> None:
    "The gradient, and the loss reported, of k batches of unequal size are those of one large batch."
    model, parts = make()
    whole = {k: parts[0][k] if k == "class_weight" else np.concatenate([p[k] for p in parts]) for k in parts[0]}
    one, many = gradients(model, [whole], 1), gradients(model, parts, len(parts))
    assert one.keys() == many.keys() and all(np.allclose(g, many[n], rtol=1e-9, atol=1e-13) for n, g in one.items())


@pytest.mark.parametrize("make", [uneven_text, uneven_classes], ids=lambda f: f.__name__)
def test_accumulated_micro_batches_have_the_gradient_of_one_large_batch(make):
    micro_is_macro(make)


@pytest.mark.parametrize("make", [uneven_text, uneven_classes], ids=lambda f: f.__name__)
@pytest.mark.parametrize("weight", [lambda q: 1.0, lambda q: float(q.ids.size), lambda q: float(len(q.ids))], ids=["means", "places", "rows"])
def test_a_mean_of_means_is_caught(make, weight, monkeypatch):
    right = train.batch.read_batch
    monkeypatch.setattr(train.batch, "read_batch", lambda b: (lambda q: replace(q, weight=weight(q)))(right(b)))
    with pytest.raises(AssertionError):
        micro_is_macro(make)


# ── what a batch asks ────────────────────────────────────────────────────────────────────────────────────────────────
def logp(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_bare_ids_mean_predict_the_next_token_and_padding_asks_nothing():
    model, b = gpt(), padded([8, 3, 1, 5])
    z = logp(host(model(b["ids"], mask=b["mask"])))
    want = -np.mean([z[i, t, b["ids"][i, t + 1]] for i, n in enumerate([8, 3, 1, 5]) for t in range(n - 1)])
    q = read_batch(b)
    assert float(compute_loss(model, q)[1].data) == pytest.approx(want, rel=1e-5) and q.weight == 7 + 2 + 0 + 4
    wrong = -np.mean([z[i, t, b["ids"][i, t + 1]] for i in range(4) for t in range(7)])
    assert want != pytest.approx(wrong, rel=1e-4)
    bare = read_batch(tokens())
    assert np.array_equal(bare.ids, tokens()[:, :-1]) and np.array_equal(bare.labels, tokens()[:, 1:].ravel()) and bare.logit_positions is None


@pytest.mark.parametrize("make", [gpt, bert])
def test_the_head_run_only_where_something_is_asked_gives_the_loss_and_gradients_of_all_logits(make):
    model, b = make().to(dtype=np.float64), padded([8, 5, 7, 6])
    labels = np.where(np.random.default_rng(1).random((4, 8)) < 0.3, b["ids"], -100)
    q = read_batch({**b, "labels": labels})
    assert q.logit_positions is not None and len(q.logit_positions) == (labels != -100).sum() == q.weight < labels.size / 2

    def run(whole: bool) -> tuple[float, dict]:
        model.zero_grad()
        if whole:
            loss = ops.cross_entropy(model(b["ids"], mask=b["mask"]), array.asarray(labels), ignore_index=-100)
        else:
            loss = compute_loss(model, q)[1]
        loss.backward()
        return float(loss.data), {n: np.array(host(p.grad)) for n, p in model.named_parameters().items() if p.grad is not None}
    (few, g), (full, h) = run(False), run(True)
    assert few == pytest.approx(full, rel=1e-12) and g.keys() == h.keys() and all(np.allclose(v, h[n], rtol=1e-9, atol=1e-14) for n, v in g.items())
    moved = replace(q, logit_positions=(q.logit_positions + 1) % labels.size)                              # asked one place late
    assert float(compute_loss(model, moved)[1].data) != pytest.approx(full, rel=1e-4)


def test_an_all_true_mask_changes_nothing():
    model, every = gpt(), np.ones((4, 8), bool)
    plain, masked = read_batch(tokens()), read_batch({"ids": tokens(), "mask": every})
    assert plain.weight == masked.weight and np.array_equal(plain.labels, masked.labels)
    assert float(compute_loss(model, plain)[1].data) == float(compute_loss(model, masked)[1].data)
    assert np.allclose(host(model(tokens())), host(model(tokens(), mask=every)), rtol=1e-6, atol=1e-7)      # nor when the model sees it
    assert not np.allclose(host(model(tokens())), host(model(tokens(), mask=every & (np.arange(8) > 1))), atol=1e-3)


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────
def check_evaluation(measure: Callable[[Any, list], dict]) -> None:
    "The loss is the mean over tokens, not over batches; the perplexity is e to it."
    model, batches = gpt(), [padded([8, 8], seed=1), padded([2, 3], seed=2), padded([4, 2], seed=3)]
    for p in model.parameters():
        p.copy_(host(p) * 6)                                                     # losses far apart
    each = []
    for b in batches:
        z = logp(host(model(b["ids"], mask=b["mask"])))
        places = [(i, t, b["ids"][i, t + 1]) for i in range(2) for t in range(int(b["mask"][i].sum()) - 1)]
        each.append([(-z[i, t, y], z[i, t].argmax() == y) for i, t, y in places])
    flat = np.array([x for e in each for x in e])
    got = measure(model, batches)
    assert got["loss"] == pytest.approx(flat[:, 0].mean(), rel=1e-5) and got["perplexity"] == pytest.approx(math.exp(flat[:, 0].mean()), rel=1e-4)
    assert got["accuracy"] == pytest.approx(flat[:, 1].mean())


def mean_of_batches(model: Any, batches: list) -> dict:
    each = [evaluate(model, [b]) for b in batches]
    return {k: float(np.mean([e[k] for e in each])) for k in each[0]}


def test_the_loss_is_weighed_by_tokens_and_the_perplexity_is_that_of_the_mean():
    check_evaluation(evaluate)
    for wrong in (mean_of_batches, lambda m, bs: evaluate(m, bs) | {"perplexity": mean_of_batches(m, bs)["perplexity"]}):
        with pytest.raises(AssertionError):
            check_evaluation(wrong)
    model = gpt()
    assert perplexity(model, [tokens()]) == evaluate(model, [tokens()])["perplexity"]


def test_macro_f1_counts_every_class_the_same_and_leaves_out_rows_that_are_not_asked():
    model, ids = bert(classes=CLASSES), tokens(12)
    guess = host(model(ids)).argmax(-1)
    truth = guess.copy()
    truth[:3] = (guess[:3] + 1) % CLASSES
    asked = np.where(np.arange(12) >= 10, -100, truth)
    t, g = truth[:10], guess[:10]
    f1 = [2 * ((t == c) & (g == c)).sum() / ((t == c).sum() + (g == c).sum()) for c in range(CLASSES) if ((t == c) | (g == c)).any()]
    got = evaluate(model, [{"ids": ids[:7], "labels": asked[:7]}, {"ids": ids[7:], "labels": asked[7:]}])
    assert got["macro_f1"] == pytest.approx(np.mean(f1)) and got["accuracy"] == pytest.approx((t == g).mean())
    assert "macro_f1" not in evaluate(gpt(), [ids])


def test_evaluation_leaves_the_mode_of_every_part_as_it_was_and_drops_nothing_out():
    model = gpt(dropout=0.5).train()
    model.blocks[0].eval()
    before = [m.training for m in model.modules()]
    assert evaluate(model, [tokens()]) == evaluate(model.train(), [tokens()])
    model.blocks[0].eval()
    evaluate(model, [tokens()])
    with pytest.raises(IndexError):
        evaluate(model, [tokens() + V])
    assert [m.training for m in model.modules()] == before and any(before) and not all(before)
    assert all(p.grad is None for p in model.parameters())


def test_an_endless_stream_is_evaluated_once():
    assert evaluate(gpt(), stream()) == evaluate(gpt(), list(stream().once()))


# ── early stopping, history ──────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("watch, scores, best, steps", [
    ("loss", [3, 2, 4, 5, 1], 1, 4), ("valid_loss", [3, 2, 4, 5, 1], 1, 4), ("accuracy", [3, 2, 4, 5, 1, 2], 3, 6),
    ("loss", [math.nan, 2, 3, math.nan, 0], 1, 4), ("perplexity", [5, 5, 5, 1], 0, 3)])
def test_training_stops_after_patience_and_the_best_state_is_put_back(watch, scores, best, steps):
    model, states, given = gpt(), [], iter(scores)

    def judge() -> dict:
        assert not model.training
        states.append(numbers(model))
        return {watch: np.float32(next(given)), "other": 0}
    history = fit(model, [tokens()], 20, AdamW(0.01), evaluate=judge, evaluate_every=3, patience=2, monitor=watch, progress=False)
    assert len(history.evaluations) == steps and history.evaluations[0][0] == 3 and len(history.losses) == 3 * steps and watch in history.stopped
    assert same(numbers(model), states[best]) and not same(states[best], states[-1])


def test_without_patience_evaluations_are_only_written_down():
    model, count = gpt(), iter(range(100))
    history = fit(model, [tokens()], 6, AdamW(0.01), evaluate=lambda: {"loss": next(count)}, evaluate_every=2, progress=False)
    assert history.evaluations == [(2, {"loss": 0}), (4, {"loss": 1}), (6, {"loss": 2})] and not history.stopped and len(history.losses) == 6


def test_history_holds_the_loss_of_every_step_and_training_lowers_it():
    model = gpt()
    first = float(compute_loss(model, read_batch(tokens()))[1].data)
    history = fit(model, [tokens()], 30, AdamW(0.01), progress=False)
    assert len(history.losses) == 30 and history.losses[0] == pytest.approx(first) and history.losses[-1] < first / 2
    assert all(type(v) is float for v in history.losses)
    assert fit(model, [tokens()], 0, progress=False) == History()


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
def labelled(labels: Any, **more: Any) -> dict:
    return {"ids": tokens(), "labels": np.asarray(labels), **more}


BAD = {
    "nothing to predict": (gpt, labelled(np.full((4, 8), -100)), ValueError, r"shape \(4, 8\) has nothing to predict"),
    "all padding": (gpt, padded([1, 1, 0]), ValueError, "has nothing to predict"),
    "one token": (gpt, tokens(4, 1), ValueError, "has nothing to predict"),
    "label too large": (gpt, labelled(np.full((4, 8), V)), IndexError, f"label {V} is outside the {V} classes"),
    "label below zero": (gpt, labelled(np.full((4, 8), -7)), IndexError, "label -7 is outside"),
    "class too large": (lambda: bert(classes=CLASSES), labelled([0, 1, 2, 3]), IndexError, "label 3 is outside the 3 classes"),
    "labels of another shape": (gpt, labelled(np.zeros((4, 7), int)), ValueError, r"wants labels of shape \(4,\).* or \(4, 8\)"),
    "labels that are no integers": (gpt, labelled(np.zeros((4, 8))), TypeError, "wants integer labels, got float64"),
    "classes for a language model": (gpt, labelled([0, 1, 2, 0]), ValueError, "got 4 labels and 32 rows.*one label per token"),
    "a class for one row of a language model": (gpt, {"ids": tokens(1), "labels": np.array([1])}, ValueError, "got 1 labels and 8 rows"),
    "tokens for a classifier": (lambda: bert(classes=CLASSES), labelled(np.ones((4, 8), int)), ValueError, "got 32 labels and 4 rows.*one label per sequence"),
    "as many tokens as rows": (lambda: bert(classes=CLASSES), labelled(np.where(np.arange(8) == 2, [[1]] * 4, -100)), ValueError, "one label per sequence"),
    "a model without a head": (lambda: BERT(BERTConfig(V, P, 2, C, 1, 3), head=None), labelled(np.ones((4, 8), int)), ValueError, "has no head"),
    "too long": (gpt, tokens(2, P + 2), ValueError, f"sequence of {P + 1} tokens is longer than the model's {P} positions"),
    "id too large": (gpt, tokens() + V, IndexError, f"outside the vocabulary of {V}"),
    "id below zero": (gpt, tokens() - V, IndexError, "token id -.* is outside"),
    "ids that are no integers": (gpt, labelled(np.ones((4, 8), int)) | {"ids": tokens() * 1.0}, TypeError, "token ids are integers"),
    "one row without its axis": (gpt, tokens()[0], ValueError, r"ids of shape \(B, T\).* got \(8,\)"),
    "a mask of another shape": (gpt, {"ids": tokens(), "mask": np.arange(9) < 4}, ValueError, r"wants a mask of the shape of its ids, \(4, 8\); got \(9,\)"),
    "an all-true mask of another shape": (gpt, {"ids": tokens(), "mask": np.ones((4, 9), bool)}, ValueError, r"wants a mask of the shape of its ids.* got \(4, 9\)"),
    "types of another shape": (bert, labelled(np.ones((4, 8), int), token_type_ids=np.zeros((4, 7), int)), ValueError, r"wants a token_type_ids .* got \(4, 7\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_batches_get_one_clear_sentence_and_change_nothing(name):
    make, batch, kind, words = BAD[name]
    model = make()
    before = numbers(model)
    for go in (lambda: fit(model, [batch], 3, progress=False), lambda: evaluate(model, [batch])):
        with pytest.raises(kind, match=words) as e:
            go()
        assert "\n" not in str(e.value)
    assert same(numbers(model), before) and not model.training and all(p.grad is None for p in model.parameters())


def nothing_trains() -> None:
    model = gpt()
    for p in model.parameters():
        p.requires_grad = False
    fit(model, [tokens()], 3, progress=False)


@pytest.mark.parametrize("go, kind, words", [
    (nothing_trains, ValueError, "nothing trains"),
    (lambda: fit(gpt(), [], 3, progress=False), ValueError, "batches have come to an end"),
    (lambda: fit(gpt(), iter([tokens()]), 3, progress=False), ValueError, "batches have come to an end: give a list"),
    (lambda: fit(gpt(), [tokens()], -1, progress=False), ValueError, "steps >= 0"),
    (lambda: fit(gpt(), [tokens()], 1, accumulate=0, progress=False), ValueError, "accumulate >= 1"),
    (lambda: evaluate(gpt(), []), ValueError, "no batches"),
    (lambda: fit(gpt(), [tokens()], 1, evaluate=lambda: {"f1": 1}, evaluate_every=1, patience=1, progress=False), KeyError, "monitor 'loss', got f1")],
    ids=["nothing trains", "no batches", "one-shot", "steps", "accumulate", "evaluate", "watch"])
def test_bad_arguments_get_one_clear_sentence(go, kind, words):
    with pytest.raises(kind, match=words):
        go()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_raises_diverged_naming_the_step_and_spoils_nothing(bad, tmp_path):
    class Spoil(Method):
        targets = "norm"

        def trains(self, model: Any) -> set[str]:
            return set(model.named_parameters())

        def begin(self, edits: dict, t: int, T: int, rng: np.random.Generator) -> None:
            self.t = t

        def penalty(self, edits: dict, model: Any, ctx: Context) -> Any:
            if self.t < 4:
                return 0.0
            w = (model.norm.weight * model.norm.weight).sum() * 0.0
            return w * math.nan if bad == "loss" else ops.sqrt(w)                # √0 has no derivative
    model, trail = gpt(), []
    attach(model, Spoil())

    def keep(t: int, T: int) -> float:
        trail.append(numbers(model))
        return 1.0
    with pytest.raises(Diverged, match=f"{'the loss is nan' if bad == 'loss' else 'norm is nan'} at step 5"):
        fit(model, [tokens()], 9, AdamW(0.01), keep, out=tmp_path, save_every=1, progress=False)
    now, facts = numbers(model), left(tmp_path)[1]
    assert facts["done"] == 4 and all(np.isfinite(v).all() for v in now.values()) and all(np.isfinite(v).all() for v in left(tmp_path)[0].values())
    assert same(now, trail[-1]) and not model.training


def test_progress_is_silent_when_nobody_watches(capsys):
    fit(gpt(), [tokens()], 2, progress=True)
    assert capsys.readouterr() == ("", "")


if __name__ == "__main__":
    recipe, folder, suicide = sys.argv[1:]
    if suicide:
        name, count = suicide.split()
        real, calls = getattr(os, name), iter(range(1, 1000))

        def deadly(*args: Any) -> Any:
            return os.kill(os.getpid(), signal.SIGKILL) if next(calls) == int(count) else real(*args)
        setattr(os, name, deadly)
    do(recipe, Path(folder), at=lambda n: print(n, flush=True))
