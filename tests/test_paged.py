"""The paged optimiser: its updates are those of the resident one to the bit, and its file is gone when it is."""
from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import dev, host, leaf, wrong_answers

import tinyft as ft
from tinyft import array, optim
from tinyft.array import xp
from tinyft.optim import SGD, Adam, AdamW, Optimizer, Paged, paged
from tinyft.tensor import Tensor
from tinyft.train.settings import CHECKPOINT

MAKE: dict[str, Callable[[], Optimizer]] = {
    "AdamW": lambda: AdamW(0.05, weight_decay=0.1, groups={"b": {"lr": 0.2}}),
    "Adam": lambda: Adam(0.05, weight_decay=0.1),
    "SGD": lambda: SGD(0.05, momentum=0.9, weight_decay=0.1),
}
ELSEWHERE = "strict" if array.backend() == "numpy" else "numpy"
each_optimizer = pytest.mark.parametrize("name", MAKE)


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 7 elements; tensors of more than 20 elements are updated by themselves."""
    monkeypatch.setattr(paged, "PAGE", 7)
    monkeypatch.setattr(optim.buffers, "LARGE", 20)


def draw(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Values, or gradients, of tensors of several sizes."""
    shapes = {"a": (5, 6), "b": (3,), "c": (4, 3), "d": (1, 1), "e": (9, 9), "f": (2, 0)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def tensors(dtype: Any = np.float32, seed: int = 0) -> dict[str, Tensor]:
    """Leaves, two of them with a mask."""
    named = {name: leaf(values, dtype) for name, values in draw(np.random.default_rng(seed)).items()}
    rng = np.random.default_rng(seed + 1)
    for name in ("c", "e"):
        named[name].mask = dev(rng.random(named[name].shape) < 0.6)
    return named


def steps(optimizer: Optimizer, named: dict[str, Tensor], count: int, seed: int = 3) -> None:
    """A number of steps with a small clip. In every third step a small and a large tensor have no gradient."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        for name, g in draw(rng).items():
            p = named[name]
            p.grad = None if i % 3 == 1 and name in ("a", "d") else dev(g, p.grad_dtype)
        optimizer.step(factor=0.5, clip=1.5, scale=2.0)


def results(optimizer: Optimizer, named: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies of the values and of the state."""
    values = {f"value.{name}": np.array(host(p)) for name, p in named.items()}
    return values | {key: np.array(a) for key, a in optimizer.state_dict().items()}


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for key, values in a.items():
        assert values.dtype == b[key].dtype, key
        np.testing.assert_array_equal(values, b[key], err_msg=key)


def assert_bitwise(name: str, dtype: Any = np.float32, **how: Any) -> None:
    found = []
    for optimizer in (MAKE[name](), Paged(MAKE[name](), **how)):
        named = tensors(dtype)
        steps(optimizer.start(named), named, 5)
        found.append(results(optimizer, named))
    assert_equal(*found)


# ── to the bit ───────────────────────────────────────────────────────────────────────────────────────────────────────
@each_optimizer
@pytest.mark.parametrize("pages", ["disk", "host"])
@pytest.mark.parametrize("resident", [0, 3, 4 * 31, 4 * 150, 1 << 20])
def test_updates_are_those_of_the_resident_optimiser_to_the_bit(name, pages, resident, tmp_path):
    assert_bitwise(name, pages=pages, resident=resident, folder=tmp_path)


@each_optimizer
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_the_same_in_other_dtypes(name, dtype):
    assert_bitwise(name, array.bfloat16 if dtype == "bfloat16" else dtype, resident=100)


@each_optimizer
def test_a_state_goes_from_one_to_the_other(name):
    """Paged to resident and back: as if there had been one optimiser."""
    named = tensors()
    whole = MAKE[name]().start(named)
    steps(whole, named, 2, seed=3)
    steps(whole, named, 2, seed=4)
    other = tensors()
    for makes in ((Paged(MAKE[name](), resident=60), MAKE[name]()), (MAKE[name](), Paged(MAKE[name](), resident=60))):
        other = tensors()
        first = makes[0].start(other)
        steps(first, other, 2, seed=3)
        state = {key: np.array(a) for key, a in first.state_dict().items()}
        second = makes[1].start(other)
        second.load_state_dict(state)
        assert_equal({key: np.array(a) for key, a in second.state_dict().items()}, state)
        steps(second, other, 2, seed=4)
        assert_equal(results(second, other), results(whole, named))


def test_a_refused_state_changes_nothing():
    named = tensors()
    optimizer = Paged(AdamW(0.1), resident=60).start(named)
    steps(optimizer, named, 2)
    before = results(optimizer, named)
    with pytest.raises(ValueError, match="belongs to other tensors"):
        optimizer.load_state_dict({"step": np.array(1)})
    assert_equal(results(optimizer, named), before)
    steps(optimizer, named, 1)


@each_optimizer
@pytest.mark.parametrize("pages", ["disk", "host"])
def test_pages_stay_on_the_host_when_the_tensors_move(name, pages):
    """Between the steps the tensors go to another backend and back."""
    found = []
    for optimizer in (MAKE[name](), Paged(MAKE[name](), pages=pages, resident=4 * 50)):
        named = tensors()
        optimizer.start(named)
        for seed, backend in ((3, None), (4, ELSEWHERE), (5, ELSEWHERE), (6, array.backend())):
            if backend is not None:
                for p in named.values():
                    p.data = array.to(p.data, backend)
                    p.mask = None if p.mask is None else array.to(p.mask, backend)
            rng = np.random.default_rng(seed)
            for p, g in zip(named.values(), draw(rng).values()):
                p.grad = array.to(dev(g, np.float32), array.name_of(p.data))
            optimizer.step(clip=1.5)
            if isinstance(optimizer, Paged):
                for moment in optimizer.groups[0].moments:
                    assert type(moment.host) is np.ndarray
                    assert xp(moment.head) is xp(optimizer.groups[0].w)
        found.append(results(optimizer, named))
    for key, values in found[0].items():
        np.testing.assert_allclose(found[1][key], values, rtol=1e-6, atol=1e-7, err_msg=key)


def test_tensors_on_two_devices_are_refused_and_the_moments_stay():
    named = tensors()
    optimizer = Paged(AdamW(0.1)).start(named)
    steps(optimizer, named, 1)
    named["a"].data = array.to(named["a"].data, ELSEWHERE)
    with pytest.raises(ft.BackendError):
        optimizer.step()
    named["a"].data = array.to(named["a"].data, array.backend())
    steps(optimizer, named, 1)


# ── fit ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def fitted(
    optimizer: Optimizer, folder: Any, steps: int = 4, stop_after: int = 0, **more: Any,
) -> dict[str, np.ndarray]:
    """The trained values of a small model. stop_after: Ctrl-C after so many steps."""
    def stop(done: int, terms: dict) -> None:
        if done == stop_after:
            raise InterruptedError

    model = ft.GPT(ft.GPTConfig(vocab=30, positions=16, width=8, layers=2, heads=2), seed=1)
    batches = [np.random.default_rng(0).integers(0, 30, (4, 12))]
    with contextlib.suppress(InterruptedError):
        ft.fit(model, batches, steps, optimizer, progress=False, out=folder, on_step=stop, save_every=1, **more)
    return {name: np.array(host(p)) for name, p in model.named_parameters().items()}


