"""Arguments and batches of fit and evaluate that make no sense: one sentence, before anything changes."""
from __future__ import annotations

import math
import re
import sys
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import case_id, host

import tinyft as ft
from tinyft import AdamW, array, evaluate, fit, perplexity, train
from tinyft.train.batch import read_batch

VOCAB, POSITIONS, WIDTH, CLASSES = 19, 12, 12, 3


def make_gpt() -> ft.GPT:
    return ft.GPT(ft.GPTConfig(VOCAB, POSITIONS, WIDTH, 2, 3, 16))


def make_bert() -> ft.BERT:
    return ft.BERT(ft.BERTConfig(VOCAB, POSITIONS, 2, WIDTH, 2, 3, 16))


def make_classifier() -> ft.BERT:
    return ft.classifier(make_bert(), CLASSES)


def make_ids(rows: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, 8))


IDS = make_ids()
BATCHES = [IDS]


def state_of(model: Any) -> dict[str, np.ndarray]:
    return {name: np.array(host(value)) for name, value in model.state_dict().items()}


def check_refused(call: Callable[[ft.GPT], Any], kind: type[Exception], words: str) -> None:
    """The call raises one sentence of ours, and leaves the model as it was."""
    model = make_gpt()
    before = state_of(model)
    with pytest.raises(kind, match=words) as error:
        call(model)
    assert "\n" not in str(error.value)
    assert type(error.value) in (TypeError, ValueError, IndexError)
    after = state_of(model)
    assert all(np.array_equal(value, after[name]) for name, value in before.items())
    assert not model.training


# ── the arguments of fit ─────────────────────────────────────────────────────────────────────────────────────────────
def no_metrics() -> None:
    pass


def fake_evaluation() -> dict[str, float]:
    return {"loss": 1.0}


def returns_a_schedule(t: int, T: int) -> Any:
    return ft.cosine_schedule()


WRONG_VALUES = [
    (dict(steps=-1), "steps wants a whole number >= 0, got -1"),
    (dict(clip=-1), "clip wants a finite number > 0, got -1"),
    (dict(clip=0), "clip wants a finite number > 0, got 0"),
    (dict(clip=math.nan), "clip wants a finite number > 0, got nan"),
    (dict(clip=math.inf), "clip wants a finite number > 0, got inf"),
    (dict(accumulate=0), "accumulate wants a whole number >= 1, got 0"),
    (dict(seed=-1), "seed wants a whole number >= 0, got -1"),
    (dict(save_every=-1), "save_every wants a whole number >= 0, got -1"),
    (dict(evaluate_every=-1), "evaluate_every wants a whole number >= 0, got -1"),
    (dict(evaluate=fake_evaluation, patience=-1), "patience wants a whole number >= 0, got -1"),
    (dict(evaluate=fake_evaluation, patience=1), "patience wants evaluate_every > 0"),
    (dict(evaluate_every=5), "evaluate_every and patience want evaluate, .*; got None"),
    (dict(patience=5), "evaluate_every and patience want evaluate, .*; got None"),
    (dict(schedule=lambda t, T: -1.0), "the factor of a schedule wants a finite number >= 0, got -1.0"),
    (dict(schedule=lambda t, T: math.nan), "the factor of a schedule wants a finite number >= 0, got nan"),
    (dict(out=""), "out wants the path of a folder, got an empty path"),
    (dict(out=__file__), "out wants a folder for checkpoint.safetensors"),
    (dict(out=f"{__file__}/inside"), "out wants a folder for checkpoint.safetensors"),
    (dict(out="a\0b"), "out wants the path of a folder"),
]
WRONG_KINDS = [
    (dict(steps=2.5), "steps wants a whole number >= 0, got 2.5"),
    (dict(steps=True), "steps wants a whole number >= 0, got True"),
    (dict(steps=None), "steps wants a whole number >= 0, got None"),
    (dict(clip="1"), "clip wants a finite number > 0, got '1'"),
    (dict(accumulate=1.5), "accumulate wants a whole number >= 1, got 1.5"),
    (dict(seed="a"), "seed wants a whole number >= 0, got 'a'"),
    (dict(seed=None), "seed wants a whole number >= 0, got None"),
    (dict(save_every=0.5), "save_every wants a whole number >= 0, got 0.5"),
    (dict(evaluate=fake_evaluation, evaluate_every=2.5), "evaluate_every wants a whole number"),
    (dict(evaluate=fake_evaluation, patience=True), "patience wants a whole number >= 0, got True"),
    (dict(evaluate=5), "evaluate wants a function that returns metrics"),
    (dict(evaluate={"loss": 1}, evaluate_every=1), "evaluate wants a function that returns metrics"),
    (dict(monitor=3), "monitor wants the name of a metric, got 3"),
    (dict(optimizer=1e-3), "optimizer wants an optimiser, such as AdamW.*, got 0.001"),
    (dict(optimizer=AdamW), "optimizer wants an optimiser, .* got the class AdamW"),
    (dict(schedule=ft.cosine_schedule), r"got cosine_schedule itself: call it, cosine_schedule\(\)"),
    (dict(schedule=ft.linear_schedule), r"got linear_schedule itself: call it, linear_schedule\(\)"),
    (dict(schedule=returns_a_schedule), "got one that returns a function: call it"),
    (dict(schedule=lambda t, T: None), "the factor of a schedule wants a finite number >= 0, got None"),
    (dict(schedule=0.5), r"schedule wants a function \(t, T\) -> factor, .* got 0.5"),
    (dict(schedule="cosine"), r"schedule wants a function \(t, T\) -> factor, .* got 'cosine'"),
    (dict(loss=5), "a loss wants read"),
    (dict(out=5), "out wants the path of a folder, got 5"),
    (dict(resume=1), "resume wants True or False, got 1"),
    (dict(progress="no"), "progress wants True or False, got 'no'"),
    (dict(capture="yes"), "capture wants True or False, got 'yes'"),
    (dict(autocast="float8"), "autocast computes in float16 or bfloat16, got 'float8'"),
    (dict(autocast=True), "autocast computes in float16 or bfloat16, got True"),
]
WRONG_ARGUMENTS = [
    *[(arguments, ValueError, words) for arguments, words in WRONG_VALUES],
    *[(arguments, TypeError, words) for arguments, words in WRONG_KINDS],
]


