"""A captured step gives the losses and weights of the step itself. A step that cannot be captured is refused."""
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


def compute_loss(model, ids, labels, rng=None):
    """The mean loss of a batch."""
    logits = model(ids, rng=rng)
    return ops.cross_entropy(logits, array.put_like(labels, logits.data))        # captured: already on the device


def flat_values(tensors):
    """The values of all tensors, end to end, on the host."""
    return np.concatenate([array.asnumpy(p.data).ravel() for p in tensors])


class Training:
    """A model, its optimiser, and a training step."""

    def __init__(self, dropout=0.0, method=None, autocast=None, dtype=None, llama=False, **options):
        if llama:
            scaling = ft.RotaryScaling("llama3", 2.0, original=8)
            self.model = ft.Llama(ft.LlamaConfig(50, 16, 24, 2, 4, key_value_heads=2, rope_scaling=scaling))
        else:
            self.model = GPT(GPTConfig(50, 16, 24, 2, 4, dropout=dropout))
        if dtype:
            self.model.to(dtype=dtype)
        if method:
            ft.attach(self.model, method)
        self.model.train()
        self.autocast = autocast
        self.opt = AdamW(0.01, **options).start(edit.trained(self.model))
        self.rng = np.random.default_rng(3)

    def step(self, ids, labels, factor, rng):
        with ft.autocast(self.autocast or "bfloat16", enabled=self.autocast is not None):
            loss = compute_loss(self.model, ids, labels, rng)
        loss.backward()
        self.opt.step(factor, clip=1.0)
        self.opt.zero_grad()
        return loss

    def run(self, *, capturing, batches=BATCHES):
        """The losses of all steps, and the weights after them. The learning rate falls."""
        step = ft.capture(self.step) if capturing else self.step
        losses = []
        for t, ids in enumerate(batches):
            losses.append(step(ids[:, :-1], next_tokens(ids), 1 - t / 20, self.rng))
        return np.array([float(loss.data) for loss in losses]), flat_values(self.model.parameters())


def check_capture(make=Training, batches=BATCHES):
    """Captured, the training has the same losses and weights, to the bit, and counts the same number of steps."""
    losses, weights = make().run(capturing=False, batches=batches)
    captured = make()
    captured_losses, captured_weights = captured.run(capturing=True, batches=batches)
    assert np.isfinite(losses).all()
    assert np.array_equal(captured_losses, losses), (captured_losses, losses)
    assert np.array_equal(captured_weights, weights)
    assert captured.opt.t == len(losses)


