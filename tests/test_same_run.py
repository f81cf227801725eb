"""What a resumed run must share with the run that wrote the checkpoint, and when a checkpoint is written.

Bitwise resuming is in test_resume.py.
"""
from __future__ import annotations

import functools
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import host, wrong_answers
from test_resume import (
    Killed,
    check_equal_runs,
    differences,
    finish_process,
    ignore_step,
    kill_at,
    lora,
    make_batches,
    make_gpt,
    make_ids,
    read_checkpoint,
    run_parts,
    run_recipe,
    start_process,
    state_of,
)
from wrong import replaced

import tinyft as ft
from tinyft import SGD, AdamW, LoRA, array, attach, fit, train
from tinyft.data import Batches
from tinyft.files import write_tensors


def begin(folder: Path, parts: tuple | None = None, **changes: Any) -> None:
    """A run that is killed in its 8th step, with a checkpoint after the 6th."""
    with pytest.raises(Killed):
        run_parts(*(parts or lora()), folder, at_step=kill_at(8), **changes)


def check_refused(folder: Path, words: str, parts: tuple | None = None, **changes: Any) -> None:
    """A resume is refused with these words; model, batches and checkpoint are as before."""
    model, batches, arguments = parts or lora()
    before = state_of(model)
    file = (folder / "checkpoint.safetensors").read_bytes()
    position = batches.state_dict() if isinstance(batches, Batches) else None
    with pytest.raises(ValueError, match=words) as error:
        run_parts(model, batches, arguments, folder, **changes)
    assert "\n" not in str(error.value)
    assert differences(state_of(model), before) == []
    assert (folder / "checkpoint.safetensors").read_bytes() == file
    assert position is None or batches.state_dict() == position


# ── another run ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_another_base_is_refused(tmp_path):
    begin(tmp_path)
    model, batches, arguments = lora()
    other = np.array(host(model.blocks[1].mlp.up.weight))
    other[0, 0] += 1e-3
    model.blocks[1].mlp.up.weight.copy_(other)
    words = "on another base: the frozen blocks.1.mlp.up.weight had other values"
    check_refused(tmp_path, words, (model, batches, arguments))


def test_a_base_tensor_that_the_checkpoint_holds_may_differ(tmp_path):
    """In full fine-tuning every tensor is in the checkpoint: the values before do not matter."""
    with pytest.raises(Killed):
        run_recipe("full", tmp_path, at_step=kill_at(8))
    straight = run_recipe("full", tmp_path.with_name("straight"))
    model = make_gpt(dropout=0.1)
    model.pos.weight.copy_(host(model.pos.weight) + 1)
    resumed = run_parts(model, make_batches(), dict(steps=14, optimizer=AdamW(0.01)), tmp_path)
    check_equal_runs(straight, resumed, tmp_path.with_name("straight"), tmp_path)


def with_other_examples() -> Batches:
    ids = make_ids(11)
    ids[3, 3] = (ids[3, 3] + 1) % 19
    return Batches(list(ids), 2, seed=3)


def test_other_data_of_the_same_form_are_refused(tmp_path):
    model, _, arguments = lora()
    begin(tmp_path / "stream")
    words = "wants a state with the examples of this stream, got one of other examples"
    check_refused(tmp_path / "stream", words, (model, with_other_examples(), arguments))
    words = "a run on other data: the batches have the same form"
    listed = [make_ids(2, seed=s) for s in range(5)]
    begin(tmp_path / "list", (lora()[0], listed, arguments))
    check_refused(tmp_path / "list", words, (lora()[0], [*listed[:4], listed[0]], arguments))
    check_refused(tmp_path / "list", words, (lora()[0], listed[:4], arguments))


@pytest.mark.parametrize("batches", [
    [[[1, 2, 3]], [[4, 5, 6]]],
    [{"ids": [[1, 2]], "labels": [3]}, {"ids": [[1, 2]], "labels": [4]}],
    [np.arange(3)[None], np.arange(4)[None]],
])
def test_the_content_of_a_list_of_batches_counts_in_every_form(batches):
    ours = train.same_run.describe_data(batches)
    assert ours == train.same_run.describe_data(list(batches))
    assert ours != train.same_run.describe_data(batches[::-1])
    assert json.loads(json.dumps(ours)) == ours


