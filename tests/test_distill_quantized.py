"""Distillation with quantization: a teacher of packed weights, and a student in quantization-aware training.

The data are a Markov chain. The teacher has seen twenty times as much of it as its students.
"""
from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
from helpers import host, quality
from test_sequence import END, N, make_batch, make_teacher, texts

import tinyft as ft
from tinyft.nn import Packed

V, T = 24, 16


def draw(seed: int, rows: int) -> dict[str, np.ndarray]:
    """Rows of a Markov chain over V tokens, whose transition matrix is always the same."""
    sums = np.random.default_rng(99).dirichlet(np.full(V, 0.15), V).cumsum(axis=1)
    rng = np.random.default_rng(seed)
    ids = np.zeros((rows, T), int)
    ids[:, 0] = rng.integers(0, V, rows)
    for t in range(1, T):
        ids[:, t] = (sums[ids[:, t - 1]] < rng.random((rows, 1))).sum(axis=1).clip(0, V - 1)
    return {"ids": ids}


TRAIN = [draw(seed, 16) for seed in range(4)]
TEST = [draw(100, 64)]


def make_gpt(width: int, seed: int) -> ft.GPT:
    return ft.GPT(ft.GPTConfig(V, T, width, 1, 2, 2 * width), seed=seed)


@functools.cache
def teachers() -> dict[str, ft.GPT]:
    """A trained teacher, and the same one with 4-bit weights."""
    teacher = make_gpt(32, 1)
    ft.fit(teacher, [draw(seed, 32) for seed in range(1000, 1040)], 150, ft.AdamW(0.01), progress=False)
    packed = copy.deepcopy(teacher)
    ft.compress(packed, ft.RTN(bits=4, group=16), TRAIN)
    assert sum(isinstance(module, Packed) for module in packed.modules()) >= 6
    return {"dense": teacher, "4 bits": packed}


def train_student(loss: ft.Loss | None, seed: int, *, rounded: bool) -> tuple[float, ft.GPT]:
    """(test loss, student) after 60 steps on the same data. rounded: in quantization-aware training with 2 bits."""
    student = make_gpt(16, seed)
    if rounded:
        ft.attach(student, ft.Full())
        ft.attach(student, ft.QAT(bits=2, group=16))
    ft.fit(student, TRAIN, 60, ft.AdamW(0.02), loss=loss, progress=False)
    return ft.evaluate(student, TEST)["loss"], student



@functools.cache
def loss_without_teacher(seed: int, *, rounded: bool) -> float:
    return train_student(None, seed, rounded=rounded)[0]


@quality
@pytest.mark.parametrize("name", ["dense", "4 bits"])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_student_learns_more_from_a_teacher_than_from_the_data_alone(name, rounded):
    """By at least 0.2 nats for each of three seeds, also with 2-bit weights, and from a teacher with 4-bit weights."""
    for seed in (10, 11, 12):
        alone = loss_without_teacher(seed, rounded=rounded)
        taught, _ = train_student(ft.Hinton(teachers()[name], 1.0, 1.0), seed, rounded=rounded)
        assert taught < alone - 0.2


def test_a_taught_student_is_packed_with_the_same_outputs(tmp_path):
    """A cache of a packed teacher teaches a rounded student; `pack` keeps its outputs, and the files do."""
    packed = teachers()["4 bits"]
    cache = ft.TeacherCache(tmp_path / "cache", packed, k=8)
    _, student = train_student(ft.Hinton(cache, 1.0, 1.0), 10, rounded=True)
    assert cache.passes == 64, "60 steps, and each row once"
    before = host(student(TEST[0]["ids"]))
    ft.pack(student, "qat")
    assert not ft.edit.attached(student), "the other tensors, which Full trained, keep their values"
    np.testing.assert_allclose(host(student(TEST[0]["ids"])), before, atol=2e-5)
    ft.save(student, tmp_path / "student")
    np.testing.assert_allclose(host(ft.load(tmp_path / "student")[0](TEST[0]["ids"])), before, atol=2e-5)


def test_a_packed_teacher_writes_texts(tmp_path):
    """Sequence-level distillation asks beam search alone, so that the teacher may have packed weights."""
    teacher = make_teacher(seed=3).to(dtype=np.float32)
    batch = make_batch(3)
    ft.compress(teacher, ft.RTN(bits=8, group=4), [batch])
    beams = ft.TeacherBeams(tmp_path, teacher, end=END, max_new_tokens=N)
    new = ft.SequenceLevel(beams).map([batch])[0]
    dense = ft.unpack(copy.deepcopy(teacher))
    expected = ft.SequenceLevel(ft.TeacherBeams(None, dense, end=END, max_new_tokens=N)).map([batch])[0]
    assert texts(new) == texts(expected)
    student = make_teacher(seed=6).to(dtype=np.float32)
    ft.attach(student, ft.QAT(bits=4, group=4))
    history = ft.fit(student, [new], 30, ft.AdamW(0.01), loss=ft.WordLevel(teacher), progress=False)
    assert history.losses[-1] < 0.5 * history.losses[0]
