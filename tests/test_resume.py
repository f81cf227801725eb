"""Runs that are killed and resumed, and their checkpoints.

Run as a script, `python test_resume.py RECIPE FOLDER`, this file trains one of RECIPES and prints a line per step.
The tests kill such processes.
"""
from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import host, of_the_host, wrong_answers

import tinyft as ft
from tinyft import SGD, AdamW, Edit, LoRA, Method, Parameter, Phase, array, attach, fit, train
from tinyft.data import Batches
from tinyft.files import read_tensors, write_tensors

VOCAB, POSITIONS, WIDTH, CLASSES = 19, 12, 12, 3


# ── models, data, comparisons ────────────────────────────────────────────────────────────────────────────────────────
def make_gpt(dropout: float = 0.0, width: int = WIDTH) -> ft.GPT:
    return ft.GPT(ft.GPTConfig(VOCAB, POSITIONS, width, 2, 3, 16, dropout))


def make_classifier() -> ft.BERT:
    model = ft.BERT(ft.BERTConfig(VOCAB, POSITIONS, 2, WIDTH, 2, 3, 16))
    model.new_head(CLASSES, np.random.default_rng(0))
    return model


def make_ids(rows: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, 8))


def make_batches(examples: int = 11) -> Batches:
    return Batches(list(make_ids(examples)), 2, seed=3)


def state_of(model: Any) -> dict[str, np.ndarray]:
    return {name: np.array(host(value)) for name, value in model.state_dict().items()}


def differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """The names under which two sets of arrays differ, bitwise."""
    different = sorted(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        if a[name].dtype != b[name].dtype or not np.array_equal(a[name], b[name]):
            different.append(name)
    return different


# ── a method with phases ─────────────────────────────────────────────────────────────────────────────────────────────
class Sparse(Edit):
    """W + δ, where δ moves only where the mask μ is True."""

    def __init__(self, shape: tuple):
        self.delta = Parameter(array.asarray(np.zeros(shape, np.float32)))
        self.mu = array.asarray(np.ones(shape, bool))

    def tensor(self, name: str, p: Any) -> Any:
        return p + self.delta if name == "weight" else p


@dataclass(frozen=True)
class Ticket(Method):
    """Train δ, select the entries that moved furthest, set δ to 0, train these.

    buffer: True if the mask is a buffer of the edit, False if only the tensor has it.
    """
    share: float = 0.3
    buffer: bool = True
    targets: Any = "attn.[qv]"

    def edit(self, path: str, module: Any, rng: np.random.Generator) -> Edit:
        return Sparse(module.weight.shape)

    def phases(self) -> list[Phase]:
        return [Phase(0.5), Phase(0.5, self.select_entries)]

    def select_entries(self, model: Any, edits: dict[str, Edit], batches: Iterator, rng: np.random.Generator) -> None:
        for edit in edits.values():
            distance = np.abs(host(edit.delta))
            mask = array.asarray(distance >= np.quantile(distance, 1 - self.share))
            if self.buffer:
                edit.mu[...] = mask
            edit.delta.mask = edit.mu if self.buffer else mask
            edit.delta.copy_(np.zeros(distance.shape, np.float32))


setup_calls: list[str] = []                              # the setups that ran in this process, in order
kill_setup_after = [0]                                   # kill the n-th setup call from now in the middle; 0: none


@dataclass(frozen=True)
class Staged(LoRA):
    """LoRA with a setup at the start, in the middle and at the end. They draw numbers, take batches and freeze."""

    def phases(self) -> list[Phase]:
        return [Phase(0.4, self.initialise), Phase(0.6, self.freeze), Phase(0, self.round)]

    def initialise(self, model: Any, edits: dict, batches: Iterator, rng: np.random.Generator) -> None:
        """Set B to random numbers, scaled by the mean of a batch of ids."""
        scale = float(next(batches)["ids"].mean()) / VOCAB
        for edit in edits.values():
            edit.B.copy_(rng.standard_normal(edit.B.shape).astype(np.float32) * 0.1 * scale)
        self.finish("initialise", model)

    def freeze(self, model: Any, edits: dict, batches: Iterator, rng: np.random.Generator) -> None:
        """Freeze A of the first block, mask a random half of every B, and change a frozen weight of the base."""
        next(batches)
        for i, edit in enumerate(edits.values()):
            edit.A.requires_grad = i >= 2
            edit.B.mask = array.asarray(rng.random(edit.B.shape) < 0.5)
        model.norm.weight.copy_(np.full(WIDTH, 0.9, np.float32))
        self.finish("freeze", model)

    def round(self, model: Any, edits: dict, batches: Iterator, rng: np.random.Generator) -> None:
        """Round every B to hundredths."""
        for edit in edits.values():
            edit.B.copy_(np.round(host(edit.B), 2))
        self.finish("round", model)

    def finish(self, name: str, model: Any) -> None:
        setup_calls.append(name)
        if kill_setup_after[0]:
            kill_setup_after[0] -= 1
            if kill_setup_after[0] == 0:
                raise Killed


@dataclass(frozen=True)
class Measured(ft.BitFit):
    """A method with one training phase and a setup before it."""

    def phases(self) -> list[Phase]:
        return [Phase(1.0, self.measure)]

    def measure(self, model: Any, edits: dict, batches: Iterator, rng: np.random.Generator) -> None:
        setup_calls.append("measure")
        rng.standard_normal(3)


# ── runs that can be stopped ─────────────────────────────────────────────────────────────────────────────────────────
Recipe = tuple[Any, Any, dict[str, Any]]                 # model, batches, arguments of fit


def lora() -> Recipe:
    model = make_gpt(dropout=0.1)
    attach(model, LoRA(r=2, dropout=0.1))
    schedule = ft.cosine_schedule(warmup=3)
    return model, make_batches(), dict(steps=14, optimizer=AdamW(0.02), schedule=schedule, accumulate=2)


def full() -> Recipe:
    return make_gpt(dropout=0.1), make_batches(), dict(steps=14, optimizer=AdamW(0.01))


def phases() -> Recipe:
    model = make_gpt(dropout=0.1)
    attach(model, Ticket())
    return model, make_batches(), dict(steps=14, optimizer=AdamW(0.01), schedule=ft.cosine_schedule(warmup=2))


def phases_with_a_mask_on_the_tensor() -> Recipe:
    model = make_gpt()
    attach(model, Ticket(buffer=False))
    return model, make_batches(), dict(steps=14, optimizer=AdamW(0.01))


def setups() -> Recipe:
    model = make_gpt(dropout=0.1)
    attach(model, Staged(r=2))
    attach(model, Measured())
    return model, make_batches(), dict(steps=14, optimizer=AdamW(0.01))


def early_stopping() -> Recipe:
    model = make_classifier()
    attach(model, LoRA(r=2))
    batches = [{"ids": make_ids(seed=s), "labels": make_ids(seed=s)[:, 0] % CLASSES} for s in range(3)]

    def run_evaluation() -> dict[str, float]:
        return {"loss": distance_to_goal(model)}
    return model, batches, dict(steps=60, optimizer=AdamW(0.02), evaluate=run_evaluation, evaluate_every=2, patience=3)


def distance_to_goal(model: Any) -> float:
    """Falls while the norm of B grows towards 0.3, and rises when it is larger."""
    return abs(0.3 - float(np.linalg.norm(host(model.blocks[0].attn.q.edits["lora"].B))))


def a_list_of_batches() -> Recipe:
    model = make_gpt(dropout=0.1)
    attach(model, LoRA(r=2), name="model")               # a name that looks like a part of a checkpoint
    batches = [make_ids(2, seed=s) for s in range(5)]
    return model, batches, dict(steps=14, optimizer=SGD(0.1, momentum=0.9), accumulate=2)


ALL_RECIPES = [lora, full, phases, phases_with_a_mask_on_the_tensor, setups, early_stopping, a_list_of_batches]
RECIPES: dict[str, Callable[[], Recipe]] = {recipe.__name__: recipe for recipe in ALL_RECIPES}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def ignore_step(step: int) -> None:
    pass


def run_recipe(recipe: str, out: Path | None, resume: bool = True, at_step: Callable[[int], Any] = ignore_step,
               **changes: Any) -> tuple[Any, ft.History]:
    """Run a recipe from new objects. `at_step` is called in every step with its number in this process, from 1."""
    return run_parts(*RECIPES[recipe](), out=out, resume=resume, at_step=at_step, **changes)


def run_parts(model: Any, batches: Any, arguments: dict[str, Any], out: Path | None, resume: bool = True,
              at_step: Callable[[int], Any] = ignore_step, **changes: Any) -> tuple[Any, ft.History]:
    """Run the parts of a recipe; see run_recipe."""
    schedule = arguments.pop("schedule", None) or ft.constant_schedule()
    steps = iter(range(1, 1000))

    def counted_schedule(t: int, T: int) -> float:
        at_step(next(steps))
        return schedule(t, T)

    arguments = {"save_every": 3, "progress": False, "seed": 7, **arguments, **changes}
    history = fit(model, batches, schedule=counted_schedule, out=out, resume=resume, **arguments)
    return model, history


def kill_at(step: int) -> Callable[[int], None]:
    def at_step(now: int) -> None:
        if now == step:
            raise Killed
    return at_step


def read_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(arrays, facts) that a run wrote."""
    return read_tensors(folder / "checkpoint.safetensors")


def check_equal_runs(
    straight: tuple[Any, ft.History], resumed: tuple[Any, ft.History], folder: Path, other: Path,
) -> None:
    """Two runs have the same history, the same model and the same checkpoint, bitwise."""
    assert straight[1] == resumed[1], "the histories differ"
    arrays, facts = read_checkpoint(folder)
    other_arrays, other_facts = read_checkpoint(other)
    assert differences(arrays, other_arrays) == []
    assert facts == other_facts
    assert differences(state_of(straight[0]), state_of(resumed[0])) == []


def check_resume(recipe: str, folder: Path, kills: list[int]) -> None:
    """A run that is killed in the n-th step of each process, and resumed, ends bitwise as one that never stops."""
    straight = run_recipe(recipe, folder / "straight")
    for step in kills:
        with pytest.raises(Killed):
            run_recipe(recipe, folder / "killed", at_step=kill_at(step))
    resumed = run_recipe(recipe, folder / "killed")
    check_equal_runs(straight, resumed, folder / "straight", folder / "killed")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_and_resumed_run_is_bitwise_one_that_never_stopped(recipe, tmp_path):
    check_resume(recipe, tmp_path / "a", [2, 5, 1, 4])
    draw = random.Random(recipe)
    check_resume(recipe, tmp_path / "b", [draw.randint(1, 5) for _ in range(3)])


FORGOTTEN = [
    ("the moments", "lora"), ("the random state", "lora"), ("the data", "lora"), ("the step", "lora"),
    ("the data", "a_list_of_batches"), ("the values", "full"), ("the moments", "phases"), ("the masks", "phases"),
    ("the masks", "phases_with_a_mask_on_the_tensor"), ("requires_grad", "setups"), ("the masks", "setups"),
    ("a base tensor that a setup changed", "setups"), ("the best", "early_stopping"),
]
KILLS = {"early_stopping": [11], "phases": [9, 4], "phases_with_a_mask_on_the_tensor": [9, 4], "setups": [9, 4]}


@wrong_answers
@pytest.mark.parametrize("forgotten, recipe", FORGOTTEN)
def test_a_resume_that_forgets_something_is_caught(forgotten, recipe, tmp_path, monkeypatch):
    right = train.loop.Run.load_state_dict

    def forgetful(run: train.loop.Run, arrays: dict, facts: dict) -> None:
        random_state = run.rng.bit_generator.state
        trainable = [p for p in run.model.parameters() if p.requires_grad]
        if forgotten == "the data":
            facts = facts | {"batches": run.stream.state_dict()}
        if forgotten == "the values":
            arrays = arrays | train.checkpoint.copy_values(run)
        if forgotten == "the masks":
            arrays = {name: value for name, value in arrays.items() if not name.startswith("mask/")}
            facts = facts | {"shared_masks": {}}
        if forgotten == "the moments":
            arrays = {name: value for name, value in arrays.items() if not name.startswith("optimizer/")}
        if forgotten == "a base tensor that a setup changed":
            arrays = {name: value for name, value in arrays.items() if name != "model/norm.weight"}
        if forgotten == "the best":
            arrays = {name: value for name, value in arrays.items() if not name.startswith("best/")}
        right(run, arrays, facts)
        if forgotten == "the random state":
            run.rng.bit_generator.state = random_state
        if forgotten == "requires_grad":
            for p in trainable:
                p.requires_grad = True
        if forgotten == "the step":
            run.t += 1
    monkeypatch.setattr(train.loop.Run, "load_state_dict", forgetful)
    with pytest.raises((AssertionError, ValueError)):
        check_resume(recipe, tmp_path, KILLS.get(recipe, [5, 3]))


def test_early_stopping_stops_and_restores_the_best_state(tmp_path):
    model, history = run_recipe("early_stopping", tmp_path)
    losses = [metrics["loss"] for _, metrics in history.evaluations]
    best = int(np.argmin(losses))
    assert history.stopped
    assert len(history.losses) < 60
    assert 0 < best < len(losses) - 1
    assert len(losses) - 1 - best == 3
    _, facts = read_checkpoint(tmp_path)
    assert facts["history"]["stopped"] == history.stopped
    assert distance_to_goal(model) == losses[best] != losses[-1]
    again, same_history = run_recipe("early_stopping", tmp_path)        # resuming a finished run does nothing
    assert same_history == history
    assert differences(state_of(again), state_of(model)) == []


# ── setups of phases ─────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def calls():
    setup_calls.clear()
    kill_setup_after[0] = 0
    yield setup_calls
    kill_setup_after[0] = 0


ALL_SETUPS = ["initialise", "measure", "freeze", "round"]


def check_killed_setup(folder: Path, setup: int) -> None:
    """A run that is killed inside its n-th setup, and resumed, ends bitwise as one that never stops."""
    straight = run_recipe("setups", folder / "straight")
    kill_setup_after[0] = setup
    with pytest.raises(Killed):
        run_recipe("setups", folder / "killed", save_every=0)
    resumed = run_recipe("setups", folder / "killed")
    check_equal_runs(straight, resumed, folder / "straight", folder / "killed")


@pytest.mark.parametrize("setup", [1, 2, 3])
def test_a_run_killed_inside_a_setup_ends_bitwise_the_same(setup, tmp_path, calls):
    check_killed_setup(tmp_path, setup)
    before = {1: [], 2: ["initialise", "measure"], 3: ["initialise", "measure", "freeze"]}[setup]
    killed = {1: "initialise", 2: "freeze", 3: "round"}[setup]
    after = {1: ALL_SETUPS, 2: ["freeze", "round"], 3: ["round"]}[setup]
    assert calls == [*ALL_SETUPS, *before, killed, *after]


@pytest.mark.parametrize("step", [1, 7, 10])
def test_a_setup_runs_once_and_not_again_after_a_kill(step, tmp_path, calls):
    """Killed in the first step after a setup, or later, without any other checkpoint: the setup is not run again."""
    straight = run_recipe("setups", tmp_path / "straight")
    assert calls == ALL_SETUPS
    calls.clear()
    with pytest.raises(Killed):
        run_recipe("setups", tmp_path / "killed", at_step=kill_at(step), save_every=0)
    resumed = run_recipe("setups", tmp_path / "killed")
    assert calls == ALL_SETUPS
    check_equal_runs(straight, resumed, tmp_path / "straight", tmp_path / "killed")


@wrong_answers
def test_a_setup_that_runs_twice_is_caught(tmp_path, calls, monkeypatch):
    right = train.loop.Run.load_state_dict

    def one_stage_back(run: train.loop.Run, arrays: dict, facts: dict) -> None:
        right(run, arrays, facts)
        if run.t == 0 and run.stage_index:
            run.stage_index -= 1
    monkeypatch.setattr(train.loop.Run, "load_state_dict", one_stage_back)
    with pytest.raises(AssertionError):
        test_a_setup_runs_once_and_not_again_after_a_kill(1, tmp_path, calls)


def test_batches_of_a_setup_are_consumed_and_its_gradients_are_cleared(calls):
    taken = []

    @dataclass(frozen=True)
    class Backward(LoRA):
        def phases(self) -> list[Phase]:
            return [Phase(1.0, self.measure)]

        def measure(self, model: Any, edits: dict, batches: Iterator, rng: np.random.Generator) -> None:
            taken.append(next(batches))
            train.compute_loss(model, train.read_batch(taken[0]))[1].backward()
            assert any(p.grad is not None for p in model.parameters())

        def begin(self, edits: dict, t: int, T: int, rng: np.random.Generator) -> None:
            assert all(p.grad is None for edit in edits.values() for p in edit.parameters())
    model = make_gpt()
    attach(model, Backward(r=2))
    own = [make_ids(2, seed=s) for s in range(3)]
    history = fit(model, own, 1, progress=False)
    other = make_gpt()
    attach(other, LoRA(r=2))
    assert taken[0] is own[0]
    assert fit(other, own[1:], 1, progress=False).losses == history.losses


def test_a_setup_that_changes_names_is_refused():
    @dataclass(frozen=True)
    class Growing(LoRA):
        def phases(self) -> list[Phase]:
            return [Phase(1.0, self.grow)]

        def grow(self, model: Any, edits: dict, batches: Iterator, rng: np.random.Generator) -> None:
            next(iter(edits.values())).extra = Parameter(array.asarray(np.zeros(2, np.float32)))
    model = make_gpt()
    attach(model, Growing(r=2))
    with pytest.raises(ValueError, match="setup of growing changed names or shapes"):
        fit(model, make_batches(), 3, progress=False)


@pytest.mark.parametrize("shares", [[0.5, 0.4], [0.5, 0.6], [], [0], [1.5, -0.5]], ids=str)
def test_shares_that_do_not_sum_to_one_are_refused(shares):
    @dataclass(frozen=True)
    class Shares(LoRA):
        def phases(self) -> list[Phase]:
            return [Phase(share) for share in shares]
    model = make_gpt()
    attach(model, Shares(r=2))
    with pytest.raises(ValueError, match="the phases of shares want shares of the steps that sum to 1"):
        fit(model, make_batches(), 3, progress=False)


def test_an_early_stop_leaves_out_later_phases_but_not_the_final_setup(calls):
    model = make_gpt()
    attach(model, Staged(r=2))
    scores = iter([1.0, 2.0, 3.0, 4.0])

    def run_evaluation() -> dict[str, float]:
        return {"loss": next(scores)}
    history = fit(model, make_batches(), 14, evaluate=run_evaluation, evaluate_every=1, patience=1, progress=False)
    assert len(history.losses) == 2
    assert calls == ["initialise", "round"]


# ── processes that are killed ────────────────────────────────────────────────────────────────────────────────────────
def start_process(recipe: str, out: Path, suicide: str = "") -> subprocess.Popen:
    """Run a recipe in its own process. suicide: "fsync 2" sends SIGKILL in place of the second call of os.fsync."""
    root = Path(ft.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "TINYFT_BACKEND": array.backend(), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, recipe, str(out), suicide]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish_process(process: subprocess.Popen, steps: int, signal_number: int | None = None) -> tuple[int, str]:
    """Wait until the process has taken so many steps, send a signal, and return its exit status and its stderr."""
    for _ in range(steps):
        process.stdout.readline()
    if signal_number is not None:
        process.send_signal(signal_number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def check_equal_checkpoints(folder: Path, other: Path) -> None:
    arrays, facts = read_checkpoint(folder)
    other_arrays, other_facts = read_checkpoint(other)
    assert differences(arrays, other_arrays) == []
    assert facts == other_facts


@of_the_host
@pytest.mark.slow
def test_a_process_killed_at_random_moments_and_resumed_ends_bitwise_the_same(tmp_path):
    straight = tmp_path / "straight"
    killed = tmp_path / "killed"
    run_recipe("lora", straight)
    draw = random.Random(1)
    codes = []
    # A kill at fsync is in the middle of a write, a kill at replace is before the file moves.
    for suicide in ("", "", "fsync 1", "", "replace 2"):
        process = start_process("lora", killed, suicide)
        if suicide:
            code, _ = finish_process(process, 99)
        else:
            code, _ = finish_process(process, draw.randint(1, 4), signal.SIGKILL)
        codes.append(code)
    assert codes == [-signal.SIGKILL] * 5
    assert read_checkpoint(killed)[1]["done"] < 14, "killed too late to show anything"
    assert list(killed.glob(".*")), "a kill in the middle of a write leaves a part of a file behind"
    code, errors = finish_process(start_process("lora", killed), 0)
    assert code == 0, errors
    check_equal_checkpoints(straight, killed)
    assert [path.name for path in killed.iterdir()] == ["checkpoint.safetensors"]       # the next run removed that part


@of_the_host
@pytest.mark.slow
def test_ctrl_c_finishes_the_step_writes_the_state_and_the_run_goes_on_bitwise(tmp_path):
    straight = tmp_path / "straight"
    stopped = tmp_path / "stopped"
    run_recipe("lora", straight)
    code, errors = finish_process(start_process("lora", stopped), 2, signal.SIGINT)
    assert code in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt: stopped after step" in errors
    done = read_checkpoint(stopped)[1]["done"]
    assert done >= 2
    assert f"after step {done} of 14; fit(..., resume=True) goes on" in errors
    run_recipe("lora", stopped)
    check_equal_checkpoints(straight, stopped)


def press_ctrl_c(times: int) -> Callable[[int], None]:
    """Press Ctrl-C in the fourth step."""
    def at_step(step: int) -> None:
        if step == 4:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
    return at_step


def test_ctrl_c_in_a_step_acts_after_the_step_and_a_second_one_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="after step 4 of 14"):
        run_recipe("lora", tmp_path / "once", at_step=press_ctrl_c(1))
    assert read_checkpoint(tmp_path / "once")[1]["done"] == 4
    with pytest.raises(KeyboardInterrupt):
        run_recipe("lora", tmp_path / "twice", at_step=press_ctrl_c(2))
    assert read_checkpoint(tmp_path / "twice")[1]["done"] == 3
    assert signal.getsignal(signal.SIGINT) is before


# ── checkpoints of other runs, damaged ones, and full disks ──────────────────────────────────────────────────────────
def resume_with(**changes: Any) -> Callable[[Path], None]:
    def resume(out: Path) -> None:
        run_recipe("lora", out, **changes)
    return resume


def resume_lora(out: Path, model: Any, batches: Any) -> None:
    run_parts(model, batches, lora()[2], out)


def resume_with_another_method(out: Path) -> None:
    model = make_gpt(dropout=0.1)
    attach(model, LoRA(r=2, alpha=99, dropout=0.1))
    resume_lora(out, model, make_batches())


def resume_with_another_name(out: Path) -> None:
    model = make_gpt(dropout=0.1)
    attach(model, LoRA(r=2, dropout=0.1), name="other")
    resume_lora(out, model, make_batches())


def resume_with_another_model(out: Path) -> None:
    model = make_gpt(width=24)
    attach(model, LoRA(r=2, dropout=0.1))
    resume_lora(out, model, make_batches())


def resume_with_another_trainable_tensor(out: Path) -> None:
    model = lora()[0]
    model.norm.bias.requires_grad = True
    resume_lora(out, model, make_batches())


def resume_with_data(batches: Any) -> Callable[[Path], None]:
    def resume(out: Path) -> None:
        resume_lora(out, lora()[0], batches)
    return resume


@pytest.mark.parametrize("resume, words", [
    (resume_with(steps=15), "its steps: 14; here: 15"),
    (resume_with(accumulate=1), "its accumulate: 2; here: 1"),
    (resume_with(optimizer=AdamW(0.03)), r"its optimizer: AdamW\(lr=0.02"),
    (resume_with(optimizer=ft.Adam(0.02)), "here: Adam"),
    (resume_with(optimizer=SGD(0.02)), "here: SGD"),
    (resume_with(clip=None), "its clip: 1.0"),
    (resume_with_another_method, "its methods: lora: LoRA.*; here: lora: LoRA.*alpha=99"),
    (resume_with_another_name, "its methods: lora: LoRA.*; here: other: LoRA"),
    (resume_with_another_model, r"another run: .*blocks\.0\.attn\.q\.edits\.lora\.A"),
    (resume_with_another_trainable_tensor, "another run: norm.bias trains in one of the two only"),
    (resume_with_data([make_ids()]), "another kind of batches"),
    (resume_with_data(make_batches(12)), "examples 12, got 11"),
])
def test_resuming_another_run_is_refused_naming_the_difference(resume, words, tmp_path):
    with pytest.raises(Killed):
        run_recipe("lora", tmp_path, at_step=kill_at(8))
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match=words) as error:
        resume(tmp_path)
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_refused_resume_leaves_the_model_as_it_was(tmp_path):
    run_recipe("full", tmp_path)
    model, batches, _ = full()
    before = state_of(model)
    with pytest.raises(ValueError, match="here: SGD"):
        fit(model, batches, 14, SGD(1.0), out=tmp_path, resume=True, progress=False)
    assert differences(state_of(model), before) == []


def test_a_damaged_checkpoint_gives_one_sentence(tmp_path):
    run_recipe("full", tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    good = path.read_bytes()
    for length in (0, 5, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged") as error:
            run_recipe("full", tmp_path)
        assert "\n" not in str(error.value)
    for position in (3, 60, len(good) // 2, len(good) - 1):             # one bit, in the header and in the numbers
        flipped = bytearray(good)
        flipped[position] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged"):
            run_recipe("full", tmp_path)
    write_tensors(path, {"x": np.zeros(3)}, {"sum": "of something else"})
    with pytest.raises(ValueError, match="no checkpoint of fit"):
        run_recipe("full", tmp_path)


def raise_full_disk(*args: Any, **more: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["fsync", "replace", "write"])
def test_a_full_disk_leaves_the_old_checkpoint_whole_and_no_other_file(where, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        run_recipe("lora", tmp_path, at_step=kill_at(5))
    path = tmp_path / "checkpoint.safetensors"
    before = path.read_bytes()
    if where == "write":                                                # the system itself stops the write half way
        resource = pytest.importorskip("resource", reason="needs POSIX limits")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    else:
        monkeypatch.setattr(os, where, raise_full_disk)
    try:
        words = r"could not write .*checkpoint\.safetensors.* what was there before is untouched"
        with pytest.raises(OSError, match=words):
            run_recipe("lora", tmp_path)
    finally:
        monkeypatch.undo()
        if where == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    run_recipe("lora", tmp_path)
    run_recipe("lora", tmp_path / "straight")
    assert differences(read_checkpoint(tmp_path)[0], read_checkpoint(tmp_path / "straight")[0]) == []


# ── checkpoints of version 0.1 ───────────────────────────────────────────────────────────────────────────────────────
OLD = Path(__file__).parent / "data" / "version_0_1"


def old_gpt(vocab: int = VOCAB, dropout: float = 0.0) -> ft.GPT:
    return with_noise(ft.GPT(ft.GPTConfig(vocab, 16, WIDTH, 2, 3, 20, dropout), seed=3))


def old_classifier() -> ft.BERT:
    model = with_noise(ft.BERT(ft.BERTConfig(VOCAB, 16, 2, WIDTH, 2, 3, 20), seed=3))
    ft.classifier(model, CLASSES, seed=1)
    return model


def old_large_classifier() -> ft.GPT:
    model = old_gpt(3000)
    ft.classifier(model, CLASSES, seed=1)
    embedding = np.array(host(model.embed.weight))
    embedding[VOCAB:] = 0
    model.embed.weight.copy_(embedding)
    return model


def with_noise(model: Any) -> Any:
    rng = np.random.default_rng(4)
    for p in model.parameters():
        p.copy_(host(p) + rng.standard_normal(p.shape).astype(np.float32) * 0.2)
    return model


def old_run(name: str) -> tuple[Any, Method | None, Any, dict[str, Any]]:
    """(model, method, optimiser, further arguments of fit) of a run that version 0.1 stopped half way."""
    if name == "run-lora":
        return old_gpt(dropout=0.1), LoRA(r=2, dropout=0.1, targets="attn.[qv]"), AdamW(0.02), {}
    if name == "run-prefix-mlp":
        return old_classifier(), ft.PrefixTuning(p=2, mlp=5), AdamW(0.02), {"accumulate": 2}
    if name == "run-full-large":
        optimizer = SGD(0.02, momentum=0.9, groups={"*.norm*": {"lr": 0.01}})
        return old_large_classifier(), None, optimizer, {}
    return old_gpt().to(dtype=np.float16), ft.Full(), AdamW(0.02), {"autocast": "float16"}


def old_batches(name: str) -> list[dict[str, np.ndarray]]:
    expected, _ = read_tensors(OLD / "expected.safetensors")
    if name in ("run-lora", "run-float16"):
        return [{"ids": ids} for ids in expected["ids"]]
    return [{"ids": ids, "labels": labels} for ids, labels in zip(expected["ids"], expected["labels"])]


def resume_old_run(name: str, folder: Path, method: Method | None = None) -> tuple[Any, ft.History]:
    """Resume a run of version 0.1."""
    batches = old_batches(name)
    shutil.copy(OLD / name / "checkpoint.safetensors", folder)
    model, old_method, optimizer, arguments = old_run(name)
    if old_method is not None:
        attach(model, method or old_method, seed=5)
    return model, fit(model, batches, 6, optimizer, out=folder, resume=True, progress=False, **arguments)


@pytest.mark.parametrize("name", ["run-lora", "run-prefix-mlp", "run-full-large", "run-float16"])
def test_a_run_of_version_0_1_resumes_to_the_losses_and_values_of_version_0_1(name, tmp_path):
    expected, _ = read_tensors(OLD / "expected.safetensors")
    model, history = resume_old_run(name, tmp_path)
    tolerance = 2e-3 if name == "run-float16" else 1e-6                 # kernels may differ in the last digit
    assert np.allclose(history.losses, expected[f"{name}/losses"], rtol=0, atol=tolerance)
    compared = 0
    for tensor, p in ft.trained(model).items():
        key = f"{name}/{tensor}"
        # Softmax does not change with the bias of the keys: its gradient is rounding, of which AdamW makes whole steps.
        is_noise = name == "run-float16" and tensor.endswith("attn.k.bias")
        if key in expected and not is_noise:
            assert np.allclose(host(p), expected[key], rtol=0, atol=tolerance), tensor
            compared += 1
    assert compared >= 8
    again, same_history = resume_old_run_again(name, tmp_path)
    assert same_history == history
    assert differences(state_of(again), state_of(model)) == []


def resume_old_run_again(name: str, folder: Path) -> tuple[Any, ft.History]:
    """Resume the finished run from the checkpoint that this version wrote."""
    model, method, optimizer, arguments = old_run(name)
    if method is not None:
        attach(model, method, seed=5)
    return model, fit(model, old_batches(name), 6, optimizer, out=folder, resume=True, progress=False, **arguments)


def test_a_run_of_version_0_1_with_another_method_is_refused(tmp_path):
    with pytest.raises(ValueError, match="its methods: lora: LoRA.*alpha=16.0.*; here: lora: LoRA.*alpha=9"):
        resume_old_run("run-lora", tmp_path, LoRA(r=2, alpha=9, dropout=0.1, targets="attn.[qv]"))
    with pytest.raises(ValueError, match="its methods: prefixtuning"):
        resume_old_run("run-prefix-mlp", tmp_path, ft.PrefixTuning(p=2, mlp=6))


if __name__ == "__main__":
    recipe_name, folder_name, suicide_call = sys.argv[1:]
    if suicide_call:
        function_name, call_number = suicide_call.split()
        real_function = getattr(os, function_name)
        call_numbers = iter(range(1, 1000))

        def kill_instead(*args: Any) -> Any:
            if next(call_numbers) == int(call_number):
                os.kill(os.getpid(), signal.SIGKILL)
            return real_function(*args)
        setattr(os, function_name, kill_instead)
    run_recipe(recipe_name, Path(folder_name), at_step=lambda step: print(step, flush=True))