def test_a_generator_is_not_read_for_its_content(tmp_path):
    """It could be read only once. Two runs over generators are not told apart."""
    def generate(seed: int) -> Iterator[np.ndarray]:
        for s in range(seed, seed + 40):
            yield make_ids(2, seed=s)
    assert train.same_run.describe_data(generate(0)) is None
    model, _, arguments = lora()
    begin(tmp_path, (model, generate(0), arguments))
    run_parts(lora()[0], generate(0), lora()[2], tmp_path)


def test_another_seed_is_refused(tmp_path):
    begin(tmp_path)
    check_refused(tmp_path, "another run: its seed: 7; here: 8", seed=8)


def halved(t: int, T: int) -> float:
    return 0.5


def scaled(scale: float, t: int, T: int) -> float:
    return scale


@dataclass(frozen=True)
class Step:
    """1 before a step, and 0.1 from it on."""
    at: int

    def __call__(self, t: int, T: int) -> float:
        return 1.0 if t < self.at else 0.1


SCHEDULES: list[Any] = [
    ft.constant_schedule(), ft.cosine_schedule(), ft.cosine_schedule(warmup=3), ft.cosine_schedule(floor=0.1),
    ft.linear_schedule(), halved, functools.partial(scaled, 0.5), functools.partial(scaled, 0.25), Step(3), Step(4),
    lambda t, T: 1.0,
]


def test_schedules_are_told_apart_by_their_settings_and_users_functions_by_their_names():
    found = [train.same_run.describe_schedule(schedule) for schedule in SCHEDULES]
    texts = [json.dumps(facts) for facts in found]
    assert len(set(texts)) == len(SCHEDULES)
    assert train.same_run.describe_schedule(ft.cosine_schedule(warmup=3)) == found[2]
    assert train.same_run.describe_schedule(functools.partial(scaled, 0.5)) == found[6]
    assert found[5] == "test_same_run.halved"


def test_another_schedule_is_refused(tmp_path):
    def resume(schedule: Any) -> ft.History:
        model, batches, arguments = lora()
        return fit(model, batches, out=tmp_path, resume=True, progress=False, **arguments | {"schedule": schedule})
    resume(ft.cosine_schedule(warmup=3))
    with pytest.raises(ValueError, match=r"its schedule: cosine_schedule\(warmup=3, floor=0.0\); here: .*halved"):
        resume(halved)
    with pytest.raises(ValueError, match=r"here: cosine_schedule\(warmup=4, floor=0.0\)"):
        resume(ft.cosine_schedule(warmup=4))


def test_a_checkpoint_that_was_written_before_these_facts_were_kept_resumes(tmp_path):
    begin(tmp_path)
    arrays, facts = read_checkpoint(tmp_path)
    for key in ("seed", "schedule", "base", "data"):
        del facts[key]
    write_tensors(tmp_path / "checkpoint.safetensors", arrays, facts)
    straight = run_recipe("lora", tmp_path / "straight")
    check_equal_runs(straight, run_recipe("lora", tmp_path), tmp_path / "straight", tmp_path)


# ── settings that the library got after the checkpoint was written ───────────────────────────────────────────────────
def make_older(folder: Path) -> None:
    """Remove settings from a checkpoint, as if the library had not had them when it was written."""
    arrays, facts = read_checkpoint(folder)
    del facts["loss"]["fields"]["smoothing"], facts["methods"]["lora"]["fields"]["alpha"]
    facts["optimizer"] = facts["optimizer"].replace(", eps=1e-08", "")
    assert facts["optimizer"] == "AdamW(lr=0.02, weight_decay=0.01, rules={}, betas=(0.9, 0.999))"
    write_tensors(folder / "checkpoint.safetensors", arrays, facts)


def check_older(folder: Path) -> None:
    """A setting that a checkpoint lacks had its default: such a run goes on, and one with another value is refused."""
    begin(folder / "stopped")
    make_older(folder / "stopped")
    words = r"its loss: CrossEntropy\(smoothing=0.0\); here: CrossEntropy\(smoothing=0.1\)"
    check_refused(folder / "stopped", words, loss=ft.CrossEntropy(0.1))
    words = r"its optimizer: AdamW\(.*, eps=1e-08\); here: AdamW\(.*, eps=0.1\)"
    check_refused(folder / "stopped", words, optimizer=AdamW(0.02, eps=0.1))
    other = make_gpt(dropout=0.1)
    attach(other, LoRA(r=2, dropout=0.1, alpha=8))
    words = r"its methods: lora: LoRA\(.*alpha=16.0.*\); here: lora: LoRA\(.*alpha=8"
    check_refused(folder / "stopped", words, (other, *lora()[1:]))
    straight = run_recipe("lora", folder / "straight")
    check_equal_runs(straight, run_recipe("lora", folder / "stopped"), folder / "straight", folder / "stopped")