KINDS = {
    "plain": {},
    "dropout": {"dropout": 0.2},
    "lora": {"method": ft.LoRA(r=2)},
    "lora, dropout": {"method": ft.LoRA(r=2, dropout=0.3)},
    "bitfit": {"method": ft.BitFit()},
    "decay": {"weight_decay": 0.3},
    "autocast": {"autocast": "bfloat16", "dropout": 0.2},
    "autocast, lora": {"autocast": "bfloat16", "method": ft.LoRA(r=2)},
    "16 bits": {"dtype": "bfloat16"},
    "llama": {"llama": True},
    "llama, lora, autocast": {"llama": True, "autocast": "bfloat16", "method": ft.LoRA(r=2)},
    "lora over 16 bits": {"dtype": "bfloat16", "method": ft.LoRA(r=2), "autocast": "bfloat16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_is_the_step(kind):
    check_capture(lambda: Training(**KINDS[kind]))


def test_a_replay_is_one_launch_and_three_copies():
    training = Training()
    step = ft.capture(training.step)
    for ids in BATCHES[:4]:
        step(ids[:, :-1], next_tokens(ids), 0.5, None)
    fake_gpu.reset()
    step(BATCHES[5][:, :-1], next_tokens(BATCHES[5]), 0.4, None)
    counts = fake_gpu.counts()
    assert counts.graphs == 1
    assert counts.waits == counts.d2h == 0
    assert counts.h2d == 3                                                       # ids, labels, learning rates
    assert counts.mallocs == 0


def test_other_shapes_make_another_graph():
    widths = itertools.cycle([11, 8])
    check_capture(batches=[ids[:, :width] for ids, width in zip(BATCHES, widths)])


def test_too_many_shapes_are_refused():
    step = ft.capture(lambda x: x * 2)
    with pytest.raises(CannotCapture, match="too many different shapes"):
        for n in range(1, 20):
            step(np.ones(n, np.float32))


def test_arguments_may_be_trees_and_results_are_copies():
    step = ft.capture(lambda batch, scale: {"y": batch["x"] * scale, "z": (Tensor(batch["x"]), None)})
    results = [step({"x": np.full(3, i, np.float32), "name": "a"}, np.float32([i])) for i in range(6)]
    assert [float(result["y"][0]) for result in results] == [i * i for i in range(6)]
    assert [float(result["z"][0].data[1]) for result in results] == list(range(6))
    assert results[0]["z"][1] is None


def test_on_numpy_capture_is_the_step_itself():
    array.use("numpy")
    assert ft.capture(len) is len


# ── planted faults ───────────────────────────────────────────────────────────────────────────────────────────────────
def feed_in_the_memory_of_the_graph(m):
    """Wrong: an array made during the capture. Earlier kernels of the graph have used its memory."""
    def feed(self, f, shape):
        a = cp.empty(shape, np.float32)
        if self.capturing:
            self.feeds.append((a, f))
        else:
            a.set(f().astype(np.float32))
        return a
    m.setattr(capture.Recording, "feed", feed)


def never_feed_again(m):
    """Wrong: a replay sends no numbers."""
    original = capture.Recording.record

    def record(self):
        out = original(self)
        self.feeds.clear()
        return out
    m.setattr(capture.Recording, "record", record)


def constant_factor(m):
    """Wrong: the factor on the learning rate is a constant of the graph."""
    def now(self, number):
        constant = number.now
        return lambda: constant
    m.setattr(capture.Recording, "now", now)


def constant_step_count(m):
    """Wrong: every replay computes the bias corrections of the captured step."""
    original = optimizer._rates

    def rates_of_the_capture(opt, factor):
        t = opt.t + 1
        rates = original(opt, factor)
        if array.recording is not None and array.recording.capturing:
            (a, f), = array.recording.feeds

            def same_step():
                opt.t = t - 1
                return f()
            array.recording.feeds[:] = [(a, same_step)]
        return rates
    m.setattr(optimizer, "_rates", rates_of_the_capture)


def constant_keys(m):
    """Wrong: a replay sends no dropout keys."""
    m.setattr(capture.Keys, "send", lambda self: None)


def shared_memory(m):
    """Wrong: the graph takes memory from the common pool, so the graph and other arrays overwrite each other."""
    pool = cp.get_default_memory_pool()
    m.setattr(capture.cupy.cuda, "MemoryPool", lambda: pool)
    others = []
    original = capture.Captured.__call__

    def call(self, *args):
        out = original(self, *args)
        others[:] = [cp.full(n, 7.0, np.float32) for n in (64, 500, 2000, 30 * 50) for _ in range(60)]
        return out
    m.setattr(capture.Captured, "__call__", call)


def inputs_of_the_first_call(m):
    """Wrong: an input that is not zero is not replaced."""
    original = capture.Recording.put

    def put(there, a):
        if isinstance(there, cp.ndarray) and there.any():
            return there
        return original(there, a)
    m.setattr(capture.Recording, "put", staticmethod(put))


def check_fault(plant, make=Training):
    """With the planted fault, losses or weights differ, or the step fails."""
    with pytest.MonkeyPatch.context() as m:
        plant(m)
        with pytest.raises((AssertionError, RuntimeError)):
            check_capture(make)


FAULTS = [
    constant_factor, constant_step_count, shared_memory, inputs_of_the_first_call, never_feed_again,
    feed_in_the_memory_of_the_graph,
]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_is_noticed(plant):
    check_fault(plant)


def test_constant_dropout_keys_are_noticed():
    check_fault(constant_keys, lambda: Training(0.2))


def test_without_a_workspace_a_product_cannot_be_captured():
    library = gemm.LIBRARIES[cp.ndarray]
    gemm.matmul(cp.ones((2, 2), np.float32), cp.ones((2, 2), np.float32))
    original = library.library

    class WithoutWorkspace:
        """cuBLAS, without the call that sets a workspace."""
        def __getattr__(self, name):
            return (lambda *a: 0) if name == "cublasSetWorkspace_v2" else getattr(original, name)

    library.library = WithoutWorkspace()
    try:
        with pytest.raises(CannotCapture, match="cuBLAS status 3"):
            Training().run(capturing=True)
    finally:
        library.library = original
        library.stream = None


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────
HOST = np.ones(3, np.float32)


def messages(step, *args):
    """The messages of CannotCapture in three calls of a step. The message comes at the third call."""
    captured = ft.capture(step)
    found = []
    for _ in range(3):
        try:
            captured(*args)
        except CannotCapture as e:
            found.append(str(e))
    return found


@pytest.mark.parametrize("step, pattern", [
    (lambda x: x * float(x[0]), r"reads a number from the device.*line \d+: .*float\(x\[0\]\)"),
    (lambda x: x[x > 0], "reads a number from the device"),
    (lambda x: x + cp.asarray(HOST), r"brings host data to the device.*cp.asarray\(HOST\)"),
    (lambda x: x[[0, 1]], "brings host data"),
    (lambda x: x.reshape(1, 3) @ cp.ones((3, 2), np.float32), "CuPy's own product"),
    (lambda x: cp.cuda.get_current_stream().synchronize(), "reads a number from the device, or waits"),
])
def test_an_operation_that_a_graph_cannot_hold_is_refused_with_its_line(step, pattern):
    found = messages(step, HOST)
    assert len(found) == 1
    assert re.search(pattern, found[0]), found


def changing_steps():
    """{name: (step, pattern of the message)}: steps with something that changes and is no argument."""
    calls = itertools.count(1)

    def factor_changes(self, ids, labels, factor, rng):
        return Training.step(self, ids, labels, 1 / next(calls), rng)

    def key_changes(self, ids, labels, factor, rng):
        return Training.step(self, ids, labels, factor, self.rng)

    def shape_changes(self, ids, labels, factor, rng):
        n = 5 + next(calls) % 2
        return Training.step(self, ids[:, :n], labels[:, :n], factor, rng)

    def gradients_stay(self, ids, labels, factor, rng):
        loss = compute_loss(self.model, ids, labels)
        loss.backward()
        self.opt.step()
        return loss

    def arithmetic_on_the_factor(self, ids, labels, factor, rng):
        return Training.step(self, ids, labels, 0.5 * float(factor), rng)

    return {
        "rate": (factor_changes, "optimizer.step a different number.*1.0 before, 0.5 now"),
        "key": (key_changes, "the kernel (dropout|uniform) a different number"),
        "structure": (shape_changes, "a different number|something else"),
        "gradients": (gradients_stay, "leaves gradients behind"),
        "number": (arithmetic_on_the_factor, "for optimizer.step"),
    }


@pytest.mark.parametrize("name", changing_steps())
def test_a_change_that_is_no_argument_is_refused(name, monkeypatch):
    step, pattern = changing_steps()[name]
    training = Training(0.2 if name == "key" else 0.0)
    monkeypatch.setattr(training, "step", step.__get__(training), raising=False)
    with pytest.raises(CannotCapture, match=pattern):
        training.run(capturing=True)


def test_an_optimiser_without_a_captured_update_is_refused():
    training = Training()
    training.opt = SGD(0.1).start(edit.trained(training.model))
    with pytest.raises(CannotCapture, match="an update by SGD cannot be captured"):
        training.run(capturing=True)


def test_a_changing_scale_of_the_loss_is_refused():
    training = Training()
    scaler = ft.GradScaler()

    def step(ids, labels, factor, rng):
        with ft.autocast("float16"):
            loss = compute_loss(training.model, ids, labels)
        scaler.scale(loss).backward()
        scaler.step(training.opt, factor, clip=1.0)
        training.opt.zero_grad()
        return loss

    with pytest.raises(CannotCapture, match="capture a step in bfloat16"):
        ft.capture(step)(BATCHES[0][:, :-1], next_tokens(BATCHES[0]), 1.0, None)


def keep_first_casts(m):
    """Wrong: the 16-bit copies of the first call stay, so no kernel of the graph casts the weights."""
    first = {}

    def cast(a, dtype):
        if array.recording is None:
            return casts.cast_parameter(a, dtype)
        return first.setdefault(array.address(a), ft.precision.rounded(a, dtype))
    m.setitem(dispatch.KERNELS, (ft.precision.cast_parameter, cp.ndarray), [cast])


def test_weights_are_cast_at_each_replay():
    check_fault(keep_first_casts, lambda: Training(autocast="bfloat16"))


@pytest.mark.parametrize("forgets", [True, False])
def test_a_captured_pass_casts_the_weights_again(forgets, monkeypatch):
    """One autocast region around several passes: a replay uses the present weights, not the casts of an earlier pass.

    Without `casts.forget`, the fault shows.
    """
    if not forgets:
        monkeypatch.setattr(casts, "forget", lambda: None)
    training = Training()
    ids = BATCHES[0]
    with ft.no_grad(), ft.autocast("bfloat16"):
        step = ft.capture(lambda ids: training.model(ids))
        for _ in range(4):
            before = array.asnumpy(step(ids).data)
        for p in training.model.parameters():
            p.copy_(array.asnumpy(p.data) * 1.5)
        replayed = array.asnumpy(step(ids).data)
        eager = array.asnumpy(training.model(ids).data)
    assert not np.array_equal(before, eager)
    assert np.array_equal(replayed, eager) == forgets


def test_training_continues_after_a_refusal():
    reference = Training()
    training = Training()
    want, _ = reference.run(capturing=False, batches=BATCHES[:2])
    reads_its_loss = ft.capture(lambda *args: float(training.step(*args).data))
    losses = []
    for t, ids in enumerate(BATCHES[:2]):
        losses.append(reads_its_loss(ids[:, :-1], next_tokens(ids), 1 - t / 20, None))
    with pytest.raises(CannotCapture, match="reads a number"):
        reads_its_loss(BATCHES[0][:, :-1], next_tokens(BATCHES[0]), 1.0, None)
    assert np.array_equal(losses, want)
    assert training.opt.t == 2
    assert all(p.grad is None for p in training.model.parameters())
    want, _ = reference.run(capturing=False, batches=BATCHES[2:])
    losses, _ = training.run(capturing=False, batches=BATCHES[2:])
    assert np.array_equal(losses, want)


def optimizer_values(opt):
    """All weights and moments of an optimiser, end to end, on the host."""
    return np.concatenate([array.asnumpy(a) for group in opt.groups for a in (group.w, *group.moments)])


def test_a_replay_with_a_norm_that_is_not_finite_updates_nothing():
    training = Training()
    opt = training.opt

    def step(ids, labels, scale):
        loss = compute_loss(training.model, ids, labels) * Tensor(array.put_like(scale, opt.groups[0].w))
        loss.sum().backward()
        norm = opt.step(1.0, clip=1.0)
        opt.zero_grad()
        return norm

    captured = ft.capture(step)
    for t, ids in enumerate(BATCHES[:6]):
        before = optimizer_values(opt)
        is_bad = t == 4
        norm = captured(ids[:, :-1], next_tokens(ids), np.float32([np.inf if is_bad else 1]))
        assert np.array_equal(before, optimizer_values(opt)) == is_bad
        if is_bad:
            with pytest.raises(FloatingPointError, match="norm is"):
                opt.check_norm(float(norm))
        else:
            opt.check_norm(float(norm))
    assert opt.t == 5


# ── AdamW over all tensors in one launch ─────────────────────────────────────────────────────────────────────────────
def two_steps(*, kernel, bad=None):
    """Weights, moments and gradients (in one array), and the norms, of two steps of AdamW.

    More tensors than one launch takes; one is large, p3 has a mask, p7 has no gradient.
    """
    rng = np.random.default_rng(0)
    shapes = [(3, 2)] * 155 + [(200, 200)] + [(5,)] * 10
    named = {}
    for i, shape in enumerate(shapes):
        values = array.asarray(rng.standard_normal(shape).astype(np.float32))
        named[f"p{i}"] = Tensor(values, requires_grad=True)
    named["p3"].mask = array.asarray(np.array([[True], [False], [True]]))
    opt = AdamW(0.1, weight_decay=0.1).start(named)
    norms = []
    for clip in (0.5, None):
        for name, p in named.items():
            p.grad = None
            if name != "p7":
                p.grad = array.asarray(rng.standard_normal(p.shape).astype(np.float32))
        if bad:
            named["p160"].grad[0] = bad
        with contextlib.nullcontext() if kernel else kernels.definitions():
            norms.append(float(opt.step(clip=clip)))
    arrays = [a for group in opt.groups for a in (group.w, *group.moments)]
    arrays += [p.grad for name, p in named.items() if p.grad is not None and name != "p3"]
    return np.concatenate([array.asnumpy(a).ravel() for a in arrays]), norms


def test_one_launch_for_all_tensors_is_the_definition_of_each():
    want, want_norms = two_steps(kernel=False)
    got, norms = two_steps(kernel=True)
    assert np.allclose(got, want, rtol=2e-5, atol=1e-6)
    assert np.allclose(norms, want_norms, rtol=1e-6)


original_table = optimizer.table


def every_launch_from_0(gradients, starts=None):
    """Wrong: the first tensor of every launch begins at 0."""
    return original_table(gradients, starts and [0, *starts[1:]])


def rotated_starts(gradients, starts=None):
    """Wrong: every tensor begins where the next one begins."""
    return original_table(gradients, starts and starts[1:] + starts[:1])


def without_the_last(gradients, starts=None):
    """Wrong: every launch leaves out its last tensor."""
    return original_table(list(gradients)[:-1], starts and starts[:-1])


@pytest.mark.parametrize("wrong", [every_launch_from_0, rotated_starts, without_the_last], ids=lambda f: f.__name__)
def test_a_wrong_table_of_tensors_is_noticed(wrong, monkeypatch):
    want, _ = two_steps(kernel=False)
    monkeypatch.setattr(optimizer, "table", wrong)
    got, _ = two_steps(kernel=True)
    assert not np.allclose(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_updates_nothing(bad):
    with pytest.raises(FloatingPointError, match="norm is"):
        two_steps(kernel=True, bad=bad)
    p = Tensor(array.asarray(np.ones((2, 2), np.float32)), requires_grad=True)
    opt = AdamW(0.1).start({"p": p})
    p.grad = array.asarray(np.array([[1, bad], [1, 1]], np.float32))
    norm = opt.launch_step(clip=1.0)
    with pytest.raises(FloatingPointError):
        opt.check_norm(float(norm))
    assert (array.asnumpy(p.data) == 1).all()
    assert opt.t == 0
    assert not any(array.asnumpy(m).any() for m in opt.groups[0].moments)


# ── writes between replays ───────────────────────────────────────────────────────────────────────────────────────────
def test_a_replay_marks_the_weights_as_written():
    """A replay writes to weights without running Python. Casts and graphs of earlier passes must become invalid."""
    training = Training()
    eval_ids = BATCHES[0]
    with ft.autocast("bfloat16"):
        step = ft.capture(training.step)
        for ids in BATCHES[:5]:
            with ft.no_grad():
                training.model(eval_ids)                                         # casts all weights
            loss = compute_loss(training.model, ids[:, :-1], next_tokens(ids))
            step(ids[:, :-1], next_tokens(ids), 1.0, None)
            with ft.no_grad():
                logits = array.asnumpy(training.model(eval_ids).data)
            with ft.no_grad(), ft.autocast("bfloat16"):                          # a new region, without casts
                assert np.array_equal(logits, array.asnumpy(training.model(eval_ids).data))
            with pytest.raises(RuntimeError, match="written in place"):
                loss.backward()


def replace_arrays(training):
    """Replace the arrays of all weights."""
    for p in training.model.parameters():
        p.data = p.data * np.float32(0.5)


def move_there_and_back(training):
    """Move the model to the host and back."""
    training.model.to("numpy").to("cupy")


def start_again(training):
    """Start the optimiser again."""
    training.opt.start(edit.trained(training.model))


@pytest.mark.parametrize("change", [replace_arrays, move_there_and_back, start_again], ids=lambda f: f.__name__)
@pytest.mark.parametrize("checks_outdated", [True, False])
def test_a_graph_with_outdated_arrays_is_captured_again(change, checks_outdated, monkeypatch):
    """Without `Recording.outdated`, the fault shows."""
    if not checks_outdated:
        monkeypatch.setattr(capture.Recording, "outdated", lambda self: False)

    def run(*, capturing):
        """The losses, and some weights after the last step; the change comes after the fifth step."""
        training = Training()
        step = ft.capture(training.step) if capturing else training.step
        losses = []
        for t, ids in enumerate(BATCHES):
            losses.append(float(step(ids[:, :-1], next_tokens(ids), 1.0, None).data))
            if t == 4:
                change(training)
        return np.array([*losses, *training.model.blocks[0].attn.q.weight.numpy()[0]])

    # Not to the bit: the first eager pass after the change computes q, k and v in three products, not in one.
    is_close = np.allclose(run(capturing=False), run(capturing=True), rtol=1e-5)
    assert is_close == checks_outdated


# ── in fit ───────────────────────────────────────────────────────────────────────────────────────────────────────────
RNG = np.random.default_rng(5)
TEXT = [RNG.integers(0, 50, (3, t)) for t in (9, 9, 7, 9)]


def add_padding_and_labels(ids):
    """A batch with rows of different lengths and a label per row."""
    T = ids.shape[1]
    return {"ids": ids, "mask": np.arange(T) < RNG.integers(2, T, (3, 1)), "labels": RNG.integers(0, 2, 3)}


ROWS = [add_padding_and_labels(ids) for ids in TEXT]
UNPADDED = [{"ids": row["ids"], "labels": row["labels"]} for row in ROWS]


@dataclass(frozen=True)
class Pull(ft.Method):
    """LoRA with a penalty that pulls its matrices to zero."""
    targets = "attn.[qv]"

    def edit(self, path, module, rng):
        return ft.LoRA(r=2).edit(path, module, rng)

    def penalty(self, edits, model, ctx):
        return sum((e.A * e.A).sum() for e in edits.values()) * 0.01


@dataclass(frozen=True)
class Twice(ft.LoRA):
    """LoRA in two training phases, with a setup between them."""
    def phases(self):
        return [ft.Phase(0.5), ft.Phase(0.5, self.halve)]

    def halve(self, model, edits, batches, rng):
        for e in edits.values():
            e.B.copy_(array.asnumpy(e.B.data) * 0.5)


# name: (model, method, batches, options of fit)
FITS = {
    "text": ("gpt", None, TEXT, {}),
    "dropout, LoRA": ("gpt", ft.LoRA(r=2, dropout=0.2), TEXT, {"schedule": ft.cosine_schedule(warmup=3)}),
    "a label per row": ("gpt", None, ROWS, {}),
    "BERT": ("bert", None, ROWS, {}),
    "no padding": ("bert", None, UNPADDED, {}),
    "bfloat16": ("gpt", None, TEXT, {"autocast": "bfloat16"}),
    "a penalty": ("gpt", Pull(), TEXT, {}),
    "two phases": ("gpt", Twice(r=2), TEXT, {"optimizer": AdamW(0.01, weight_decay=0.1)}),
    "more shapes than graphs": ("gpt", None, [RNG.integers(0, 50, (2, t)) for t in range(3, 12)], {"steps": 40}),
}
METHODS = [m.cls() for m in ft.methods()]


def run_fit(name, *, capturing, **options):
    """The losses, the values of the trainable tensors, and the counts of the device, of one of FITS."""
    kind, method, batches, own_options = FITS[name]
    if kind == "gpt":
        model = GPT(GPTConfig(50, 32, 24, 2, 4, dropout=0.1))
    else:
        model = ft.BERT(ft.BERTConfig(50, 32, 2, 24, 2, 4, dropout=0.1))
    if "labels" in batches[0]:
        ft.classifier(model, classes=2)
    if method:
        ft.attach(model, method)
    fake_gpu.reset()
    history = ft.fit(
        model, batches, **({"steps": 14, "progress": False, "capture": capturing} | own_options | options),
    )
    return history.losses, flat_values(edit.trained(model).values()), fake_gpu.counts()


@pytest.mark.parametrize("name", FITS)
def test_fit_with_capture_is_fit(name):
    losses, values, eager_counts = run_fit(name, capturing=False)
    captured_losses, captured_values, counts = run_fit(name, capturing=True)
    assert np.array_equal(losses, captured_losses)
    assert np.array_equal(values, captured_values)
    assert eager_counts.graphs == 0
    assert counts.graphs >= 4


@pytest.mark.parametrize("kind", ["gpt", "bert"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_method_is_fitted_by_replays_or_refused(method, kind, monkeypatch):
    """A method that overrides begin or step is refused. For all others, the replays give the same losses and values."""
    monkeypatch.setitem(FITS, "method", (kind, method, ROWS if kind == "bert" else TEXT, {"steps": 9}))
    if type(method).begin is not ft.Method.begin or type(method).step is not ft.Method.step:
        with pytest.raises(CannotCapture, match=type(method).__name__):
            run_fit("method", capturing=True)
        return
    losses, values, _ = run_fit("method", capturing=False)
    captured_losses, captured_values, counts = run_fit("method", capturing=True)
    assert np.array_equal(losses, captured_losses)
    assert np.array_equal(values, captured_values)
    assert counts.graphs >= 3


def replay(run, targets, factor, rng, **replaced):
    """The replay of fit, with some fields of the targets replaced."""
    return run.replay(type(targets), vars(targets) | {"weight": 1} | replaced, factor, rng)


def without_schedule(run, targets, factor):
    """Wrong: the factor on the learning rate is 1."""
    return replay(run, targets, 1.0, run.rng)


def with_other_dropout(run, targets, factor):
    """Wrong: every step draws the same dropout keys."""
    return replay(run, targets, factor, np.random.default_rng(0))


def without_mask(run, targets, factor):
    """Wrong: the mask of the batch is lost."""
    return replay(run, targets, factor, run.rng, facts={})


def with_t_at_one(run, targets, factor):
    """Wrong: the optimiser's count of steps is reset before every step."""
    run.optimizer.t = 1
    return replay(run, targets, factor, run.rng)


@pytest.mark.parametrize("name, replay_step", [
    ("dropout, LoRA", without_schedule),
    ("dropout, LoRA", with_other_dropout),
    ("a label per row", without_mask),
    ("two phases", with_t_at_one),
])
def test_a_wrong_replay_is_noticed(name, replay_step, monkeypatch):
    monkeypatch.setattr(ft.train.loop, "replay_step", replay_step)
    losses, values, _ = run_fit(name, capturing=False)
    captured_losses, captured_values, _ = run_fit(name, capturing=True)
    assert not np.array_equal(losses, captured_losses)
    assert not np.array_equal(values, captured_values)


# ── losses and terms ──
@dataclass(frozen=True, eq=False)
class Distillation(ft.Loss):
    """KL(teacher ‖ student), and the squared distance of projected hidden states.

    The projection trains; only the student has dropout.
    """
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


def fit_terms(*, capturing):
    """The history, all trained values, and the counts of the device: distillation, an auxiliary loss and a penalty."""
    model = GPT(GPTConfig(50, 32, 24, 2, 4, dropout=0.1))
    for block in model.blocks:
        block.mlp = Balanced(block.mlp)
    ft.attach(model, Pull())
    teacher = GPT(GPTConfig(50, 32, 16, 2, 4), seed=3)
    loss = Distillation(teacher, ft.nn.Linear(24, 16, rng=np.random.default_rng(1)))
    fake_gpu.reset()
    history = ft.fit(model, TEXT, 14, AdamW(0.01), loss=loss, progress=False, capture=capturing)
    values = flat_values([*edit.trained(model).values(), *loss.projection.parameters()])
    return history, values, fake_gpu.counts()


def check_terms():
    """Replays give the terms and the values of a run without capture, bitwise."""
    history, values, _ = fit_terms(capturing=False)
    replayed, same, counts = fit_terms(capturing=True)
    assert counts.graphs >= 4
    assert history.terms.keys() == {"loss", "penalty.pull", "balance"}
    assert all(len(set(term)) > 7 for term in history.terms.values())
    assert history == replayed
    assert np.array_equal(values, same)


def test_a_replay_returns_every_term_of_a_users_loss():
    check_terms()


def test_terms_of_the_first_replay_are_noticed(monkeypatch):
    original = ft.train.loop.replay_step
    first = []

    def stale(run, targets, factor):
        loss, terms, norm = original(run, targets, factor)
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
    few, more = counts
    assert more.waits - few.waits == more.d2h - few.d2h == 4


def test_a_step_of_fit_is_one_launch_and_waits_once():
    _, _, few = run_fit("text", capturing=True, steps=14)
    _, _, more = run_fit("text", capturing=True, steps=18)
    assert more.graphs - few.graphs == 4
    assert more.waits - few.waits == 4


@pytest.mark.parametrize("first, then", [(True, True), (True, False), (False, True)])
def test_fit_resumes_with_capture_a_run_without_it_and_the_reverse(first, then, tmp_path):
    calls = []

    def interrupt() -> dict:
        """Raise at the ninth evaluation."""
        calls.append(0)
        if len(calls) == 9:
            raise RuntimeError("the plug was pulled")
        return {}

    want, want_values, _ = run_fit("dropout, LoRA", capturing=False)
    saved = {"out": tmp_path, "save_every": 6}
    with pytest.raises(RuntimeError, match="the plug"):
        run_fit("dropout, LoRA", capturing=first, evaluate=interrupt, evaluate_every=1, **saved)
    got, values, counts = run_fit("dropout, LoRA", capturing=then, resume=True, **saved)
    assert np.array_equal(got, want)
    assert np.array_equal(values, want_values)
    assert bool(counts.graphs) == then


def test_a_replayed_fit_updates_nothing_in_a_step_that_is_not_finite():
    def jump(t: int, T: int) -> float:
        """A factor on the learning rate that is enormous from the seventh step."""
        return 1.0 if t < 6 else 1e30

    found = []
    for capturing in (False, True):
        model = GPT(GPTConfig(50, 16, 24, 2, 4))
        with pytest.raises(ft.Diverged) as e:
            ft.fit(
                model, TEXT[:1], steps=30, optimizer=AdamW(0.01), clip=None, progress=False, capture=capturing,
                schedule=jump,
            )
        found.append((str(e.value), [p.numpy().tobytes() for p in model.parameters()]))
    eager, captured = found
    assert eager == captured
    assert "at step 8" in eager[0]


class Busy(ft.LoRA):
    """A method that overrides `step`."""
    def step(self, edits, t, T):
        pass


@pytest.mark.parametrize("method, options, message", [
    (None, {"accumulate": 2}, "2 batches are added up.*accumulate=1"),
    (None, {"autocast": "float16"}, "capture a step in bfloat16"),
    (None, {"optimizer": SGD(0.1)}, "an update by SGD"),
    (Busy(r=2), {}, "Busy has work of its own before or after each step"),
], ids=str)
def test_fit_refuses_before_the_first_update(method, options, message):
    model = GPT(GPTConfig(50, 16, 24, 2, 4))
    if method:
        ft.attach(model, method)
    before = [p.numpy().copy() for p in model.parameters()]
    with pytest.raises(CannotCapture, match=message):
        ft.fit(model, TEXT, steps=8, progress=False, capture=True, **options)
    assert all(np.array_equal(a, p.numpy()) for a, p in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("wrong, message", [
    ({"ids": TEXT[0] + 50}, "outside the vocabulary"),
    (ROWS[0] | {"labels": np.array([0, 1, 2])}, "outside the 2"),
], ids=["ids", "labels"])
def test_a_replayed_fit_names_ids_and_labels_out_of_range(wrong, message):
    """A graph would read past the end of a table."""
    right = {k: v for k, v in ROWS[0].items() if k in wrong}
    model = GPT(GPTConfig(50, 16, 24, 2, 4))
    if "labels" in wrong:
        ft.classifier(model, classes=2)
    with pytest.raises(IndexError, match=message):
        ft.fit(model, [right] * 5 + [wrong], steps=6, progress=False, capture=True)