@pytest.mark.parametrize("arguments, kind, words", WRONG_ARGUMENTS, ids=case_id)
def test_an_argument_without_sense_is_refused_before_anything_changes(arguments, kind, words):
    def call(model: ft.GPT) -> None:
        fit(model, BATCHES, **{"steps": 3, "progress": False, **arguments})
    check_refused(call, kind, words)


def test_numpy_numbers_are_numbers():
    numbers = dict(steps=np.int64(2), accumulate=np.uint8(2), clip=np.float32(0.5), seed=np.int32(7))
    plain = dict(steps=2, accumulate=2, clip=0.5, seed=7)
    histories = [fit(make_gpt(), BATCHES, progress=False, **arguments) for arguments in (numbers, plain)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("metrics, words", [
    (no_metrics, "evaluate wants to return metrics, .* got None"),
    (lambda: {"loss": None}, "evaluate wants to return numbers, got None for 'loss'"),
    (lambda: {"loss": [1, 2]}, "evaluate wants to return numbers"),
])
def test_an_evaluation_returns_numbers(metrics, words):
    with pytest.raises(TypeError, match=words):
        fit(make_gpt(), BATCHES, 2, evaluate=metrics, evaluate_every=1, progress=False)


@pytest.mark.parametrize("model", [None, "gpt", 5, ft.GPT, make_ids()], ids=str)
def test_fit_and_evaluate_want_a_model(model):
    with pytest.raises(TypeError, match="fit wants a model, got "):
        fit(model, BATCHES, 1, progress=False)
    for call in (evaluate, perplexity):
        with pytest.raises(TypeError, match="evaluate wants a model, got "):
            call(model, BATCHES)


def test_perplexity_of_nothing_is_refused():
    for call in (evaluate, perplexity):
        with pytest.raises(ValueError, match="evaluate wants at least one batch, got no batches"):
            call(make_gpt(), [])


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────
BACK = {"ids": IDS, "labels": IDS[:, ::-1]}
WRONG_BATCHES = [
    (None, TypeError, "batches wants several batches, .* got None"),
    (5, TypeError, "batches wants several batches, .* got 5"),
    ("text", TypeError, "batches wants several batches, .* got 'text'"),
    ({"ids": IDS}, TypeError, r"batches wants several batches, .*: put one batch into a list, \[batch\]"),
    (ft.Tensor(array.asarray([1.0])), TypeError, "batches wants several batches"),
    (np.arange(64), TypeError, r"several batches, .* got ndarray of shape \(64,\): put .* into a list, \[ids\]"),
    (IDS, TypeError, r"several batches, .*: put one batch of ids \(B, T\) into a list, \[ids\]"),
    ([{}], ValueError, "a batch wants ids, got nothing"),
    ([{"labels": IDS}], ValueError, "a batch wants ids, got 'labels'"),
    ([{"ids": None}], ValueError, "a batch wants ids, got nothing"),
    ([{"input_ids": IDS}], ValueError, "a batch wants the key 'ids', got 'input_ids'"),
    ([{"ids": IDS, "attention_mask": IDS}], ValueError, "a batch wants the key 'mask', got 'attention_mask'"),
    (["text"], TypeError, "a batch wants ids of shape .*, got 'text': encode it first"),
    ([[["a", "b"]]], TypeError, "token ids are integers; got <U1"),
    ([[[1, 2], [3]]], ValueError, "a batch wants ids .*, got rows of different lengths: pad them"),
    ([[[1, None]]], TypeError, "token ids are integers; got object"),
    ([{"ids": IDS, "labels": "a"}], TypeError, "a batch wants integer labels, got 'a'"),
    ([{"ids": IDS, "labels": [[1], [2, 3]]}], ValueError, "integer labels, got rows of different lengths"),
    ([{"ids": IDS, "mask": [[1], [1, 1]]}], ValueError, "mask wants True or 1 .*, got rows of different lengths"),
    ([{"ids": IDS, "mask": np.full(IDS.shape, 2)}], ValueError, "mask wants True or 1 at real tokens, .* got 2"),
    ([{"ids": IDS, "mask": np.full(IDS.shape, "a")}], TypeError, "mask wants True or 1 at real tokens"),
    ([{"ids": IDS, "token_type_ids": IDS * 0.5}], TypeError, "token_type_ids wants integers .*, got float64"),
    ([{"ids": IDS, "task": 1}], ValueError, "a batch wants one task for each of its 4 rows, got 1"),
    ([{"ids": IDS, "task": [0, 1]}], ValueError, "a batch wants one task for each of its 4 rows"),
    ([{"ids": IDS, "route": "lora"}], ValueError, "a batch wants one route for each of its 4 rows, got 'lora'"),
    ([{**BACK, "class_weight": [1.0]}], IndexError, "do not fit a class_weight of 1 classes"),
    ([{**BACK, "class_weight": [-1.0] * VOCAB}], ValueError, "finite class_weight >= 0"),
    ([{**BACK, "class_weight": [math.nan] * VOCAB}], ValueError, "finite class_weight >= 0"),
    ([{**BACK, "class_weight": ["a"] * VOCAB}], TypeError, "finite class_weight >= 0"),
    ([{**BACK, "class_weight": [1.0] * 30}], ValueError,
     f"class_weight wants one number for each of the {VOCAB} classes, got 30"),
]


@pytest.mark.parametrize("batches, kind, words", WRONG_BATCHES, ids=case_id)
def test_wrong_batches_are_refused_by_fit_and_evaluate(batches, kind, words):
    def train_on(model: ft.GPT) -> None:
        fit(model, batches, 3, progress=False)

    def evaluate_on(model: ft.GPT) -> None:
        evaluate(model, batches)
    check_refused(train_on, kind, words)
    check_refused(evaluate_on, kind, words)


def test_an_array_with_three_axes_is_a_sequence_of_batches():
    """Also an array of objects, whatever its axes: its entries may be batches."""
    several = np.stack([IDS, IDS[::-1]])
    entries = np.array([None, None])
    entries[:] = [{"ids": IDS}, {"ids": IDS[::-1]}]
    wanted = evaluate(make_gpt(), [IDS, IDS[::-1]])
    assert evaluate(make_gpt(), several) == wanted
    assert evaluate(make_gpt(), entries) == wanted


def test_next_tokens_takes_lists_and_refuses_what_holds_no_ids():
    assert train.next_tokens([[1, 2, 3]], [[1, 1, 0]]).tolist() == [[2, -100]]
    for wrong in (None, "text", [[0.5, 1.0]]):
        with pytest.raises(TypeError, match="next_tokens wants ids|token ids are integers"):
            train.next_tokens(wrong)
    with pytest.raises(ValueError, match="next_tokens wants ids .*, got rows of different lengths"):
        train.next_tokens([[1], [2, 3]])
    with pytest.raises(ValueError, match=r"next_tokens wants ids of shape \(B, T\), got \(2,\)"):
        train.next_tokens([1, 2])


def test_compute_loss_wants_what_read_batch_gives():
    with pytest.raises(TypeError, match="compute_loss wants Targets, which read_batch"):
        train.compute_loss(make_gpt(), {"ids": IDS})


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int8, np.int32, np.uint64])
def test_ids_and_labels_may_be_integers_of_any_kind(dtype):
    ids = IDS.astype(dtype)
    assert evaluate(make_gpt(), [ids]) == evaluate(make_gpt(), [IDS])
    batches = [{"ids": ids, "labels": ids[:, ::-1]}]
    assert evaluate(make_gpt(), batches) == evaluate(make_gpt(), [BACK])
    losses = fit(make_gpt(), [ids], 2, progress=False).losses
    assert losses == fit(make_gpt(), [IDS], 2, progress=False).losses