def test_a_run_goes_on_with_and_without_pages(tmp_path):
    expected = fitted(AdamW(0.01), tmp_path / "whole")
    assert_equal(fitted(Paged(AdamW(0.01)), tmp_path / "paged"), expected)
    for i, (first, second) in enumerate([(Paged(AdamW(0.01)), AdamW(0.01)), (AdamW(0.01), Paged(AdamW(0.01)))]):
        folder = tmp_path / str(i)
        fitted(first, folder, stop_after=2)
        assert (folder / CHECKPOINT).exists()
        assert_equal(fitted(second, folder, resume=True), expected)
    with pytest.raises(ValueError, match="another run"):
        fitted(Paged(AdamW(0.02)), tmp_path / "0", resume=True)


# ── memory and files ─────────────────────────────────────────────────────────────────────────────────────────────────
def large(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """One tensor of 4 MB, in pages of 64 kB."""
    monkeypatch.setattr(paged, "PAGE", 1 << 14)
    return {"w": leaf(np.zeros((1024, 1024)), np.float32)}


@pytest.mark.skipif(array.backend() != "numpy", reason="counts host memory")
def test_the_moments_take_no_memory_of_arrays(monkeypatch):
    peaks = []
    for make in (AdamW, lambda lr: Paged(AdamW(lr)), lambda lr: Paged(AdamW(lr), resident=1 << 21)):
        named = large(monkeypatch)
        with ft.peak_memory() as memory:
            optimizer = make(0.1).start(named)
            named["w"].grad = np.ones((1024, 1024), np.float32)
            optimizer.step()
        peaks.append(memory["bytes"])
    moments = 2 * 4 * 1024 * 1024
    assert peaks[0] - peaks[1] > 0.98 * moments


def mapped_kilobytes(folder: Any) -> list[int]:
    """The kB of every mapping of a file below the folder that are in this process's memory."""
    found = []
    inside = False
    with open("/proc/self/smaps") as f:
        for line in f:
            if "-" in line.split()[0]:
                inside = str(folder) in line
            elif inside and line.startswith("Rss:"):
                found.append(int(line.split()[1]))
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads Linux's list of mappings")
def test_after_an_update_only_resident_pages_are_in_memory(monkeypatch, tmp_path):
    named = large(monkeypatch)
    optimizer = Paged(AdamW(0.1), resident=1 << 20, folder=tmp_path).start(named)
    named["w"].grad = dev(np.ones((1024, 1024), np.float32))
    optimizer.step()
    in_memory = mapped_kilobytes(tmp_path)
    assert len(in_memory) == 2
    assert sum(in_memory) <= 1024 + 2 * 8
    state = optimizer.state_dict()["exp_avg.w"]
    assert state[0, 0] != 0, "what was taken out of memory is in the file"
    assert (state == state[0, 0]).all()


@pytest.mark.parametrize("pages, resident, is_mapped", [
    ("disk", 0, True), ("disk", 1 << 20, False), ("host", 0, False), ("host", 1 << 20, False),
])
def test_a_file_holds_pages_of_the_disk_alone(pages, resident, is_mapped):
    optimizer = Paged(ft.AdamW(0.1), pages=pages, resident=resident).start({"a": leaf(np.ones(40))})
    moments = [moment for group in optimizer.groups for moment in group.moments]
    assert len(moments) == 2
    assert [moment.mapped is not None for moment in moments] == [is_mapped] * 2


def test_the_file_has_no_name_and_is_gone_with_the_optimiser(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    named = tensors()
    optimizer = Paged(AdamW(0.1), folder=tmp_path).start(named)
    steps(optimizer, named, 2)
    assert os.listdir(tmp_path) == []
    optimizer.start(named)                               # a new start, new files
    steps(optimizer, named, 1)
    del optimizer
    gc.collect()
    assert os.listdir(tmp_path) == []
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_an_error_before_training(monkeypatch, tmp_path):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paged.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Paged(AdamW(0.1), folder=tmp_path).start(tensors())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make, words", [
    (lambda: Paged(AdamW), "Paged wants AdamW, Adam or SGD"),
    (lambda: Paged(Paged(AdamW(0.1))), "Paged wants AdamW, Adam or SGD"),
    (lambda: Paged(AdamW(0.1), resident=-1), "resident wants"),
    (lambda: Paged(AdamW(0.1), pages="gpu"), "pages wants"),
    (lambda: Paged(AdamW(0.1), folder="/no/such/folder"), "a folder that is there"),
    (lambda: Paged(AdamW(0.1), folder=3), "folder wants"),
    (lambda: Paged(AdamW(0.1)).step(), "was not started"),
])
def test_bad_input_gets_one_clear_sentence(make, words):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
        make()