def test_a_setting_that_a_checkpoint_lacks_had_its_default(tmp_path):
    check_older(tmp_path)


def as_it_is(saved: Any, *_: Any) -> Any:
    """A setting that is not there differs from any other."""
    return saved


def call_as_today(saved: Any, ours: str, maker: Any) -> str:
    """A text that lacks a setting has today's value of it."""
    return ours


def as_today(saved: Any, ours: Any) -> Any:
    """A description that lacks a field has today's value of it."""
    return train.checkpoint.describe(ours)


@wrong_answers
@pytest.mark.parametrize("name, wrong", [("complete", as_it_is), ("complete", as_today), ("complete_call", as_it_is),
                                         ("complete_call", call_as_today)])
def test_a_setting_that_is_taken_for_another_is_caught(name, wrong, tmp_path):
    with replaced(train.checkpoint, name, wrong), pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        check_older(tmp_path)


@dataclass(frozen=True)
class Drop:
    """A factor before a step and another one from it on; `low` came later than the checkpoint."""
    at: int
    low: float = 0.1

    def __call__(self, t: int, T: int) -> float:
        return 1.0 if t < self.at else self.low


def test_a_schedule_that_lacks_a_setting_had_its_default():
    complete = train.same_run.complete_schedule
    assert complete("cosine_schedule(warmup=3)", ft.cosine_schedule(warmup=3)) == "cosine_schedule(warmup=3, floor=0.0)"
    for schedule, lacking in ((Drop(3), "low"), (functools.partial(scaled, Drop(3), t=0), "low")):
        facts = train.same_run.describe_schedule(schedule)
        text = json.dumps(facts)
        assert complete(json.loads(text.replace(f', "{lacking}": 0.1', "")), schedule) == facts
        assert lacking in text
    low = complete({"class": "test_same_run.Drop", "fields": {"at": 3}}, Drop(3, low=0.2))
    assert low == {"class": "test_same_run.Drop", "fields": {"at": 3, "low": 0.1}}
    for schedule in SCHEDULES:
        for saved in [*JUNK, "linear_schedule", "linear_schedule(", "linear_schedule(3)", "linear_schedule(**x)"]:
            assert complete(saved, schedule) is saved or complete(saved, schedule) == saved
    stored = "cosine_schedule(warmup=3, floor=0.0, cycles=2)"
    assert complete(stored, ft.cosine_schedule(warmup=3)) == stored, "a setting of a later version stays"


# ── all or nothing ───────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_model_of_another_dtype_is_refused_and_left_as_it_was(tmp_path):
    begin(tmp_path)
    model, batches, arguments = lora()
    model.to(dtype=np.float64)
    check_refused(tmp_path, "not in both, or of another shape or dtype", (model, batches, arguments))
    model.to(dtype=array.bfloat16)
    check_refused(tmp_path, "not in both, or of another shape or dtype", (model, batches, arguments))


def first_key(arrays: dict, start: str) -> str:
    return next(name for name in arrays if name.startswith(start))


Change = Callable[[dict, dict], None]


def without_a_moment(arrays: dict, facts: dict) -> None:
    del arrays[first_key(arrays, "optimizer/exp_avg_sq.")]


def without_any_moment(arrays: dict, facts: dict) -> None:
    for name in [name for name in arrays if name.startswith("optimizer/")]:
        del arrays[name]


def with_another_moment(arrays: dict, facts: dict) -> None:
    arrays["optimizer/exp_avg.other"] = np.zeros(3, np.float32)


def without_a_tensor(arrays: dict, facts: dict) -> None:
    del arrays[first_key(arrays, "model/")]


def with_another_tensor(arrays: dict, facts: dict) -> None:
    arrays["model/other"] = np.zeros(3, np.float32)


def with_a_mask_of_another_tensor(arrays: dict, facts: dict) -> None:
    arrays["mask/other"] = np.ones(3, bool)