@pytest.mark.parametrize("token_type", [-1, 2])
def test_token_types_outside_the_model_are_refused(token_type):
    """A negative one would be counted from the end of the table."""
    batch = {"ids": IDS, "labels": IDS, "token_type_ids": np.full(IDS.shape, token_type)}
    words = f"token type {token_type} is outside the 2 types of the model"
    with pytest.raises(IndexError, match=words):
        fit(make_bert(), [batch], 1, progress=False)
    with pytest.raises(IndexError, match=words):
        evaluate(make_bert(), [batch])
    with pytest.raises(IndexError, match=words):                        # before a replay, which checks nothing
        train.CrossEntropy().check(make_bert(), read_batch(batch))


def test_embeddings_want_labels():
    embeddings = ft.Tensor(array.asarray(np.ones((2, 3, WIDTH), np.float32)))
    with pytest.raises(ValueError, match="a batch of embeddings wants labels, got none"):
        fit(make_gpt(), [embeddings], 1, progress=False)


def test_any_mapping_is_a_batch():
    batch = read_batch(UserDict(ids=IDS))
    assert np.array_equal(batch.ids, IDS[:, :-1])


# ── labels that are the ids ──────────────────────────────────────────────────────────────────────────────────────────
COPIES = "a causal model wants as label of a position the id that follows, got labels that are the ids themselves"
PADDED = np.where(np.arange(8) < 6, IDS, -100)
ANSWERS = np.where(np.arange(8) >= 5, IDS, -100)                        # the question has no labels
LAST = np.where(np.arange(8) == 7, IDS, -100)


