"""The training loop and evaluation: the order of a step, phases, accumulation, batches, early stopping, bad input.

Runs that are killed and resumed are in test_resume.py, losses in test_loss.py.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from helpers import host, wrong_answers

import tinyft as ft
from tinyft import (
    AdamW,
    Diverged,
    Edit,
    History,
    Method,
    Parameter,
    Phase,
    array,
    attach,
    evaluate,
    fit,
    ops,
    perplexity,
    train,
)
from tinyft.data import Batches
from tinyft.files import read_tensors
from tinyft.nn import Context
from tinyft.optim.optimizers import Optimizer
from tinyft.tensor import OPS, op
from tinyft.train.batch import compute_loss, read_batch
from tinyft.train.evaluate import pool
from tinyft.train.phases import Stage, make_stages

VOCAB, POSITIONS, WIDTH, CLASSES = 19, 12, 12, 3


def make_gpt(dropout: float = 0.0) -> ft.GPT:
    return ft.GPT(ft.GPTConfig(VOCAB, POSITIONS, WIDTH, 2, 3, 16, dropout))


def make_bert(head: str | None = "mlm") -> ft.BERT:
    return ft.BERT(ft.BERTConfig(VOCAB, POSITIONS, 2, WIDTH, 2, 3, 16), head=head)


def make_classifier() -> ft.BERT:
    model = make_bert()
    model.new_head(CLASSES, np.random.default_rng(0))
    return model


def make_ids(rows: int = 4, T: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, T))


def make_padded(lengths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """A batch with rows of these lengths, padded on the right to 8."""
    return {"ids": make_ids(len(lengths), seed=seed), "mask": np.arange(8) < np.array(lengths)[:, None]}


def make_stream() -> Batches:
    return Batches(list(make_ids(11)), 2, seed=3)


def state_of(model: Any) -> dict[str, np.ndarray]:
    return {name: np.array(host(value)) for name, value in model.state_dict().items()}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(v.dtype == b[n].dtype and np.array_equal(v, b[n]) for n, v in a.items())


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


# ── the order of a step ──────────────────────────────────────────────────────────────────────────────────────────────
class Recorder(Edit):
    """Writes "forward" to a log, and passes its output through an op that writes "backward"."""

    def __init__(self, log: list, record_backward: Callable):
        self.w = Parameter(array.asarray([1.0]))
        self._log = log
        self._record_backward = record_backward

    def after(self, x: Any, y: Any, ctx: Context) -> Any:
        self._log.append("forward")
        return self._record_backward(y * self.w)


class Recording(Method):
    """Writes its calls to a log, and checks the state of the step in each."""

    targets = "norm"

    def __init__(self, log: list):
        self.log = log

        def pullback(g: Any) -> Any:
            log.append("backward")
            return g

        @op("... -> ...")
        def record_backward(x):
            return x, (pullback,)
        OPS.pop("record_backward")
        self.record_backward = record_backward

    def edit(self, path: str, module: Any, rng: np.random.Generator) -> Edit:
        return Recorder(self.log, self.record_backward)

    def begin(self, edits: dict, t: int, T: int, rng: np.random.Generator) -> None:
        assert next(iter(edits.values())).w.grad is None
        self.log.append(f"begin {t} of {T}")

    def penalty(self, edits: dict, model: Any, ctx: Context) -> Any:
        assert ctx.output is not None
        assert ctx.last_hidden_state is not None
        self.log.append("penalty")
        return 0.0

    def step(self, edits: dict, t: int, T: int) -> None:
        assert next(iter(edits.values())).w.grad is not None
        self.log.append(f"step {t} of {T}")


class RecordingOptimizer(Optimizer):
    """θ ← θ − η g. Keeps the gradients of its last update."""

    def __init__(self, log: list, lr: float = 0.01):
        super().__init__(lr, 0.0, None)
        self.log = log

    def start(self, named: dict) -> RecordingOptimizer:
        self.log.append("start")
        return super().start(named)

    def launch_step(self, factor: float = 1.0, clip: float | None = None, loss: Any = None, scale: float = 1.0) -> Any:
        named = {name: p for group in self.groups for name, p in group.tensors.items()}
        self.gradients = {name: np.array(host(p.grad)) for name, p in named.items() if p.grad is not None}
        self.log.append(f"update at {factor} clipped at {clip}")
        return super().launch_step(factor, clip, loss, scale)

    def update(self, piece: Any, lr: float) -> None:
        piece.w -= lr * piece.g


def test_a_step_is_begin_forward_penalty_backward_update_step_and_clear():
    log: list[str] = []
    model = make_gpt()
    attach(model, Recording(log))

    def schedule(t: int, T: int) -> float:
        return (t + 1) / T
    fit(model, [make_ids()], 2, RecordingOptimizer(log), schedule, clip=0.5, accumulate=2, progress=False)
    passes = ["forward", "penalty", "backward"] * 2
    assert log == ["start", "begin 0 of 2", *passes, "update at 0.5 clipped at 0.5", "step 0 of 2",
                   "begin 1 of 2", *passes, "update at 1.0 clipped at 0.5", "step 1 of 2"]
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


# ── phases ───────────────────────────────────────────────────────────────────────────────────────────────────────────
class Delta(Edit):
    """W + δ"""

    def __init__(self, shape: tuple):
        self.delta = Parameter(array.asarray(np.zeros(shape, np.float32)))

    def tensor(self, name: str, p: Any) -> Any:
        return p + self.delta if name == "weight" else p


@dataclass(frozen=True)
class TwoPhases(Method):
    """Train δ; select the 30 % of its entries that moved furthest; set δ to 0; train these. Records every `begin`."""
    optimizer: Any = None
    records: Any = None
    targets: Any = "attn.[qv]"

    def edit(self, path: str, module: Any, rng: np.random.Generator) -> Edit:
        return Delta(module.weight.shape)

    def phases(self) -> list[Phase]:
        return [Phase(0.5), Phase(0.5, self.select_entries)]

    def select_entries(self, model: Any, edits: dict, batches: Iterator, rng: np.random.Generator) -> None:
        for edit in edits.values():
            distance = np.abs(host(edit.delta))
            edit.delta.mask = array.asarray(distance >= np.quantile(distance, 0.7))
            edit.delta.copy_(np.zeros(distance.shape, np.float32))

    def begin(self, edits: dict, t: int, T: int, rng: np.random.Generator) -> None:
        is_fresh = not any(host(m).any() for group in self.optimizer.groups for m in group.moments)
        has_mask = next(iter(edits.values())).delta.mask is not None
        self.records.append((t, T, is_fresh, self.optimizer.t, has_mask))


def test_every_phase_counts_its_own_steps_and_starts_with_a_fresh_optimiser():
    records: list[tuple] = []
    optimizer = AdamW(0.01)
    model = make_gpt()
    attached = attach(model, TwoPhases(optimizer, records), name="both")
    history = fit(model, make_stream(), 7, optimizer, progress=False)
    assert records == [
        (0, 4, True, 0, False), (1, 4, False, 1, False), (2, 4, False, 2, False), (3, 4, False, 3, False),
        (0, 3, True, 0, True), (1, 3, False, 1, True), (2, 3, False, 2, True),
    ]
    assert len(history.losses) == 7
    for edit in attached.edits.values():
        moved = host(edit.delta) != 0
        mask = host(edit.delta.mask)
        assert (moved <= mask).all()
        assert 0 < moved.sum() <= 0.31 * mask.size + 1


@dataclass(frozen=True)
class Planned(ft.LoRA):
    """A method with these phases."""
    parts: tuple = ()

    def phases(self) -> list[Phase]:
        return list(self.parts)


def test_the_stages_of_a_run_are_the_setups_of_all_methods_before_each_training_phase():
    """A phase with a share of 0 is a setup: before the next training phase, or after the last one."""
    model = make_gpt()
    several = (Phase(0.5, "first"), Phase(0.0, "between"), Phase(0.5, "second"), Phase(0.0, "after"))
    a = attach(model, Planned(r=2, parts=several), name="a")
    b = attach(model, Planned(r=2, parts=(Phase(0.0, "before"), Phase(1.0), Phase(0.0, "at the end"))), name="b")
    assert make_stages([a, b], 7) == [
        Stage(0, a, "first"), Stage(0, b, "before"), Stage(4),
        Stage(0, a, "between"), Stage(0, a, "second"), Stage(3),
        Stage(0, a, "after", is_final=True), Stage(0, b, "at the end", is_final=True),
    ]
    assert make_stages([b], 7)[1:] == [Stage(7), Stage(0, b, "at the end", is_final=True)]
    assert make_stages([], 7) == [Stage(7)]


def test_only_one_method_may_have_several_training_phases():
    model = make_gpt()
    attach(model, TwoPhases(), name="both")
    attach(model, TwoPhases(), name="again")
    with pytest.raises(ValueError, match="at most one method with several training phases, got both, again"):
        fit(model, make_stream(), 7, progress=False)


# ── accumulation ─────────────────────────────────────────────────────────────────────────────────────────────────────
def uneven_text() -> tuple[Any, list[dict]]:
    """A language model, and batches with unequal numbers of real tokens."""
    lengths = ([8, 8, 8], [3, 2, 2], [5, 8, 2])
    return make_gpt().to(dtype=np.float64), [make_padded(row, seed=s) for s, row in enumerate(lengths, 1)]


def uneven_classes() -> tuple[Any, list[dict]]:
    """A classifier, and batches with unequal class weights."""
    class_weight = np.array([0.2, 1.0, 5.0])
    batches = []
    for seed, labels in enumerate(([0, 0], [2, 2, 1], [1])):
        ids = make_ids(len(labels), seed=seed)
        batches.append({"ids": ids, "labels": np.array(labels), "class_weight": class_weight})
    return make_classifier().to(dtype=np.float64), batches


def gradients_and_loss(model: Any, batches: list[dict]) -> dict[str, np.ndarray]:
    """The gradients and the loss of one update that accumulates all batches."""
    optimizer = RecordingOptimizer([], lr=1e-30)
    history = fit(model, batches, 1, optimizer, accumulate=len(batches), clip=None, progress=False)
    return optimizer.gradients | {"loss": np.array(history.losses)}


def check_accumulation(make: Callable[[], tuple]) -> None:
    """The gradient and the loss of k batches of unequal size are those of one large batch."""
    model, parts = make()
    large = {}
    for key in parts[0].keys() - {"class_weight"}:
        large[key] = np.concatenate([part[key] for part in parts])
    if "class_weight" in parts[0]:
        large["class_weight"] = parts[0]["class_weight"]
    one = gradients_and_loss(model, [large])
    many = gradients_and_loss(model, parts)
    assert one.keys() == many.keys()
    for name, gradient in one.items():
        assert np.allclose(gradient, many[name], rtol=1e-9, atol=1e-13), name


UNEVEN = pytest.mark.parametrize("make", [uneven_text, uneven_classes], ids=lambda make: make.__name__)


@UNEVEN
def test_accumulated_micro_batches_have_the_gradient_of_one_large_batch(make):
    check_accumulation(make)


WRONG_WEIGHTS: dict[str, Callable[[Any], float]] = {
    "one per batch": lambda targets: 1.0,
    "positions": lambda targets: float(targets.ids.size),
    "rows": lambda targets: float(len(targets.ids)),
}


@wrong_answers
@UNEVEN
@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_a_mean_of_means_is_caught(make, wrong, monkeypatch):
    def read_with_wrong_weight(batch: Any) -> ft.Targets:
        targets = read_batch(batch)
        return replace(targets, weight=WRONG_WEIGHTS[wrong](targets))
    monkeypatch.setattr(train.batch, "read_batch", read_with_wrong_weight)
    with pytest.raises(AssertionError):
        check_accumulation(make)


# ── reading batches ──────────────────────────────────────────────────────────────────────────────────────────────────
def loss_of(model: Any, targets: ft.Targets) -> float:
    return float(compute_loss(model, targets)[1].data)


def test_bare_ids_mean_predict_the_next_token_and_padding_has_no_label():
    model = make_gpt()
    lengths = [8, 3, 1, 5]
    batch = make_padded(lengths)
    ids = batch["ids"]
    z = log_softmax(host(model(ids, mask=batch["mask"])))
    wanted = -np.mean([z[i, t, ids[i, t + 1]] for i, length in enumerate(lengths) for t in range(length - 1)])
    targets = read_batch(batch)
    assert loss_of(model, targets) == pytest.approx(wanted, rel=1e-5)
    assert targets.weight == 7 + 2 + 0 + 4
    with_padding = -np.mean([z[i, t, ids[i, t + 1]] for i in range(4) for t in range(7)])
    assert wanted != pytest.approx(with_padding, rel=1e-4)
    bare = read_batch(make_ids())
    assert np.array_equal(bare.ids, make_ids()[:, :-1])
    assert np.array_equal(bare.labels, make_ids()[:, 1:].ravel())
    assert bare.logit_positions is None


@pytest.mark.parametrize("make", [make_gpt, make_bert])
def test_logits_at_labelled_positions_alone_give_the_loss_and_gradients_of_all_logits(make):
    model = make().to(dtype=np.float64)
    batch = make_padded([8, 5, 7, 6])
    has_label = np.random.default_rng(1).random((4, 8)) < 0.3
    labels = np.where(has_label, batch["ids"], -100)
    targets = read_batch({**batch, "labels": labels})
    assert targets.logit_positions is not None
    assert len(targets.logit_positions) == has_label.sum() == targets.weight < labels.size / 2

    def run(all_positions: bool) -> tuple[float, dict]:
        model.zero_grad()
        if all_positions:
            logits = model(batch["ids"], mask=batch["mask"])
            loss = ops.cross_entropy(logits, array.asarray(labels), ignore_index=-100)
        else:
            _, loss = compute_loss(model, targets)
        loss.backward()
        gradients = {name: np.array(host(p.grad)) for name, p in model.named_parameters().items() if p.grad is not None}
        return float(loss.data), gradients
    few, few_gradients = run(all_positions=False)
    full, full_gradients = run(all_positions=True)
    assert few == pytest.approx(full, rel=1e-12)
    assert few_gradients.keys() == full_gradients.keys()
    for name, gradient in few_gradients.items():
        assert np.allclose(gradient, full_gradients[name], rtol=1e-9, atol=1e-14), name
    one_later = replace(targets, logit_positions=(targets.logit_positions + 1) % labels.size)
    assert loss_of(model, one_later) != pytest.approx(full, rel=1e-4)


def test_an_all_true_mask_changes_nothing():
    model = make_gpt()
    all_true = np.ones((4, 8), bool)
    plain = read_batch(make_ids())
    masked = read_batch({"ids": make_ids(), "mask": all_true})
    assert plain.weight == masked.weight
    assert np.array_equal(plain.labels, masked.labels)
    assert loss_of(model, plain) == loss_of(model, masked)
    without_mask = host(model(make_ids()))
    assert np.allclose(without_mask, host(model(make_ids(), mask=all_true)), rtol=1e-6, atol=1e-7)
    assert not np.allclose(without_mask, host(model(make_ids(), mask=all_true & (np.arange(8) > 1))), atol=1e-3)


def test_a_position_or_a_next_id_that_is_padding_has_no_label():
    ids = np.array([[5, 6, 7, 8, 9]])
    for mask, labels in (([1, 1, 1, 0, 0], [6, 7, -100, -100]), ([0, 0, 1, 1, 1], [-100, -100, 8, 9]),
                         ([1, 1, 0, 1, 1], [6, -100, -100, 9])):
        assert train.batch.next_tokens(ids, np.array([mask])).tolist() == [labels]


def test_ids_may_be_lists_and_embeddings_stay_a_tensor():
    assert np.array_equal(read_batch(make_ids().tolist()).ids, make_ids()[:, :-1])
    embeddings = ft.Tensor(array.asarray(np.zeros((4, 8, WIDTH), np.float32)))
    assert read_batch({"ids": embeddings, "labels": ONES}).ids is embeddings


def test_the_check_before_a_replay_finds_ids_and_labels_that_do_not_fit():
    """A replay cannot raise, so `check` raises what the pass would. A model without a head has no classes."""
    loss = train.batch.CrossEntropy()
    model = make_gpt()
    loss.check(model, read_batch(make_ids()))
    loss.check(make_bert(head=None), read_batch(labelled(ONES)))
    with pytest.raises(IndexError, match=f"outside the vocabulary of {VOCAB}"):
        loss.check(model, read_batch(make_ids() + VOCAB))
    with pytest.raises(IndexError, match=f"label {VOCAB} is outside the {VOCAB} classes"):
        loss.check(model, read_batch(labelled(np.full((4, 8), VOCAB))))


def test_batches_without_a_state_are_counted_and_resumed_after_the_last_one():
    batches = ["a", "b", "c"]
    stream = train.batch.BatchStream(batches)
    assert [next(stream) for _ in range(4)] == ["a", "b", "c", "a"]
    assert stream.state_dict() == {"count": 4}
    resumed = train.batch.BatchStream(batches)
    resumed.load_state_dict({"count": 4})
    assert next(resumed) == "b"


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────
def check_evaluation(measure: Callable[[Any, list], dict]) -> None:
    """The loss is the mean over tokens, not over batches; the perplexity is e to it."""
    model = make_gpt()
    batches = [make_padded([8, 8], seed=1), make_padded([2, 3], seed=2), make_padded([4, 2], seed=3)]
    for p in model.parameters():
        p.copy_(host(p) * 6)                                            # the losses of the batches differ by much
    losses = []
    hits = []
    for batch in batches:
        z = log_softmax(host(model(batch["ids"], mask=batch["mask"])))
        for i in range(2):
            for t in range(int(batch["mask"][i].sum()) - 1):
                label = batch["ids"][i, t + 1]
                losses.append(-z[i, t, label])
                hits.append(z[i, t].argmax() == label)
    metrics = measure(model, batches)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(np.mean(hits))


def mean_over_batches(model: Any, batches: list) -> dict[str, float]:
    metrics = [evaluate(model, [batch]) for batch in batches]
    means = {}
    for name in metrics[0]:
        means[name] = float(np.mean([of_batch[name] for of_batch in metrics]))
    return means


def mean_of_perplexities(model: Any, batches: list) -> dict[str, float]:
    return evaluate(model, batches) | {"perplexity": mean_over_batches(model, batches)["perplexity"]}


def test_the_loss_is_weighted_by_tokens_and_the_perplexity_is_that_of_the_mean():
    check_evaluation(evaluate)
    for wrong in (mean_over_batches, mean_of_perplexities):
        with pytest.raises(AssertionError):
            check_evaluation(wrong)
    assert pool([1e6], [1.0]) == (1e6, math.exp(700)), "a perplexity that would overflow is cut off"
    model = make_gpt()
    assert perplexity(model, [make_ids()]) == evaluate(model, [make_ids()])["perplexity"]


def test_macro_f1_is_the_mean_over_classes_and_leaves_out_rows_without_a_label():
    model = make_classifier()
    ids = make_ids(12)
    predictions = host(model(ids)).argmax(-1)
    labels = predictions.copy()
    labels[:3] = (predictions[:3] + 1) % CLASSES
    labels[10:] = -100
    truth = labels[:10]
    guess = predictions[:10]
    scores = []
    for c in range(CLASSES):
        if ((truth == c) | (guess == c)).any():
            scores.append(2 * ((truth == c) & (guess == c)).sum() / ((truth == c).sum() + (guess == c).sum()))
    metrics = evaluate(model, [{"ids": ids[:7], "labels": labels[:7]}, {"ids": ids[7:], "labels": labels[7:]}])
    assert metrics["macro_f1"] == pytest.approx(np.mean(scores))
    assert metrics["accuracy"] == pytest.approx((truth == guess).mean())
    assert "macro_f1" not in evaluate(make_gpt(), [ids])


def test_evaluation_leaves_the_mode_of_every_module_as_it_was_and_has_no_dropout():
    model = make_gpt(dropout=0.5).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    assert evaluate(model, [make_ids()]) == evaluate(model.train(), [make_ids()])
    model.blocks[0].eval()
    evaluate(model, [make_ids()])
    with pytest.raises(IndexError):
        evaluate(model, [make_ids() + VOCAB])
    assert [module.training for module in model.modules()] == before
    assert any(before) and not all(before)
    assert all(p.grad is None for p in model.parameters())


def test_an_endless_stream_is_evaluated_once():
    assert evaluate(make_gpt(), make_stream()) == evaluate(make_gpt(), list(make_stream().once()))


# ── early stopping, history ──────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("monitor, scores, best, evaluations", [
    ("loss", [3, 2, 4, 5, 1], 1, 4),
    ("valid_loss", [3, 2, 4, 5, 1], 1, 4),
    ("accuracy", [3, 2, 4, 5, 1, 2], 3, 6),
    ("loss", [math.nan, 2, 3, math.nan, 0], 1, 4),
    ("perplexity", [5, 5, 5, 1], 0, 3),
])
def test_training_stops_after_patience_and_restores_the_best_state(monitor, scores, best, evaluations):
    model = make_gpt()
    states = []
    remaining = iter(scores)

    def run_evaluation() -> dict:
        assert not model.training
        states.append(state_of(model))
        return {monitor: np.float32(next(remaining)), "other": 0}
    history = fit(model, [make_ids()], 20, AdamW(0.01), evaluate=run_evaluation, evaluate_every=3, patience=2,
                  monitor=monitor, progress=False)
    assert len(history.evaluations) == evaluations
    assert history.evaluations[0][0] == 3
    assert len(history.losses) == 3 * evaluations
    assert monitor in history.stopped
    assert equal(state_of(model), states[best])
    assert not equal(states[best], states[-1])


def test_without_patience_evaluations_are_only_recorded():
    model = make_gpt()
    scores = iter(range(100))

    def run_evaluation() -> dict:
        return {"loss": next(scores)}
    history = fit(model, [make_ids()], 6, AdamW(0.01), evaluate=run_evaluation, evaluate_every=2, progress=False)
    assert history.evaluations == [(2, {"loss": 0}), (4, {"loss": 1}), (6, {"loss": 2})]
    assert not history.stopped
    assert len(history.losses) == 6


def test_history_holds_the_loss_of_every_step_and_training_lowers_it():
    model = make_gpt()
    first = loss_of(model, read_batch(make_ids()))
    history = fit(model, [make_ids()], 30, AdamW(0.01), progress=False)
    assert len(history.losses) == 30
    assert history.losses[0] == pytest.approx(first)
    assert history.losses[-1] < first / 2
    assert all(type(loss) is float for loss in history.losses)
    assert history.terms == {"loss": history.losses}
    assert fit(model, [make_ids()], 0, progress=False) == History()


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
def labelled(labels: Any, **more: Any) -> dict:
    return {"ids": make_ids(), "labels": np.asarray(labels), **more}


ONES = np.ones((4, 8), int)
ONE_LABEL_PER_ROW = np.where(np.arange(8) == 2, ONES, -100)

BAD_BATCHES: dict[str, tuple] = {
    "nothing to predict":
        (make_gpt, labelled(np.full((4, 8), -100)), ValueError, r"shape \(4, 8\) has nothing to predict"),
    "all padding":
        (make_gpt, make_padded([1, 1, 0]), ValueError, "has nothing to predict"),
    "one token":
        (make_gpt, make_ids(4, 1), ValueError, "has nothing to predict"),
    "label too large":
        (make_gpt, labelled(np.full((4, 8), VOCAB)), IndexError, f"label {VOCAB} is outside the {VOCAB} classes"),
    "the only label too large":
        (make_gpt, labelled(np.where(np.arange(32).reshape(4, 8) == 5, VOCAB, -100)), IndexError,
         f"label {VOCAB} is outside the {VOCAB} classes"),
    "label below zero":
        (make_gpt, labelled(np.full((4, 8), -7)), IndexError, "label -7 is outside"),
    "class too large":
        (make_classifier, labelled([0, 1, 2, 3]), IndexError, "label 3 is outside the 3 classes"),
    "labels of another shape":
        (make_gpt, labelled(np.zeros((4, 7), int)), ValueError,
         r"wants labels of shape \(4,\).* or \(4, 8\).*got \(4, 7\)"),
    "labels that are not integers":
        (make_gpt, labelled(np.zeros((4, 8))), TypeError, "wants integer labels, got float64"),
    "classes for a language model":
        (make_gpt, labelled([0, 1, 2, 0]), ValueError, "got 4 labels and 32 rows.*one label per token"),
    "a class for one row of a language model":
        (make_gpt, {"ids": make_ids(1), "labels": np.array([1])}, ValueError, "got 1 labels and 8 rows"),
    "tokens for a classifier":
        (make_classifier, labelled(ONES), ValueError, "got 32 labels and 4 rows.*one label per sequence"),
    "as many tokens as rows":
        (make_classifier, labelled(ONE_LABEL_PER_ROW), ValueError, "one label per sequence"),
    "a model without a head":
        (lambda: make_bert(head=None), labelled(ONES), ValueError, "has no head"),
    "too long":
        (make_gpt, make_ids(2, POSITIONS + 2), ValueError,
         f"sequence of {POSITIONS + 1} tokens is longer than the model's {POSITIONS} positions"),
    "id too large":
        (make_gpt, make_ids() + VOCAB, IndexError, f"outside the vocabulary of {VOCAB}"),
    "id below zero":
        (make_gpt, make_ids() - VOCAB, IndexError, "token id -.* is outside"),
    "ids that are not integers":
        (make_gpt, labelled(ONES) | {"ids": make_ids() * 1.0}, TypeError, "token ids are integers"),
    "one row without its axis":
        (make_gpt, make_ids()[0], ValueError, r"ids of shape \(B, T\).* got \(8,\)"),
    "a mask of another shape":
        (make_gpt, {"ids": make_ids(), "mask": np.arange(9) < 4}, ValueError,
         r"wants a mask of the shape of its ids, \(4, 8\); got \(9,\)"),
    "an all-true mask of another shape":
        (make_gpt, {"ids": make_ids(), "mask": np.ones((4, 9), bool)}, ValueError,
         r"wants a mask of the shape of its ids.* got \(4, 9\)"),
    "token types of another shape":
        (make_bert, labelled(ONES, token_type_ids=np.zeros((4, 7), int)), ValueError,
         r"wants a token_type_ids .* got \(4, 7\)"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches_get_one_clear_sentence_and_change_nothing(name):
    make, batch, kind, words = BAD_BATCHES[name]
    model = make()
    before = state_of(model)
    with pytest.raises(kind, match=words) as error:
        fit(model, [batch], 3, progress=False)
    assert "\n" not in str(error.value)
    with pytest.raises(kind, match=words):
        evaluate(model, [batch])
    assert equal(state_of(model), before)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def fit_a_frozen_model() -> None:
    model = make_gpt()
    for p in model.parameters():
        p.requires_grad = False
    fit(model, [make_ids()], 3, progress=False)


def fit_with_evaluation_of_f1() -> None:
    fit(make_gpt(), [make_ids()], 1, evaluate=lambda: {"f1": 1}, evaluate_every=1, patience=1, progress=False)


@pytest.mark.parametrize("call, kind, words", [
    (fit_a_frozen_model, ValueError, "nothing trains"),
    (lambda: fit(make_gpt(), [], 3, progress=False), ValueError, "batches have come to an end"),
    (lambda: fit(make_gpt(), iter([make_ids()]), 3, progress=False), ValueError, "come to an end: give a list"),
    (lambda: fit(make_gpt(), [make_ids()], -1, progress=False), ValueError, "steps wants a whole number >= 0, got -1"),
    (lambda: fit(make_gpt(), [make_ids()], 1, accumulate=0, progress=False), ValueError,
     "accumulate wants a whole number >= 1, got 0"),
    (lambda: evaluate(make_gpt(), []), ValueError, "no batches"),
    (fit_with_evaluation_of_f1, KeyError, "monitor 'loss', got f1"),
], ids=["nothing trains", "no batches", "one-shot", "steps", "accumulate", "evaluate", "monitor"])
def test_bad_arguments_get_one_clear_sentence(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


class Spoiler(Method):
    """From its fifth step on, a penalty that is NaN, or whose gradient is."""

    targets = "norm"

    def __init__(self, spoiled: str):
        self.spoiled = spoiled
        self.t = 0

    def trains(self, model: Any) -> set[str]:
        return set(model.named_parameters())

    def begin(self, edits: dict, t: int, T: int, rng: np.random.Generator) -> None:
        self.t = t

    def penalty(self, edits: dict, model: Any, ctx: Context) -> Any:
        if self.t < 4:
            return 0.0
        zero = (model.norm.weight * model.norm.weight).sum() * 0.0
        return zero * math.nan if self.spoiled == "loss" else ops.sqrt(zero)        # √0 has no derivative


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("spoiled, words", [
    ("loss", "the loss is nan at step 5"), ("gradient", "norm is nan at step 5")])
def test_a_loss_or_gradient_that_is_not_finite_raises_diverged_and_updates_nothing(spoiled, words, tmp_path):
    model = make_gpt()
    attach(model, Spoiler(spoiled))
    states = []

    def schedule(t: int, T: int) -> float:
        states.append(state_of(model))
        return 1.0
    with pytest.raises(Diverged, match=words):
        fit(model, [make_ids()], 9, AdamW(0.01), schedule, out=tmp_path, save_every=1, progress=False)
    arrays, facts = read_tensors(tmp_path / "checkpoint.safetensors")
    now = state_of(model)
    assert facts["done"] == 4
    assert all(np.isfinite(value).all() for value in [*now.values(), *arrays.values()])
    assert equal(now, states[-1])
    assert not model.training