def test_it_is_printed_with_its_optimiser():
    text = repr(Paged(SGD(0.1), resident=5))
    assert text.startswith("Paged(SGD(lr=0.1")
    assert "resident=5" in text


# ── wrong answers ────────────────────────────────────────────────────────────────────────────────────────────────────
def a_step_for_every_page(self: Paged, piece: Any, lr: float) -> None:
    """The inner optimiser counts its own steps."""
    for part in paged.pages_of(piece.moments):
        self.optimizer.t += 1
        moments = [moment.read(part) for moment in piece.moments]
        self.optimizer.update(optim.buffers.Piece(piece.w[part], piece.g[part], moments, piece.decay), lr)
        for moment, values in zip(piece.moments, moments):
            moment.write(part, values)


def without_the_last_page(windows: list) -> Any:
    """Whole pages are enough."""
    return list(ORIGINAL["pages_of"](windows))[:-1]


def pages_that_overlap(windows: list) -> Any:
    """A page ends with the first element of the next."""
    size = windows[0].stop - windows[0].start
    return [slice(part.start, min(part.stop + 1, size)) for part in ORIGINAL["pages_of"](windows)]


def from_the_start_of_the_file(self: Any, part: slice) -> Any:
    """A window begins where the array begins."""
    return self.whole.read(part.start, part.stop)


def state_of_the_pages_alone(self: Any) -> Any:
    """The host has every element."""
    return self.host


ORIGINAL = {"pages_of": paged.pages_of}
WRONG = {
    "a step for every page": (Paged, "update", a_step_for_every_page),
    "last page": (paged, "pages_of", without_the_last_page),
    "overlap": (paged, "pages_of", pages_that_overlap),
    "start of the file": (paged.Window, "read", from_the_start_of_the_file),
}
WRONG_WHEN_MOVED = {
    "flush": (paged.PagedArray, "flush", state_of_the_pages_alone),
    "follow": (paged.PagedArray, "follow", lambda self, w: None),
}


@wrong_answers
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_rejected(name, monkeypatch, tmp_path):
    monkeypatch.setattr(*WRONG[name])
    with pytest.raises((AssertionError, ValueError)):
        assert_bitwise("AdamW", folder=tmp_path)


@wrong_answers
@pytest.mark.parametrize("name", WRONG_WHEN_MOVED)
def test_a_wrong_answer_on_two_backends_is_rejected(name, monkeypatch):
    monkeypatch.setattr(*WRONG_WHEN_MOVED[name])
    with pytest.raises((AssertionError, ft.BackendError, TypeError, ValueError)):
        test_pages_stay_on_the_host_when_the_tensors_move("AdamW", "disk")