def with_a_mask_of_another_shape(arrays: dict, facts: dict) -> None:
    arrays["mask/norm.weight"] = np.ones(7, bool)


def with_best_values_of_another_model(arrays: dict, facts: dict) -> None:
    arrays["best/model/other"] = np.zeros(3, np.float32)


def without_history(arrays: dict, facts: dict) -> None:
    del facts["history"]


def with_a_later_stage(arrays: dict, facts: dict) -> None:
    facts["stage"] = 9


def with_too_many_steps(arrays: dict, facts: dict) -> None:
    facts["done"] = 15


def with_another_random_state(arrays: dict, facts: dict) -> None:
    facts["rng"] = {"bit_generator": "PCG64", "state": {"state": "many", "inc": 3}}


def with_a_scale_of_zero(arrays: dict, facts: dict) -> None:
    facts["scaler"] = {"scale": 0.0, "good": 0}


def with_an_unknown_trainable_tensor(arrays: dict, facts: dict) -> None:
    facts["trainable"] = [*facts["trainable"], "other"]


def with_history_of_another_form(arrays: dict, facts: dict) -> None:
    facts["history"]["losses"] = "low"


def of_a_later_version(arrays: dict, facts: dict) -> None:
    facts["version"] = 3


CHANGES: list[tuple[Change, str]] = [
    (without_a_moment, "optimiser state belongs to other tensors"),
    (without_any_moment, "optimiser state belongs to other tensors"),
    (with_another_moment, "optimiser state belongs to other tensors"),
    (without_a_tensor, "another run: model/.* not in both"),
    (with_another_tensor, "another run: model/other not in both"),
    (with_a_mask_of_another_tensor, "another run: mask/other not in both"),
    (with_a_mask_of_another_shape, "another run: mask/norm.weight not in both, or of another shape"),
    (with_best_values_of_another_model, "another run: .*model/"),
    (without_history, "no checkpoint of fit: it does not hold history"),
    (with_a_later_stage, "no checkpoint of fit: stage wants a whole number from 0 to 1, got 9"),
    (with_too_many_steps, "no checkpoint of fit: done wants a whole number from 0 to 14, got 15"),
    (with_another_random_state, "no checkpoint of fit: "),
    (with_a_scale_of_zero, "no checkpoint of fit: scale wants a finite number > 0"),
    (with_an_unknown_trainable_tensor, "no checkpoint of fit: it names other, which are not in the model"),
    (with_history_of_another_form, "no checkpoint of fit: history: losses wants list"),
    (of_a_later_version, "no checkpoint of fit: a later version of the library wrote it"),
]


@pytest.mark.parametrize("change, words", CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_checkpoint_with_a_missing_or_strange_part_is_refused_before_anything_is_written(change, words, tmp_path):
    begin(tmp_path)
    arrays, facts = read_checkpoint(tmp_path)
    change(arrays, facts)
    write_tensors(tmp_path / "checkpoint.safetensors", arrays, facts)
    check_refused(tmp_path, words)


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "unfinished"])
def test_a_folder_with_a_run_is_refused_unless_it_is_resumed(is_finished, tmp_path):
    if is_finished:
        run_recipe("lora", tmp_path)
    else:
        begin(tmp_path)
    words = r"out holds a run, .*checkpoint.safetensors: resume=True goes on from it, or choose another folder"
    check_refused(tmp_path, words, resume=False)
    check_refused(tmp_path, words, resume=False, steps=3)
    run_recipe("lora", tmp_path)


def test_a_folder_that_cannot_be_written_to_is_noticed_before_training(tmp_path, monkeypatch):
    if os.geteuid() == 0:                                               # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        model = make_gpt()
        before = state_of(model)
        with pytest.raises(PermissionError, match="out wants a folder that can be written to"):
            fit(model, make_batches(), 3, out=tmp_path / "run", progress=False)
    finally:
        tmp_path.chmod(stat.S_IRWXU)
    assert differences(state_of(model), before) == []
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_noticed_before_training(tmp_path):
    model = make_gpt()
    before = state_of(model)
    with pytest.raises(OSError, match="out wants a folder that can be made, got "):
        fit(model, make_batches(), 3, out=tmp_path / ("x" * 300), progress=False)
    assert differences(state_of(model), before) == []


def test_the_folders_above_are_made(tmp_path):
    fit(make_gpt(), make_batches(), 1, out=tmp_path / "a" / "b", progress=False)
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["checkpoint.safetensors"]


