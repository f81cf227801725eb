"""What a training step asks of the device: kernels, products, waits and copies, counted.  The table is printed at the end of the run.

The numbers are exact, of the definitions in ops.py and of the kernels in their places, and stand here once.  Who makes a step cheaper or dearer
changes them, and says why in the same commit.
"""
from __future__ import annotations

import contextlib
from collections import Counter

import fake_gpu
import numpy as np
import pytest

import tinyft as ft
from tinyft import BERT, GPT, AdamW, BERTConfig, GPTConfig, LoRA, edit, kernels
from tinyft.train.batch import BatchStream, compute_loss, read_batch
from tinyft.train.loop import Run, Settings, train_step

PHASES = ("forward", "backward", "loss", "update")
TABLE: list[tuple[str, str, fake_gpu.Counts]] = []       # (model, phase, counts): printed by conftest.py


def made(kind, layers, method=None):
    model = GPT(GPTConfig(50, 16, 24, layers, 4)) if kind == "gpt" else BERT(BERTConfig(50, 16, 2, 24, layers, 4))
    if method:
        ft.attach(model, method)
    return model.train()


def a_batch(kind):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, (2, 9))
    return {"ids": ids} if kind == "gpt" else {"ids": ids, "labels": np.where(rng.random(ids.shape) < 0.4, ids, -100)}


def by(how):
    return kernels.definitions() if how == "definitions" else contextlib.nullcontext()


def of_a_step(kind, layers, method=None, clip=1.0, how=None):
    "phase -> (counts, kernels by name), of the fifth step: by then every kernel is compiled and the pool has what it needs."
    model = made(kind, layers, method)
    optimizer, found = AdamW(1e-3).start(edit.trained(model)), {}

    def counted(phase, f):
        fake_gpu.reset()
        result = f()
        found[phase] = fake_gpu.counts(), Counter(fake_gpu.launched)
        return result

    for _ in range(5):
        with ft.autocast(how or "bfloat16", enabled=how is not None):
            loss = counted("forward", lambda: compute_loss(model, read_batch(a_batch(kind)))[1])
        counted("backward", loss.backward)
        counted("loss", lambda: float(loss.data))
        counted("update", lambda: optimizer.step(1.0, clip))
        model.zero_grad()
    return found


