"""The cost of a training step on the device: launched kernels, matrix products, waits and copies.

The counts are exact, for the definitions in ops.py and for the kernels that replace them.  A commit that makes a step
cheaper or dearer changes the counts here and says why.  The table is printed at the end of the run.
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


def make_model(kind, layers, method=None):
    """A GPT or a BERT in training mode, with a method attached if one is given."""
    model = GPT(GPTConfig(50, 16, 24, layers, 4)) if kind == "gpt" else BERT(BERTConfig(50, 16, 2, 24, layers, 4))
    if method:
        ft.attach(model, method)
    return model.train()


def make_batch(kind):
    """A batch of texts; for BERT, with labels at 40 % of the positions."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, (2, 9))
    if kind == "gpt":
        return {"ids": ids}
    return {"ids": ids, "labels": np.where(rng.random(ids.shape) < 0.4, ids, -100)}


def count_step(kind, layers, method=None, clip=1.0, autocast=None):
    """{phase: (counts, launches by kernel)} of the fifth step.

    By then every kernel is compiled, and the pool holds all the memory that a step needs.
    """
    model = make_model(kind, layers, method)
    optimizer = AdamW(1e-3).start(edit.trained(model))
    found = {}

    def counted(phase, f):
        """The result of f, whose cost is recorded under this phase."""
        fake_gpu.reset()
        result = f()
        found[phase] = fake_gpu.counts(), Counter(fake_gpu.launched)
        return result

    for _ in range(5):
        with ft.autocast(autocast or "bfloat16", enabled=autocast is not None):
            loss = counted("forward", lambda: compute_loss(model, read_batch(make_batch(kind)))[1])
        counted("backward", loss.backward)
        counted("loss", lambda: float(loss.data))
        counted("update", lambda: optimizer.step(1.0, clip))
        model.zero_grad()
    return found


