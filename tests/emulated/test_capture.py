"""A captured step is the step: its losses, replayed, are those of running it; and what cannot be replayed is refused."""
from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import dataclass

import cupy as cp
import fake_gpu
import numpy as np
import pytest

import tinyft as ft
from tinyft import GPT, SGD, AdamW, CannotCapture, GPTConfig, array, dispatch, edit, kernels, ops
from tinyft.kernels.cuda import capture, casts, gemm, optimizer
from tinyft.tensor import Tensor
from tinyft.train.batch import next_tokens

STEPS = 9
BATCHES = np.random.default_rng(0).integers(0, 50, (STEPS, 3, 11))


def loss_of(model, ids, labels, rng=None):
    z = model(ids, rng=rng)
    return ops.cross_entropy(z, array.put_like(labels, z.data))                  # of a captured step they are there already


class Training:
    "A model, its optimiser, and a step of it."

    def __init__(self, dropout=0.0, method=None, how=None, dtype=None, **more):
        self.model = GPT(GPTConfig(50, 16, 24, 2, 4, dropout=dropout))
        if dtype:
            self.model.to(dtype=dtype)
        if method:
            ft.attach(self.model, method)
        self.model.train()
        self.how = how
        self.opt, self.rng = AdamW(0.01, **more).start(edit.trained(self.model)), np.random.default_rng(3)

    def step(self, ids, labels, factor, rng):
        with ft.autocast(self.how or "bfloat16", enabled=self.how is not None):
            loss = loss_of(self.model, ids, labels, rng)
        loss.backward()
        self.opt.step(factor, clip=1.0)
        self.opt.zero_grad()
        return loss

    def go(self, capturing, batches=BATCHES, schedule=lambda t: 1 - t / 20):
        "The losses of all steps, and the weights after them."
        step = ft.capture(self.step) if capturing else self.step
        losses = [step(ids[:, :-1], next_tokens(ids), schedule(t), self.rng) for t, ids in enumerate(batches)]
        return np.array([float(loss.data) for loss in losses]), np.concatenate([array.asnumpy(p.data).ravel() for p in self.model.parameters()])


def as_if_run(make=Training, **how):
    "Losses and weights to the bit, and the optimiser's count."
    (want, weights), (got, same) = make().go(False, **how), (captured := make()).go(True, **how)
    assert np.isfinite(want).all() and np.array_equal(got, want), (got, want)
    assert np.array_equal(same, weights) and captured.opt.t == len(want)