@pytest.mark.parametrize("labels", [IDS, PADDED, ANSWERS, LAST], ids=["all", "padded", "answers", "last"])
def test_labels_that_are_the_ids_are_refused_for_a_causal_model(labels):
    batches = [{"ids": IDS, "labels": labels}]

    def train_on(model: ft.GPT) -> None:
        fit(model, batches, 3, progress=False)

    def evaluate_on(model: ft.GPT) -> None:
        perplexity(model, batches)
    check_refused(train_on, ValueError, f"{COPIES}: leave the labels out, or shift them")
    check_refused(evaluate_on, ValueError, COPIES)


def test_copied_labels_are_refused_where_ids_repeat_and_the_text_ends_as_it_began():
    """Only two positions tell: those around the 3. All others are followed by their own id, or by the last one."""
    ids = np.array([[5, 5, 5, 3, 5]])
    with pytest.raises(ValueError, match=COPIES):
        perplexity(make_gpt(), [{"ids": ids, "labels": ids}])


def shifted(ids: np.ndarray) -> np.ndarray:
    return np.concatenate([ids[:, 1:], np.full((len(ids), 1), -100)], axis=1)


SAME = np.full((2, 8), 5)
ACCEPTED = {
    "shifted": (IDS, shifted(IDS)),
    "shifted, with repeated ids": (IDS // 9, shifted(IDS // 9)),
    "shifted ids that are all equal": (SAME, shifted(SAME)),
    "ids that are all equal, with the one that follows the text": (SAME, SAME),
    "one label, by chance its own id": (IDS, np.where(np.arange(32).reshape(4, 8) == 10, IDS, -100)),
    "equal at all positions but one": (IDS, np.where(np.arange(32).reshape(4, 8) == 10, (IDS + 1) % VOCAB, IDS)),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_other_labels_are_accepted_also_where_some_are_their_own_ids(name):
    ids, labels = ACCEPTED[name]
    batches = [{"ids": ids, "labels": labels}]
    assert len(fit(make_gpt(), batches, 1, progress=False).losses) == 1
    evaluate(make_gpt(), batches)


def test_a_model_that_looks_both_ways_may_predict_its_own_ids():
    """Masked language models predict the ids that stood there: some are unchanged, in a batch by chance all."""
    batches = [{"ids": IDS, "labels": IDS}]
    assert len(fit(make_bert(), batches, 1, progress=False).losses) == 1
    evaluate(make_bert(), batches)


class CopyLoss(train.Loss):
    """The mean square of the logits less the one-hot labels: a loss with another idea of what labels are."""

    def __call__(self, model, targets, rng=None):
        ctx = targets.context(rng)
        logits = model(targets.ids, ctx).reshape(-1, VOCAB)
        one_hot = np.eye(VOCAB, dtype=np.float32)[targets.labels]
        return ctx, ft.functional.mse_loss(logits, ft.Tensor(array.asarray(one_hot)))


def test_another_loss_may_take_the_ids_as_labels():
    """Only cross entropy asks a causal model for the ids that follow."""
    batches = [{"ids": IDS, "labels": IDS}]
    assert len(fit(make_gpt(), batches, 1, loss=CopyLoss(), progress=False).losses) == 1
    evaluate(make_gpt(), batches, loss=CopyLoss())


def test_labels_that_are_the_ids_would_teach_to_copy(monkeypatch):
    """Without the check, the loss on such labels falls far below that of the next ids."""
    monkeypatch.setattr(train.loop, "refuse_copies", lambda batch: None)
    losses = fit(make_gpt(), [{"ids": IDS, "labels": IDS}], 60, AdamW(0.03), progress=False).losses
    assert losses[-1] < 0.1


# ── class weights of 0 ───────────────────────────────────────────────────────────────────────────────────────────────
def weighted(labels: list[int], seed: int) -> dict[str, np.ndarray]:
    ids = make_ids(len(labels), seed)
    return {"ids": ids, "labels": np.array(labels), "class_weight": np.array([0.0, 1.0, 2.0])}


def test_a_micro_batch_whose_labels_have_no_weight_counts_nothing():
    """Its mean loss is 0 / 0. The step is the one without that micro-batch."""
    some = [weighted([1, 2, 0], 1), weighted([1, 1], 2)]
    none = weighted([0, 0], 3)
    with_none = fit(make_classifier(), [some[0], none, some[1]], 2, accumulate=3, progress=False)
    without = fit(make_classifier(), some, 2, accumulate=2, progress=False)
    assert with_none.losses == pytest.approx(without.losses, rel=1e-6)
    model = make_classifier()
    assert evaluate(model, [*some, none])["loss"] == pytest.approx(evaluate(model, some)["loss"], rel=1e-6)


def test_a_step_and_an_evaluation_want_one_label_with_a_weight():
    none = [weighted([0, 0], 3)]
    with pytest.raises(ValueError, match="a step wants a label whose class weight is not 0"):
        fit(make_classifier(), none, 1, progress=False)
    with pytest.raises(ValueError, match="evaluate wants a label whose class weight is not 0"):
        evaluate(make_classifier(), none)


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_without_a_terminal_a_run_writes_one_line_at_its_end(capsys):
    fit(make_gpt(), BATCHES, 2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"2 steps in \d+\.\d s, loss \d\.\d{3}\n", err)


def test_a_long_run_writes_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(train.terminal, "SECONDS", 0.0)
    fit(make_gpt(), BATCHES, 3, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(r"step 2 of 3, loss \d\.\d{3}, [\d,]+ tokens/s", lines[1])
    assert not re.search(r"[\x00-\x1f]", "".join(lines)), "control characters do not belong in a pipe"


def test_the_last_line_names_the_reason_of_an_early_stop(capsys):
    fit(make_gpt(), BATCHES, 9, evaluate=fake_evaluation, evaluate_every=1, patience=2)
    assert "3 steps in" in (line := capsys.readouterr().err)
    assert line.endswith("; stopped: no better loss in 2 evaluations\n")


def test_progress_can_be_silent(capsys):
    fit(make_gpt(), BATCHES, 2, progress=False)
    assert capsys.readouterr() == ("", "")


class Terminal:
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_on_a_terminal_a_bar_is_removed_and_the_last_line_stays(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    fit(make_gpt(), BATCHES, 3)
    assert "\r" in terminal.text
    assert terminal.text.rpartition("\r")[2].startswith("3 steps in ")


class ClosedPipe(Terminal):
    """A pipe that nobody reads."""

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [ClosedPipe(), None], ids=["closed", "none"])
def test_a_run_goes_on_if_nobody_reads_its_progress(stream, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(train.terminal, "SECONDS", 0.0)
    history = fit(make_gpt(), BATCHES, 3)
    monkeypatch.undo()
    assert len(history.losses) == 3


@pytest.mark.parametrize("config, is_notebook", [({"IPKernelApp": {}}, True), ({}, False), (None, False)])
def test_a_notebook_is_known_by_its_kernel(config, is_notebook, monkeypatch):
    """IPython in a terminal has no kernel; a plain Python has no IPython."""
    shell = None if config is None else SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert train.terminal.in_notebook() == is_notebook
    monkeypatch.delitem(sys.modules, "IPython")
    assert not train.terminal.in_notebook()