# ── exceptions of the user's code ────────────────────────────────────────────────────────────────────────────────────
class Fault(Exception):
    """Raised by the user's code."""


def early_stopping_run(folder: Path, fail_at: int = 0) -> tuple[Any, ft.History]:
    """A run with an evaluation every 2 steps, the n-th of which fails."""
    model, batches, arguments = lora()
    calls = iter(range(1, 1000))

    def run_evaluation() -> dict[str, float]:
        if next(calls) == fail_at:
            raise Fault
        return {"loss": ft.evaluate(model, [make_ids(3, seed=9)])["loss"]}
    return run_parts(model, batches, arguments, folder, evaluate=run_evaluation, evaluate_every=2, patience=9,
                     save_every=0)


def test_an_evaluation_that_raises_leaves_the_last_step_in_the_checkpoint(tmp_path):
    """The resumed run begins with that evaluation, and ends bitwise as one that never stopped."""
    straight = early_stopping_run(tmp_path / "straight")
    with pytest.raises(Fault):
        early_stopping_run(tmp_path / "stopped", fail_at=3)
    assert read_checkpoint(tmp_path / "stopped")[1]["done"] == 6
    resumed = early_stopping_run(tmp_path / "stopped")
    check_equal_runs(straight, resumed, tmp_path / "straight", tmp_path / "stopped")
    assert [step for step, _ in resumed[1].evaluations] == [2, 4, 6, 8, 10, 12, 14]


class FailingBatches(Batches):
    """Batches whose n-th call raises, after the position has moved."""

    def __init__(self, *arguments: Any, fail_at: int = 0, **more: Any):
        super().__init__(*arguments, **more)
        self._calls = iter(range(1, 1000))
        self._fail_at = fail_at

    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        if next(self._calls) == self._fail_at:
            raise Fault
        return batch


class FailingList:
    """Batches that are counted; the n-th raises."""

    def __init__(self, batches: list, fail_at: int):
        self.batches = batches
        self.calls = iter(range(1, 1000))
        self.fail_at = fail_at

    def __iter__(self) -> Iterator:
        for batch in self.batches:
            if next(self.calls) == self.fail_at:
                raise Fault
            yield batch


def failing_stream(fail_at: int) -> FailingBatches:
    return FailingBatches(list(make_ids(11)), 2, seed=3, fail_at=fail_at)


def failing_list(fail_at: int) -> FailingList:
    return FailingList([make_ids(2, seed=s) for s in range(5)], fail_at)


@pytest.mark.parametrize("make", [failing_stream, failing_list])
@pytest.mark.parametrize("call", [11, 12])                              # the first and the second micro-batch of step 6
def test_batches_that_raise_leave_the_last_step_in_the_checkpoint(make, call, tmp_path):
    model, _, arguments = lora()
    straight = run_parts(lora()[0], make(0), lora()[2], tmp_path / "straight")
    with pytest.raises(Fault):
        run_parts(model, make(call), arguments, tmp_path / "stopped", save_every=0)
    assert read_checkpoint(tmp_path / "stopped")[1]["done"] == 5
    resumed = run_parts(lora()[0], make(0), lora()[2], tmp_path / "stopped")
    check_equal_runs(straight, resumed, tmp_path / "straight", tmp_path / "stopped")


def fault_in_the_schedule(model: Any) -> Callable[[int], None]:
    def at_step(step: int) -> None:
        if step == 6:
            raise Fault
    return at_step


def fault_in_the_forward_pass(model: Any) -> Callable[[int], None]:
    """In the second micro-batch of step 6, after dropout has drawn from the random generator."""
    calls = iter(range(1, 1000))
    forward = model.norm.forward

    def failing(x: Any, ctx: Any) -> Any:
        if next(calls) == 12:
            raise Fault
        return forward(x, ctx)
    model.norm.forward = failing
    return ignore_step


@pytest.mark.parametrize("break_it", [fault_in_the_schedule, fault_in_the_forward_pass])
def test_a_step_that_raises_before_its_update_leaves_the_step_before_it_in_the_checkpoint(break_it, tmp_path):
    straight = run_recipe("lora", tmp_path / "straight")
    model, batches, arguments = lora()
    at_step = break_it(model)
    with pytest.raises(Fault):
        run_parts(model, batches, arguments, tmp_path / "stopped", at_step=at_step, save_every=0)
    assert read_checkpoint(tmp_path / "stopped")[1]["done"] == 5
    check_equal_runs(straight, run_recipe("lora", tmp_path / "stopped"), tmp_path / "straight", tmp_path / "stopped")