# (launches, products, waits, h2d, d2h, d2d) of forward, backward, reading the loss, update
COSTS: dict[tuple, list] = {
    ("gpt", 1, "everything", "definitions"): [(83, 9, 0, 2, 0, 0), (89, 18, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (46, 0, 2, 0, 2, 20)],
    ("gpt", 1, "everything", "kernels"): [(19, 7, 0, 2, 0, 0), (33, 14, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (4, 0, 1, 0, 1, 0)],
    ("gpt", 2, "everything", "definitions"): [(135, 17, 0, 2, 0, 0), (149, 34, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (46, 0, 2, 0, 2, 36)],
    ("gpt", 2, "everything", "kernels"): [(30, 13, 0, 2, 0, 0), (53, 26, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (4, 0, 1, 0, 1, 0)],
    ("gpt", 12, "everything", "definitions"): [(655, 97, 0, 2, 0, 0), (749, 194, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (46, 0, 2, 0, 2, 196)],
    ("gpt", 12, "everything", "kernels"): [(140, 73, 0, 2, 0, 0), (253, 146, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (5, 0, 1, 0, 1, 0)],
    ("gpt", 12, "lora", "definitions"): [(703, 145, 0, 2, 0, 0), (630, 211, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (24, 0, 2, 0, 2, 48)],
    ("gpt", 12, "lora", "kernels"): [(248, 145, 0, 2, 0, 0), (188, 211, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (3, 0, 1, 0, 1, 0)],
    ("bert", 2, "everything", "definitions"): [(273, 18, 0, 3, 0, 0), (159, 36, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (46, 0, 2, 0, 2, 42)],
    ("bert", 2, "everything", "kernels"): [(37, 14, 0, 3, 0, 0), (65, 28, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (4, 0, 1, 0, 1, 0)],
}


@pytest.mark.parametrize("kind, layers, what, how", COSTS)
def test_what_a_step_costs(kind, layers, what, how):
    with by(how):
        found = of_a_step(kind, layers, LoRA(r=2) if what == "lora" else None)
    TABLE.extend((f"{kind}, {layers} layers, {what}, {how}", phase, found[phase][0]) for phase in PHASES)
    assert [tuple(found[p][0])[:6] for p in PHASES] == COSTS[kind, layers, what, how]
    assert all(sum(names.values()) == c.launches and not c.mallocs for c, names in found.values())


def test_a_step_of_twelve_layers_stays_small():
    "What the kernels are for: 1,450 launches and 291 products by the definitions."
    parts = COSTS["gpt", 12, "everything", "kernels"]
    assert sum(p[0] for p in parts) <= 700 and sum(p[1] for p in parts) <= 220


@pytest.mark.parametrize("how", ["bfloat16", "float16"])
def test_a_step_under_autocast_asks_for_more_launches_and_no_more_products(how):
    """All weights are cast in two launches, one for each group of the optimiser; in a layer the inputs of two products are cast, and the
    gradients that come to and from them.  Gradients of weights come in float32 as they were summed."""
    found = of_a_step("gpt", 12, how=how)
    costs = [tuple(found[p][0])[:6] for p in PHASES]
    TABLE.extend((f"gpt, 12 layers, {how}, kernels", phase, found[phase][0]) for phase in PHASES)
    assert costs == [(167, 73, 0, 2, 0, 0), (302, 146, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (5, 0, 1, 0, 1, 0)]
    assert found["forward"][1][f"cupy_copy__float32_{how}"] == 2 + 2 * 12 + 1 and sum(c[0] for c in costs) <= 700 and sum(c[1] for c in costs) <= 220


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_forward_and_backward_never_wait_and_copy_only_the_batch(kind):
    found = of_a_step(kind, 3)
    forward, backward = found["forward"][0], found["backward"][0]
    q = read_batch(a_batch(kind))
    assert forward.waits == backward.waits == forward.d2h == backward.d2h == backward.h2d == 0
    assert forward.h2d_bytes == sum(a.nbytes for a in (q.ids, q.labels, q.logit_positions) if a is not None)


def test_a_layer_costs_the_same_wherever_it_stands():
    one, two, three = (of_a_step("gpt", n) for n in (1, 2, 3))
    for p in PHASES:
        for field in ("launches", "products", "d2d"):
            a, b, c = (getattr(f[p][0], field) for f in (one, two, three))
            assert c - b == b - a


def test_the_trainers_own_step_asks_for_no_more_and_waits_once():
    apart = of_a_step("gpt", 2)
    model = made("gpt", 2)
    settings = Settings(steps=4, clip=1.0, accumulate=1, evaluate=None, patience=0, monitor="loss", autocast=None, capture=False)
    run = Run(model, ft.CrossEntropy(), BatchStream([a_batch("gpt")]), AdamW(1e-3), ft.constant_schedule(), np.random.default_rng(0), settings)
    phase = next(run.remaining_phases())
    train_step(run, phase.steps)
    train_step(run, phase.steps)
    fake_gpu.reset()
    train_step(run, phase.steps)
    whole, parts = fake_gpu.counts(), [apart[p][0] for p in PHASES]
    assert whole.launches - sum(c.launches for c in parts) == 4, "the loss and the norm, put together to be read at once"
    assert whole.waits == whole.d2h == 1
    for field in ("products", "h2d", "d2d"):
        assert getattr(whole, field) == sum(getattr(c, field) for c in parts)


@pytest.mark.usefixtures("definitions")
def test_without_clipping_nothing_is_scaled():
    clipped, free = (of_a_step("gpt", 1, clip=c)["update"][0] for c in (1.0, None))
    assert clipped.launches - free.launches == 4 * 2 and clipped.waits == free.waits      # four kernels for each of two groups


def test_a_generated_token_waits_once_for_its_logits():
    model, ids = made("gpt", 2), np.zeros((3, 4), int)
    ft.generate(model, ids, 3)
    fake_gpu.reset()
    ft.generate(model, ids, 3)
    assert fake_gpu.counts().waits == fake_gpu.counts().d2h == 3