# Of each phase: (launches, products, waits, copies to the device, copies to the host, copies on the device).
COSTS: dict[tuple, list] = {
    ("gpt", 1, "everything", "definitions"):
        [(91, 9, 0, 2, 0, 0), (89, 18, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (46, 0, 2, 0, 2, 20)],
    ("gpt", 1, "everything", "kernels"):
        [(19, 7, 0, 2, 0, 0), (33, 14, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (4, 0, 1, 0, 1, 0)],
    ("gpt", 2, "everything", "definitions"):
        [(145, 17, 0, 2, 0, 0), (149, 34, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (46, 0, 2, 0, 2, 36)],
    ("gpt", 2, "everything", "kernels"):
        [(30, 13, 0, 2, 0, 0), (53, 26, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (4, 0, 1, 0, 1, 0)],
    ("gpt", 12, "everything", "definitions"):
        [(685, 97, 0, 2, 0, 0), (749, 194, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (46, 0, 2, 0, 2, 196)],
    ("gpt", 12, "everything", "kernels"):
        [(140, 73, 0, 2, 0, 0), (253, 146, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (5, 0, 1, 0, 1, 0)],
    ("gpt", 12, "lora", "definitions"):
        [(733, 145, 0, 2, 0, 0), (630, 211, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (24, 0, 2, 0, 2, 48)],
    ("gpt", 12, "lora", "kernels"):
        [(248, 145, 0, 2, 0, 0), (188, 211, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (3, 0, 1, 0, 1, 0)],
    ("bert", 2, "everything", "definitions"):
        [(287, 18, 0, 3, 0, 0), (159, 36, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (46, 0, 2, 0, 2, 42)],
    ("bert", 2, "everything", "kernels"):
        [(37, 14, 0, 3, 0, 0), (65, 28, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (4, 0, 1, 0, 1, 0)],
}


def phase_costs(found):
    """The six counts of COSTS, phase by phase."""
    return [tuple(found[phase][0])[:6] for phase in PHASES]


def check_total(costs):
    """The limits of a whole step of GPT with twelve layers."""
    launches = sum(c[0] for c in costs)
    products = sum(c[1] for c in costs)
    assert launches <= 700
    assert products <= 220


@pytest.mark.parametrize("kind, layers, trains, ops", COSTS)
def test_the_cost_of_a_step(kind, layers, trains, ops):
    method = LoRA(r=2) if trains == "lora" else None
    with kernels.definitions() if ops == "definitions" else contextlib.nullcontext():
        found = count_step(kind, layers, method)
    TABLE.extend((f"{kind}, {layers} layers, {trains}, {ops}", phase, found[phase][0]) for phase in PHASES)
    assert phase_costs(found) == COSTS[kind, layers, trains, ops]
    for counts, names in found.values():
        assert sum(names.values()) == counts.launches
        assert not counts.mallocs


def test_a_step_of_twelve_layers_stays_small():
    """The definitions take 1,480 launches and 291 products."""
    check_total(COSTS["gpt", 12, "everything", "kernels"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_adds_launches_and_no_products(dtype):
    """All weights are cast in two launches, one for each group of the optimiser.

    In a layer, the inputs of two products are cast, and the gradients at the inputs and outputs of the products. The
    gradients of weights are float32 sums and are not cast.
    """
    found = count_step("gpt", 12, autocast=dtype)
    costs = phase_costs(found)
    TABLE.extend((f"gpt, 12 layers, {dtype}, kernels", phase, found[phase][0]) for phase in PHASES)
    assert costs == [(167, 73, 0, 2, 0, 0), (302, 146, 0, 0, 0, 0), (0, 0, 1, 0, 1, 0), (5, 0, 1, 0, 1, 0)]
    assert found["forward"][1][f"cupy_copy__float32_{dtype}"] == 2 + 2 * 12 + 1
    check_total(costs)


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_forward_and_backward_never_wait_and_copy_only_the_batch(kind):
    found = count_step(kind, 3)
    forward, _ = found["forward"]
    backward, _ = found["backward"]
    targets = read_batch(make_batch(kind))
    sent = [a for a in (targets.ids, targets.labels, targets.logit_positions) if a is not None]
    assert forward.waits == backward.waits == forward.d2h == backward.d2h == backward.h2d == 0
    assert forward.h2d_bytes == sum(a.nbytes for a in sent)


def test_every_layer_costs_the_same():
    one, two, three = (count_step("gpt", n) for n in (1, 2, 3))
    for phase in PHASES:
        for field in ("launches", "products", "d2d"):
            a, b, c = (getattr(found[phase][0], field) for found in (one, two, three))
            assert c - b == b - a


def test_a_step_of_the_trainer_costs_no_more_and_waits_once():
    separate = count_step("gpt", 2)
    parts = [separate[phase][0] for phase in PHASES]
    settings = Settings(
        steps=4, clip=1.0, accumulate=1, evaluate=None, patience=0, monitor="loss", autocast=None, capture=False,
    )
    stream = BatchStream([make_batch("gpt")])
    rng = np.random.default_rng(0)
    run = Run(
        make_model("gpt", 2), ft.CrossEntropy(), stream, AdamW(1e-3), ft.constant_schedule(), rng, settings,
    )
    stage = next(run.remaining_training_stages())
    train_step(run, stage.steps)
    train_step(run, stage.steps)
    fake_gpu.reset()
    train_step(run, stage.steps)
    whole = fake_gpu.counts()
    assert whole.launches - sum(c.launches for c in parts) == 4, "the loss and the norm are joined, for one transfer"
    assert whole.waits == whole.d2h == 1
    for field in ("products", "h2d", "d2d"):
        assert getattr(whole, field) == sum(getattr(c, field) for c in parts)


@pytest.mark.usefixtures("definitions")
def test_without_clipping_nothing_is_scaled():
    clipped, unclipped = (count_step("gpt", 1, clip=clip)["update"][0] for clip in (1.0, None))
    assert clipped.launches - unclipped.launches == 4 * 2        # four kernels for each of two groups
    assert clipped.waits == unclipped.waits


def test_a_generated_token_waits_once_for_its_logits():
    model = make_model("gpt", 2)
    ids = np.zeros((3, 4), int)
    ft.generate(model, ids, 3)
    fake_gpu.reset()
    ft.generate(model, ids, 3)
    assert fake_gpu.counts().waits == fake_gpu.counts().d2h == 3