KINDS = {"plain": dict(), "dropout": dict(dropout=0.2), "lora": dict(method=ft.LoRA(r=2)), "lora, dropout": dict(method=ft.LoRA(r=2, dropout=0.3)),
         "bitfit": dict(method=ft.BitFit()), "decay": dict(weight_decay=0.3),
         "autocast": dict(how="bfloat16", dropout=0.2), "autocast, lora": dict(how="bfloat16", method=ft.LoRA(r=2)),
         "16 bits": dict(dtype="bfloat16"), "lora over 16 bits": dict(dtype="bfloat16", method=ft.LoRA(r=2), how="bfloat16")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_is_the_step(kind):
    as_if_run(lambda: Training(**KINDS[kind]))


def test_a_replay_is_one_word_of_the_host():
    training = Training()
    step = ft.capture(training.step)
    for ids in BATCHES[:4]:
        step(ids[:, :-1], next_tokens(ids), 0.5, None)
    fake_gpu.reset()
    step(BATCHES[5][:, :-1], next_tokens(BATCHES[5]), 0.4, None)
    c = fake_gpu.counts()
    assert c.graphs == 1 and c.waits == c.d2h == 0 and c.h2d == 3                # ids, labels, rates
    assert c.mallocs == 0


def test_other_shapes_make_another_graph_and_ever_other_ones_are_refused():
    batches = [BATCHES[i][:, :[11, 8][i % 2]] for i in range(STEPS)]
    as_if_run(batches=batches)
    step = ft.capture(lambda x: x * 2)
    with pytest.raises(CannotCapture, match="ever other shapes"):
        for n in range(1, 20):
            step(np.ones(n, np.float32))


def test_arguments_may_be_trees_and_results_are_copies():
    step = ft.capture(lambda batch, scale: {"y": batch["x"] * scale, "z": (Tensor(batch["x"]), None)})
    out = [step({"x": np.full(3, i, np.float32), "name": "a"}, np.float32([i])) for i in range(6)]
    assert [float(o["y"][0]) for o in out] == [i * i for i in range(6)] and [float(o["z"][0].data[1]) for o in out] == list(range(6))
    assert out[0]["z"][1] is None


def test_on_numpy_capture_is_the_step_itself():
    array.use("numpy")
    assert ft.capture(len) is len


# ── what must be noticed ─────────────────────────────────────────────────────────────────────────────────────────────
def fault(plant, make=Training, **how):
    "A planted fault, and whether losses or weights show it."
    with pytest.MonkeyPatch.context() as m:
        plant(m)
        with pytest.raises((AssertionError, RuntimeError)):
            as_if_run(make, **how)


def feed_in_the_graphs_own_memory(m):
    "An array made while the graph is noted: earlier kernels of the graph have used its memory."
    def feed(self, f, shape):
        a = cp.empty(shape, np.float32)
        if self.capturing:
            self.feeds.append((a, f))
        else:
            a.set(f().astype(np.float32))
        return a
    m.setattr(capture.Recording, "feed", feed)


def never_fed_again(m):
    right = capture.Recording.record
    m.setattr(capture.Recording, "record", lambda self: (right(self), self.feeds.clear())[0])


def rate_baked_in(m):
    m.setattr(capture.Recording, "now", lambda self, number: (lambda was: lambda: was)(number.now))


def count_on_the_host(m):
    right = optimizer._rates

    def stuck(opt, factor):
        t = opt.t + 1
        rates = right(opt, factor)
        if array.recording is not None and array.recording.capturing:
            (a, f), = array.recording.feeds
            array.recording.feeds[:] = [(a, lambda: (setattr(opt, "t", t - 1), f())[1])]
        return rates
    m.setattr(optimizer, "_rates", stuck)


def keys_baked_in(m):
    m.setattr(capture.Keys, "send", lambda self: None)


def others_memory(m):
    "Memory that others are given too: the graph writes over what they hold, and they over what it holds."
    pool = cp.get_default_memory_pool()
    m.setattr(capture.cupy.cuda, "MemoryPool", lambda: pool)
    held, call = [], capture.Captured.__call__

    def between(self, *args):
        out = call(self, *args)
        held[:] = [cp.full(n, 7.0, np.float32) for n in (64, 500, 2000, 30 * 50) for _ in range(60)]
        return out
    m.setattr(capture.Captured, "__call__", between)


def inputs_of_the_first_call(m):
    right = capture.Recording.put
    m.setattr(capture.Recording, "put", staticmethod(lambda there, a: there if isinstance(there, cp.ndarray) and there.any() else right(there, a)))


@pytest.mark.parametrize("plant", [rate_baked_in, count_on_the_host, others_memory, inputs_of_the_first_call, never_fed_again,
                                   feed_in_the_graphs_own_memory], ids=lambda f: f.__name__)
def test_a_planted_fault_shows(plant):
    fault(plant)


def test_a_key_that_stays_shows():
    fault(keys_baked_in, lambda: Training(0.2))


def test_without_a_workspace_cublas_refuses_while_it_is_captured():
    library = gemm.LIBRARIES[cp.ndarray]
    gemm.matmul(cp.ones((2, 2), np.float32), cp.ones((2, 2), np.float32))

    class Forgetful:
        def __getattr__(self, name):
            return (lambda *a: 0) if name == "cublasSetWorkspace_v2" else getattr(true, name)
    true, library.library = library.library, Forgetful()
    try:
        with pytest.raises(CannotCapture, match="cuBLAS status 3"):
            Training().go(True)
    finally:
        library.library, library.stream = true, None


# ── what is refused, and how ─────────────────────────────────────────────────────────────────────────────────────────
HOST = np.ones(3, np.float32)


def refused(step, *args):
    "What is said of a step that cannot be captured; the message comes at its third call."
    captured, said = ft.capture(step), []
    for _ in range(3):
        try:
            captured(*args)
        except CannotCapture as e:
            said.append(str(e))
    return said


@pytest.mark.parametrize("step, says", [
    (lambda x: x * float(x[0]), r"reads a number from the device.*line \d+: .*float\(x\[0\]\)"),
    (lambda x: x[x > 0], "reads a number from the device"),
    (lambda x: x + cp.asarray(HOST), r"brings host data to the device.*cp.asarray\(HOST\)"),
    (lambda x: x[[0, 1]], "brings host data"),
    (lambda x: x.reshape(1, 3) @ cp.ones((3, 2), np.float32), "CuPy's own product"),
    (lambda x: cp.cuda.get_current_stream().synchronize(), "reads a number from the device, or waits")])
def test_what_a_graph_cannot_hold_is_refused_naming_the_line(step, says):
    said = refused(step, HOST)
    assert len(said) == 1 and re.search(says, said[0]), said


def changed_by_hand():
    "Steps whose numbers change where nobody is told."
    calls = itertools.count(1)

    def rate(self, ids, labels, factor, rng):
        return Training.step(self, ids, labels, 1 / next(calls), rng)

    def key(self, ids, labels, factor, rng):
        return Training.step(self, ids, labels, factor, self.rng)

    def structure(self, ids, labels, factor, rng):
        n = 5 + next(calls) % 2
        return Training.step(self, ids[:, :n], labels[:, :n], factor, rng)

    def gradients(self, ids, labels, factor, rng):
        loss = loss_of(self.model, ids, labels)
        loss.backward()
        self.opt.step()
        return loss

    def number(self, ids, labels, factor, rng):
        return Training.step(self, ids, labels, 0.5 * float(factor), rng)
    return {"rate": (rate, "optimizer.step another number.*1.0 before, 0.5 now"), "key": (key, "the kernel (dropout|uniform) another number"),
            "structure": (structure, "another number|something else"), "gradients": (gradients, "leaves gradients behind"),
            "number": (number, "for optimizer.step")}


@pytest.mark.parametrize("what", changed_by_hand())
def test_what_changes_from_call_to_call_without_being_told_is_refused(what, monkeypatch):
    step, says = changed_by_hand()[what]
    training = Training(0.2 if what == "key" else 0.0)
    monkeypatch.setattr(training, "step", step.__get__(training), raising=False)
    with pytest.raises(CannotCapture, match=says):
        training.go(True)


def test_an_optimiser_that_cannot_is_refused():
    training = Training()
    training.opt = SGD(0.1).start(edit.trained(training.model))
    with pytest.raises(CannotCapture, match="an update by SGD cannot be captured"):
        training.go(True)


def test_a_scale_that_changes_is_refused_and_bfloat16_needs_none():
    training, scaler = Training(), ft.GradScaler()

    def step(ids, labels, factor, rng):
        with ft.autocast("float16"):
            loss = loss_of(training.model, ids, labels)
        scaler.scale(loss).backward()
        scaler.step(training.opt, factor, clip=1.0)
        training.opt.zero_grad()
        return loss
    with pytest.raises(CannotCapture, match="capture a step in bfloat16"):
        ft.capture(step)(BATCHES[0][:, :-1], next_tokens(BATCHES[0]), 1.0, None)


def weights_stay_as_cast(m):
    "Weights that were cast before the step was noted: no kernel of the graph casts them."
    kept = {}

    def cast(a, dtype):
        if array.recording is None:
            return casts.cast_parameter(a, dtype)
        return kept.setdefault(array.address(a), ft.precision.rounded(a, dtype))
    m.setitem(dispatch.KERNELS, (ft.precision.cast_parameter, cp.ndarray), [cast])


def test_weights_are_cast_at_each_replay():
    fault(weights_stay_as_cast, lambda: Training(how="bfloat16"))


@pytest.mark.parametrize("forgotten", [False, True])
def test_what_was_cast_before_a_captured_pass_is_cast_again_inside(forgotten, monkeypatch):
    "autocast opened once, around it all: replays see what weights are now, not what an earlier pass has cast."
    if forgotten:
        monkeypatch.setattr(casts, "forget", lambda: None)
    training, ids = Training(), BATCHES[0]
    with ft.no_grad(), ft.autocast("bfloat16"):
        step = ft.capture(lambda ids: training.model(ids))
        for _ in range(4):
            before = array.asnumpy(step(ids).data)
        for p in training.model.parameters():
            p.copy_(array.asnumpy(p.data) * 1.5)
        now, right = (array.asnumpy(f(ids).data) for f in (step, training.model))
    assert not np.array_equal(before, right) and np.array_equal(now, right) != forgotten


def test_after_a_refusal_training_goes_on_as_if_nothing_had_happened():
    one, other = Training(), Training()
    want, _ = one.go(False, BATCHES[:2])
    bad = ft.capture(lambda *args: float(other.step(*args).data))
    losses = [bad(ids[:, :-1], next_tokens(ids), 1 - t / 20, None) for t, ids in enumerate(BATCHES[:2])]
    with pytest.raises(CannotCapture, match="reads a number"):
        bad(BATCHES[0][:, :-1], next_tokens(BATCHES[0]), 1.0, None)
    assert np.array_equal(losses, want) and other.opt.t == 2 and all(p.grad is None for p in other.model.parameters())
    assert np.array_equal(one.go(False, BATCHES[2:])[0], other.go(False, BATCHES[2:])[0])


def test_a_norm_that_is_not_finite_updates_nothing_in_a_replay_too():
    training = Training()
    weights = lambda: np.concatenate([array.asnumpy(a) for g in training.opt.groups for a in (g.w, *g.moments)])

    def step(ids, labels, scale):
        loss = loss_of(training.model, ids, labels) * Tensor(array.put_like(scale, training.opt.groups[0].w))
        loss.sum().backward()
        norm = training.opt.step(1.0, clip=1.0)
        training.opt.zero_grad()
        return norm
    step = ft.capture(step)
    for t, ids in enumerate(BATCHES[:6]):
        before, bad = weights(), t == 4
        norm = step(ids[:, :-1], next_tokens(ids), np.float32([np.inf if bad else 1]))
        assert np.array_equal(before, weights()) == bad
        if bad:
            with pytest.raises(FloatingPointError, match="norm is"):
                training.opt.check_norm(float(norm))
        else:
            training.opt.check_norm(float(norm))
    assert training.opt.t == 5


# ── AdamW over all tensors at once ───────────────────────────────────────────────────────────────────────────────────
def some_steps(fast, spoil=None):
    "Values, moments, gradients and norms of two steps over more tensors than one launch takes, one large, one masked, one without a gradient."
    rng = np.random.default_rng(0)
    shapes = [(3, 2)] * 155 + [(200, 200)] + [(5,)] * 10
    named = {f"p{i}": Tensor(array.asarray(rng.standard_normal(s).astype(np.float32)), True) for i, s in enumerate(shapes)}
    named["p3"].mask = array.asarray(np.array([[True], [False], [True]]))
    opt, norms = AdamW(0.1, weight_decay=0.1).start(named), []
    for clip in (0.5, None):
        for i, p in enumerate(named.values()):
            p.grad = None if i == 7 else array.asarray(rng.standard_normal(p.shape).astype(np.float32))
        if spoil:
            named["p160"].grad[0] = spoil
        with contextlib.nullcontext() if fast else kernels.definitions():
            norms.append(float(opt.step(clip=clip)))
    numbers = [a for g in opt.groups for a in (g.w, *g.moments)] + [p.grad for n, p in named.items() if p.grad is not None and n != "p3"]
    return opt, np.concatenate([array.asnumpy(a).ravel() for a in numbers]), norms


def test_all_tensors_at_once_is_one_after_the_other(monkeypatch):
    (_, want, norms), (_, got, same) = some_steps(False), some_steps(True)
    assert np.allclose(got, want, rtol=2e-5, atol=1e-6) and np.allclose(same, norms, rtol=1e-6)
    right = optimizer.table
    for wrong in (lambda g, starts=None: right(g, starts and [0, *starts[1:]]), lambda g, starts=None: right(g, starts and starts[1:] + starts[:1]),
                  lambda g, starts=None: right(list(g)[:-1], starts and starts[:-1])):
        with monkeypatch.context() as m:
            m.setattr(optimizer, "table", wrong)
            assert not np.allclose(some_steps(True)[1], want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_moves_nothing(bad):
    with pytest.raises(FloatingPointError, match="norm is"):
        some_steps(True, bad)
    p = Tensor(array.asarray(np.ones((2, 2), np.float32)), True)
    opt = AdamW(0.1).start({"p": p})
    p.grad = array.asarray(np.array([[1, bad], [1, 1]], np.float32))
    norm = opt.launch_step(clip=1.0)
    with pytest.raises(FloatingPointError):
        opt.check_norm(float(norm))
    assert (array.asnumpy(p.data) == 1).all() and opt.t == 0 and not any(array.asnumpy(m).any() for m in opt.groups[0].moments)


def test_after_a_replay_nobody_takes_weights_for_what_they_were():
    "A replay writes to weights and runs no Python: it must say so all the same, to casts kept by autocast and to graphs not yet walked back."
    training, eval_ids = Training(), BATCHES[0]
    with ft.autocast("bfloat16"):
        step = ft.capture(training.step)
        for ids in BATCHES[:5]:
            with ft.no_grad():
                training.model(eval_ids)                                         # casts all weights
            loss = loss_of(training.model, ids[:, :-1], next_tokens(ids))
            step(ids[:, :-1], next_tokens(ids), 1.0, None)
            with ft.no_grad():
                seen = array.asnumpy(training.model(eval_ids).data)
            with ft.no_grad(), ft.autocast("bfloat16"):                          # anew: with no casts to go by
                assert np.array_equal(seen, array.asnumpy(training.model(eval_ids).data))
            with pytest.raises(RuntimeError, match="written in place"):
                loss.backward()


def replaced(training):
    "Other arrays in the places of weights."
    for p in training.model.parameters():
        p.data = p.data * np.float32(0.5)


def moved(training):
    training.model.to("numpy").to("cupy")


def started_again(training):
    training.opt.start(edit.trained(training.model))


@pytest.mark.parametrize("between", [replaced, moved, started_again], ids=lambda f: f.__name__)
@pytest.mark.parametrize("unseen", [False, True])
def test_what_was_put_elsewhere_between_replays_is_seen(between, unseen, monkeypatch):
    if unseen:
        monkeypatch.setattr(capture.Recording, "outdated", lambda self: False)

    def go(capturing):
        training = Training()
        step, losses = ft.capture(training.step) if capturing else training.step, []
        for t, ids in enumerate(BATCHES):
            losses.append(float(step(ids[:, :-1], next_tokens(ids), 1.0, None).data))
            if t == 4:
                between(training)
        return np.array([*losses, *training.model.blocks[0].attn.q.weight.numpy()[0]])
    assert np.allclose(go(False), go(True), rtol=1e-5) != unseen             # the first eager pass after it has three products for one


# ── in fit ───────────────────────────────────────────────────────────────────────────────────────────────────────────
RNG = np.random.default_rng(5)
TEXT = [RNG.integers(0, 50, (3, t)) for t in (9, 9, 7, 9)]
ROWS = [{"ids": ids, "mask": np.arange(ids.shape[1]) < RNG.integers(2, ids.shape[1], (3, 1)), "labels": RNG.integers(0, 2, 3)} for ids in TEXT]
WHOLE = [{k: v for k, v in row.items() if k != "mask"} for row in ROWS]


@dataclass(frozen=True)
class Pull(ft.Method):
    "LoRA's matrices are pulled to zero: a method with a penalty."
    targets = "attn.[qv]"

    def edit(self, path, module, rng):
        return ft.LoRA(r=2).edit(path, module, rng)

    def penalty(self, edits, model, ctx):
        return sum((e.A * e.A).sum() for e in edits.values()) * 0.01


@dataclass(frozen=True)
class Twice(ft.LoRA):
    def phases(self):
        return [ft.Phase(0.5), ft.Phase(0.5, self.halve)]

    def halve(self, model, edits, batches, rng):
        for e in edits.values():
            e.B.copy_(array.asnumpy(e.B.data) * 0.5)


FITS = {"text": (None, TEXT, {}), "dropout, LoRA": (ft.LoRA(r=2, dropout=0.2), TEXT, {"schedule": ft.cosine_schedule(warmup=3)}),
        "a class a row": (None, ROWS, {}), "BERT's class": (None, ROWS, {"kind": "class"}), "no padding": (None, WHOLE, {"kind": "class"}),
        "bfloat16": (None, TEXT, {"autocast": "bfloat16"}), "a penalty": (Pull(), TEXT, {}),
        "two phases": (Twice(r=2), TEXT, {"optimizer": AdamW(0.01, weight_decay=0.1)}),
        "more shapes than graphs": (None, [RNG.integers(0, 50, (2, t)) for t in range(3, 12)], {"steps": 40})}


METHODS = [m.cls() for m in ft.methods()]


def fitted(name, capturing, **more):
    "Losses, what trains, and what was asked of the device."
    method, batches, how = FITS[name]
    kind, how = how.get("kind", "text"), {k: v for k, v in how.items() if k != "kind"}
    model = GPT(GPTConfig(50, 32, 24, 2, 4, dropout=0.1)) if kind != "class" else ft.BERT(ft.BERTConfig(50, 32, 2, 24, 2, 4, dropout=0.1))
    if "labels" in batches[0]:
        ft.classifier(model, classes=2)
    if method:
        ft.attach(model, method)
    fake_gpu.reset()
    history = ft.fit(model, batches, **({"steps": 14, "progress": False, "capture": capturing} | how | more))
    return history.losses, np.concatenate([array.asnumpy(p.data).ravel() for p in edit.trained(model).values()]), fake_gpu.counts()


@pytest.mark.parametrize("name", FITS)
def test_fit_replays_what_it_would_run(name):
    (losses, weights, none), (same, too, some) = fitted(name, False), fitted(name, True)
    assert np.array_equal(losses, same) and np.array_equal(weights, too)
    assert none.graphs == 0 and some.graphs >= 4


@pytest.mark.parametrize("kind", ["text", "class"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_method_is_fitted_by_replays_or_refused(method, kind, monkeypatch):
    "One that has work of its own around a step is refused; replays of every other are what it does."
    monkeypatch.setitem(FITS, "method", (method, ROWS if kind == "class" else TEXT, {"steps": 9, "kind": kind}))
    if type(method).begin is not ft.Method.begin or type(method).step is not ft.Method.step:
        with pytest.raises(CannotCapture, match=type(method).__name__):
            fitted("method", True)
        return
    (losses, weights, _), (same, too, some) = fitted("method", False), fitted("method", True)
    assert np.array_equal(losses, same) and np.array_equal(weights, too) and some.graphs >= 3


def without_schedule(run, targets, factor):
    return run.replay(type(targets), vars(targets) | {"weight": 1}, 1.0, run.rng)


def with_other_dropout(run, targets, factor):
    return run.replay(type(targets), vars(targets) | {"weight": 1}, factor, np.random.default_rng(0))


def without_mask(run, targets, factor):
    return run.replay(type(targets), vars(targets) | {"weight": 1, "facts": {}}, factor, run.rng)


def with_t_at_one(run, targets, factor):
    run.optimizer.t = 1
    return run.replay(type(targets), vars(targets) | {"weight": 1}, factor, run.rng)


@pytest.mark.parametrize("name, replay_step", [
    ("dropout, LoRA", without_schedule), ("dropout, LoRA", with_other_dropout), ("a class a row", without_mask), ("two phases", with_t_at_one)])
def test_a_replay_of_something_else_is_noticed(name, replay_step, monkeypatch):
    monkeypatch.setattr(ft.train.loop, "replay_step", replay_step)
    (losses, weights, _), (same, too, _) = fitted(name, False), fitted(name, True)
    assert not np.array_equal(losses, same) and not np.array_equal(weights, too)


# ── losses and terms ──
@dataclass(frozen=True, eq=False)
class Distillation(ft.Loss):
    """KL(teacher ‖ student), and the distance of projected hidden states. The projection trains; the dropout mask is the student's."""
    teacher: ft.Module
    projection: ft.Module
    hidden_states = True

    @property
    def module(self):
        return self.projection

    def __call__(self, model, targets, rng=None):
        ctx = targets.context(rng)
        logits = model(targets.ids, ctx)
        with ft.no_grad():
            teacher_ctx = targets.context()
            teacher_logits = self.teacher(targets.ids, teacher_ctx)
        difference = self.projection(ctx.hidden_states[1], ctx) - teacher_ctx.hidden_states[1]
        loss = ft.functional.kl_divergence(teacher_logits, logits, 2.0)
        return ctx, loss + (difference * difference).mean()


class Balanced(ft.Module):
    """An MLP that adds an auxiliary loss."""

    def __init__(self, mlp):
        self.mlp = mlp

    def forward(self, x, ctx):
        y = self.mlp(x, ctx)
        ctx.add_loss("balance", (y * y).mean() * 100)
        return y


def fit_terms(capturing, **more):
    "Every term of every step, and all values, of a distillation with an auxiliary loss and a penalty."
    model = GPT(GPTConfig(50, 32, 24, 2, 4, dropout=0.1))
    for block in model.blocks:
        block.mlp = Balanced(block.mlp)
    ft.attach(model, Pull())
    loss = Distillation(GPT(GPTConfig(50, 32, 16, 2, 4), seed=3), ft.nn.Linear(24, 16, rng=np.random.default_rng(1)))
    fake_gpu.reset()
    history = ft.fit(model, TEXT, 14, AdamW(0.01), loss=loss, progress=False, capture=capturing, **more)
    tensors = [*edit.trained(model).values(), *loss.projection.parameters()]
    return history, np.concatenate([array.asnumpy(p.data).ravel() for p in tensors]), fake_gpu.counts()


def check_terms():
    "Replays give the terms and the values of a run without capture, bitwise."
    history, values, _ = fit_terms(False)
    replayed, same, counts = fit_terms(True)
    assert counts.graphs >= 4
    assert history.terms.keys() == {"loss", "penalty.pull", "balance"}
    assert all(len(set(term)) > 7 for term in history.terms.values())
    assert history == replayed
    assert np.array_equal(values, same)


def test_a_replay_returns_every_term_of_a_users_loss():
    check_terms()


def test_terms_of_the_first_replay_are_noticed(monkeypatch):
    right, first = ft.train.loop.replay_step, []

    def stale(run, targets, factor):
        loss, terms, norm = right(run, targets, factor)
        first.append(terms)
        return loss, first[0], norm
    monkeypatch.setattr(ft.train.loop, "replay_step", stale)
    with pytest.raises(AssertionError):
        check_terms()


def test_all_terms_of_a_step_leave_the_device_in_one_transfer():
    counts = []
    for steps in (14, 18):
        model = GPT(GPTConfig(50, 32, 24, 2, 4))
        ft.attach(model, Pull())
        fake_gpu.reset()
        ft.fit(model, TEXT[:1], steps, AdamW(0.01), progress=False)
        counts.append(fake_gpu.counts())
    assert counts[1].waits - counts[0].waits == counts[1].d2h - counts[0].d2h == 4


def test_a_step_of_fit_waits_once_and_a_replay_is_one_word():
    name, n = "text", 14
    (*_, few), (*_, more) = (fitted(name, True, steps=steps) for steps in (n, n + 4))
    assert more.graphs - few.graphs == 4 and more.waits - few.waits == 4


@pytest.mark.parametrize("first, then", [(True, True), (True, False), (False, True)])
def test_fit_resumes_with_capture_what_it_began_without_and_the_other_way_round(first, then, tmp_path):
    def stop() -> dict:
        calls.append(0)
        if len(calls) == 9:
            raise RuntimeError("the plug was pulled")
        return {}
    want, weights, _ = fitted("dropout, LoRA", False)
    calls, there = [], {"out": tmp_path, "save_every": 6}
    with pytest.raises(RuntimeError, match="the plug"):
        fitted("dropout, LoRA", first, evaluate=stop, evaluate_every=1, **there)
    got, values, counts = fitted("dropout, LoRA", then, resume=True, **there)
    assert np.array_equal(got, want) and np.array_equal(values, weights) and bool(counts.graphs) == then


def test_a_step_that_is_not_finite_updates_nothing_in_a_replayed_fit():
    def late(t: int, T: int) -> float:
        return 1.0 if t < 6 else 1e30
    seen = []
    for capturing in (False, True):
        model = GPT(GPTConfig(50, 16, 24, 2, 4))
        with pytest.raises(ft.Diverged) as e:
            ft.fit(model, TEXT[:1], steps=30, optimizer=AdamW(0.01), clip=None, progress=False, capture=capturing, schedule=late)
        seen.append((str(e.value), [p.numpy().tobytes() for p in model.parameters()]))
    assert seen[0] == seen[1] and "at step 8" in seen[0][0]


class Busy(ft.LoRA):
    def step(self, edits, t, T):
        pass


@pytest.mark.parametrize("how, says", [
    (dict(accumulate=2), "2 batches are added up.*accumulate=1"), (dict(autocast="float16"), "capture a step in bfloat16"),
    (dict(optimizer=SGD(0.1)), "an update by SGD"), (dict(method=Busy(r=2)), "Busy has work of its own before or after each step")], ids=str)
def test_what_fit_cannot_capture_it_says_before_the_first_update(how, says):
    model = GPT(GPTConfig(50, 16, 24, 2, 4))
    if "method" in how:
        ft.attach(model, how["method"])
    before = [p.numpy().copy() for p in model.parameters()]
    with pytest.raises(CannotCapture, match=says):
        ft.fit(model, TEXT, steps=8, progress=False, capture=True, **{k: v for k, v in how.items() if k != "method"})
    assert all(np.array_equal(a, p.numpy()) for a, p in zip(before, model.parameters())) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("wrong, error", [({"ids": TEXT[0] + 50}, "outside the vocabulary"),
                                          (ROWS[0] | {"labels": np.array([0, 1, 2])}, "outside the 2")], ids=["ids", "labels"])
def test_wrong_numbers_are_named_in_a_replayed_fit_too(wrong, error):
    "A graph would read past the end of a table."
    right = {k: v for k, v in ROWS[0].items() if k in wrong}
    model = GPT(GPTConfig(50, 16, 24, 2, 4))
    if "labels" in wrong:
        ft.classifier(model, classes=2)
    with pytest.raises(IndexError, match=error):
        ft.fit(model, [right] * 5 + [wrong], steps=6, progress=False, capture=True)