def test_a_first_batch_that_raises_leaves_no_checkpoint(tmp_path):
    """There is nothing to resume, and the corrected call must not be refused."""
    with pytest.raises(ValueError, match="a batch wants ids"):
        fit(make_gpt(), [{}], 3, out=tmp_path, progress=False)
    fit(make_gpt(), [make_ids()], 3, out=tmp_path, progress=False)


def test_a_full_disk_does_not_hide_the_exception_of_the_batches(tmp_path, monkeypatch):
    def refuse(*arguments: Any, **more: Any) -> None:
        raise OSError("disk full")
    monkeypatch.setattr(train.loop, "write_tensors", refuse)
    model, _, arguments = lora()
    with pytest.raises(Fault):
        run_parts(model, failing_stream(11), arguments, tmp_path, save_every=0)


# ── SIGTERM ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def send(*numbers: int) -> Callable[[int], None]:
    """Send these signals to the process in the fourth step."""
    def at_step(step: int) -> None:
        if step == 4:
            for number in numbers:
                os.kill(os.getpid(), number)
    return at_step


def test_sigterm_finishes_the_step_writes_the_state_and_exits_with_143(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_request:
        run_recipe("lora", tmp_path / "stopped", at_step=send(signal.SIGTERM))
    assert exit_request.value.code == 143
    assert read_checkpoint(tmp_path / "stopped")[1]["done"] == 4
    assert signal.getsignal(signal.SIGTERM) is before
    straight = run_recipe("lora", tmp_path / "straight")
    check_equal_runs(straight, run_recipe("lora", tmp_path / "stopped"), tmp_path / "straight", tmp_path / "stopped")


def test_a_second_signal_stops_at_once(tmp_path):
    with pytest.raises(SystemExit) as exit_request:
        run_recipe("lora", tmp_path, at_step=send(signal.SIGTERM, signal.SIGTERM))
    assert exit_request.value.code == 143
    assert read_checkpoint(tmp_path)[1]["done"] == 3
    with pytest.raises(KeyboardInterrupt):
        run_recipe("lora", tmp_path, at_step=send(signal.SIGTERM, signal.SIGINT))


def test_a_handler_of_the_program_acts_after_the_step_and_the_run_may_go_on(tmp_path):
    received = []

    def note(number: int, frame: Any) -> None:
        received.append((number, read_checkpoint(tmp_path)[1]["done"]))
    before = signal.signal(signal.SIGTERM, note)
    try:
        _, history = run_recipe("lora", tmp_path, at_step=send(signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) is note
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [(signal.SIGTERM, 4)]
    assert len(history.losses) == 14


def test_a_run_without_a_checkpoint_leaves_sigterm_to_the_program():
    """There is nothing to write: the process may end at once."""
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    run_recipe("lora", None, at_step=lambda step: seen.append(signal.getsignal(signal.SIGTERM)))
    assert set(seen) == {before}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_that_the_program_ignores_stays_ignored(number, tmp_path):
    """`nohup` starts programs that ignore Ctrl-C."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        _, history = run_recipe("lora", tmp_path, at_step=send(number))
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert len(history.losses) == len(run_recipe("lora", None)[1].losses)


@pytest.mark.slow
def test_a_process_that_gets_sigterm_leaves_a_checkpoint(tmp_path):
    code, errors = finish_process(start_process("lora", tmp_path), 2, signal.SIGTERM)
    assert code == 143, errors
    assert read_checkpoint(tmp_path)[1]["done"] >= 2


# ── positions of data.Batches ────────────────────────────────────────────────────────────────────────────────────────
def test_after_the_last_batch_of_an_epoch_the_next_one_begins_an_epoch():
    batches = make_batches()
    for _ in range(len(batches)):
        next(batches)
    state = batches.state_dict()
    assert (state["epoch"], state["batch"]) == (0, len(batches))
    following = next(batches)
    state_after = batches.state_dict()
    assert (state_after["epoch"], state_after["batch"]) == (1, 1)
    resumed = make_batches()
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert np.array_equal(next(resumed)["ids"], following["ids"])
    assert resumed.state_dict() == state_after


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.skipif(array.backend() == "cupy", reason="there the memory pool is asked")
@pytest.mark.parametrize("was_on", [False, True])
def test_peak_memory_leaves_tracing_as_it_was(was_on):
    import tracemalloc
    assert not tracemalloc.is_tracing()
    if was_on:
        tracemalloc.start()
    try:
        with ft.peak_memory() as peak:
            np.ones(100_000)
        assert peak["bytes"] >= 800_000
        assert tracemalloc.is_tracing() == was_on
        with pytest.raises(Fault), ft.peak_memory():
            raise Fault
        assert tracemalloc.is_tracing() == was_on
    finally:
        tracemalloc.stop()


def test_other_optimisers_check_their_own_state(tmp_path):
    """An optimiser with a state of its own form is not checked by that of the library's."""
    class Own(SGD):
        def state_dict(self) -> dict[str, np.ndarray]:
            return {**super().state_dict(), "own": np.ones(2)}

        def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
            super().load_state_dict({key: a for key, a in state.items() if key != "own"})
    model, batches, arguments = lora()
    begin(tmp_path, (model, batches, arguments | {"optimizer": Own(0.1)}))
    other = make_gpt(dropout=0.1)
    attach(other, LoRA(r=2, dropout=0.1))
    _, history = run_parts(other, make_batches(), arguments | {"optimizer": Own(0.1)}, tmp_path)
    assert len(history.losses) == 14


# ── damaged facts ────────────────────────────────────────────────────────────────────────────────────────────────────
JUNK: list[Any] = [None, -1, 10**30, 0.5, float("nan"), "x", "", [], {}, [[]], [1], ["x"], {"x": 1}, [[1, 2, 3]], True]


def open_run(folder: Path) -> train.loop.Run:
    """The run of the recipe `lora`, before it reads its checkpoint."""
    model, batches, arguments = lora()
    settings = train.settings.Settings(14, 1.0, arguments["accumulate"], None, 0, "loss", None, recompute=False,
                                       capture=False, seed=7)
    stream = train.batch.BatchStream(batches)
    rng = np.random.default_rng(7)
    loss = train.CrossEntropy()
    return train.loop.Run(model, loss, stream, arguments["optimizer"], ft.constant_schedule(), rng, settings, folder)


def damage(rng: np.random.Generator, facts: Any) -> None:
    """Replace or remove one entry somewhere in a tree of dicts and lists."""
    inner = [value for value in (facts.values() if isinstance(facts, dict) else facts) if value and is_tree(value)]
    if inner and rng.random() < 0.5:
        damage(rng, inner[rng.integers(len(inner))])
        return
    keys = list(facts) if isinstance(facts, dict) else list(range(len(facts)))
    key = keys[rng.integers(len(keys))]
    if rng.random() < 0.2:
        del facts[key]
    else:
        facts[key] = JUNK[rng.integers(len(JUNK))]


def is_tree(value: Any) -> bool:
    return isinstance(value, (dict, list))


def damage_arrays(rng: np.random.Generator, arrays: dict[str, np.ndarray]) -> None:
    """Remove, rename, reshape or convert one array, or add another."""
    name = list(arrays)[rng.integers(len(arrays))]
    value = arrays.pop(name)
    changes = [{}, {name[1:]: value}, {name: value.reshape(-1)[None]}, {name: value.astype(np.float16)},
               {name: value, f"{name}x": value}, {name: value, "other": value}]
    arrays |= changes[rng.integers(len(changes))]


@pytest.mark.parametrize("seed", range(8))
def test_a_checkpoint_with_damaged_facts_is_refused_in_one_sentence_or_fits(seed, tmp_path):
    """The checksum finds damaged bytes; here the content is wrong and the checksum right."""
    run = open_run(tmp_path)
    begin(tmp_path)
    arrays, facts = read_checkpoint(tmp_path)
    facts["schedule"] = run.identity["schedule"]
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(25):
        before = state_of(run.model)
        some, other = dict(arrays), json.loads(json.dumps(facts))
        if rng.random() < 0.3:
            damage_arrays(rng, some)
        else:
            damage(rng, other)
        try:
            run.load_state_dict(some, other)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
            assert differences(state_of(run.model), before) == []
        else:
            run = open_run(tmp_path)
    assert refused > 10
