"""Distillation losses against their formulas in plain NumPy, float64; a student's start; the teacher's outputs on disk.

The checks are called with the library's functions, and again with each wrong one of WRONG, which they must reject.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import dev, gradcheck, host, leaf, rejects, wrong_answers
from test_loss import BATCHES, VOCAB, Stop, equal, make_batch, make_gpt, stop_at, values_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel as WordLevelModel
from wrong import replaced

import tinyft as ft
from tinyft import array, ops
from tinyft.compress.distill import cache, check_tokenizers, distilbert, hinton, layer_map, soft
from tinyft.compress.distill.cache import TeacherCache, largest, row_keys
from tinyft.compress.distill.soft import TeacherLogits, cosine_loss, soft_loss
from tinyft.files import read_tensors
from tinyft.nn import Context
from tinyft.tensor import Tensor
from tinyft.train.batch import read_batch


# ── the formulas, in NumPy ───────────────────────────────────────────────────────────────────────────────────────────
def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def kl(z_t: np.ndarray, z_s: np.ndarray, T: float) -> np.ndarray:
    """KL(p_t^T ‖ p_s^T) of each row."""
    log_p, log_q = log_softmax(z_t / T), log_softmax(z_s / T)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def loss_of(z_s: np.ndarray, z_t: np.ndarray, T: float, weight: np.ndarray | None = None) -> float:
    """The library's soft loss of logits (N, V)."""
    weight = np.ones(len(z_s)) if weight is None else weight
    return float(hinton.soft_loss("Hinton", leaf(z_s), TeacherLogits(dev(z_t)), dev(weight), T).data)


def draw(seed: int) -> tuple[np.ndarray, np.ndarray, float, np.random.Generator]:
    """(z_s, z_t, T, the generator)"""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 6)), int(rng.integers(2, 8)))
    return 3 * rng.standard_normal(shape), 3 * rng.standard_normal(shape), float(rng.choice([0.5, 1, 2, 7])), rng


def check_value() -> None:
    for seed in range(40):
        z_s, z_t, T, rng = draw(seed)
        weight = rng.integers(0, 3, len(z_s)).astype(float)
        weight[0] = 1.5
        expected = T**2 * (kl(z_t, z_s, T) * weight).sum() / weight.sum()
        assert loss_of(z_s, z_t, T, weight) == pytest.approx(expected, rel=1e-10, abs=1e-13)


def check_gradient() -> None:
    """T (p_s − p_t) w / Σ w, by the formula and by differences."""
    for seed in range(20):
        z_s, z_t, T, rng = draw(seed)
        weight = rng.uniform(0.5, 2, len(z_s))
        x = leaf(z_s)
        hinton.soft_loss("Hinton", x, TeacherLogits(dev(z_t)), dev(weight), T).backward()
        p_s, p_t = np.exp(log_softmax(z_s / T)), np.exp(log_softmax(z_t / T))
        np.testing.assert_allclose(host(x.grad), T * (p_s - p_t) * weight[:, None] / weight.sum(), atol=1e-12)

        def f(z: Tensor, z_t: np.ndarray = z_t, weight: np.ndarray = weight, T: float = T) -> Tensor:
            return hinton.soft_loss("Hinton", z, TeacherLogits(dev(z_t)), dev(weight), T)
        gradcheck(f, [z_s], rng)


def check_zero() -> None:
    """Never negative; 0 if and only if the logits are equal up to a constant; constants do not count."""
    for seed in range(40):
        z_s, z_t, T, rng = draw(seed)
        constants = 10 * rng.standard_normal((len(z_s), 1))
        assert loss_of(z_s, z_t, T) > 1e-4
        assert loss_of(z_t + constants, z_t, T) == pytest.approx(0, abs=1e-11)
        assert loss_of(z_s + constants, z_t - constants, T) == pytest.approx(loss_of(z_s, z_t, T), rel=1e-9)


def check_limits() -> None:
    """A large T: the squared distance of centred logits over 2 V. A sure teacher at T = 1: CE with its argmax."""
    for seed in range(20):
        z_s, z_t, _, _ = draw(seed)
        difference = (z_s - z_s.mean(axis=-1, keepdims=True)) - (z_t - z_t.mean(axis=-1, keepdims=True))
        expected = (difference**2).sum(axis=-1).mean() / (2 * z_s.shape[-1])
        assert loss_of(z_s, z_t, 1e4) == pytest.approx(expected, rel=5e-3)
        best = z_t.argmax(axis=-1)
        nll = -log_softmax(z_s)[np.arange(len(z_s)), best].mean()
        assert loss_of(z_s, 1e4 * z_t, 1.0) == pytest.approx(nll, rel=1e-9)


def check_stable() -> None:
    """Logits of ±10,000 give a finite loss and a finite gradient, also in float32."""
    for dtype in (np.float32, np.float64):
        z_s = np.array([[1e4, -1e4, 0.0], [-1e4, 0.0, 1e4]], dtype)
        x = leaf(z_s, dtype)
        loss = hinton.soft_loss("Hinton", x, TeacherLogits(dev(-z_s)), dev(np.ones(2, dtype)), 1.0)
        loss.backward()
        assert float(loss.data) == pytest.approx(2e4, rel=1e-6)
        assert np.isfinite(host(x.grad)).all()


def pair(seed: int = 0) -> tuple[ft.GPT, ft.GPT]:
    """(student, teacher) in float64, with dropout in both."""
    student, teacher = make_gpt(seed, 0.1).to(dtype=np.float64), make_gpt(seed + 7, 0.3, 9).to(dtype=np.float64)
    for p in teacher.parameters():
        p.copy_(host(p) * 6)
    return student, teacher


def value_of(loss: Any, student: ft.Module, batch: dict) -> float:
    _, value = loss(student, loss.read(batch))
    return float(value.data)


def check_hinton() -> None:
    """(1 − λ) CE + λ T² KL over the labels, of models; λ = 0 is plain cross-entropy."""
    student, teacher = pair()
    for seed, batch in enumerate(BATCHES):
        T, soft_share = [(1.0, 0.3), (4.0, 0.9), (2.0, 1.0)][seed]
        targets = read_batch(batch)
        z_s = host(student(targets.ids, targets.context())).reshape(-1, VOCAB)
        z_t = host(teacher(targets.ids, targets.context())).reshape(-1, VOCAB)
        nll = -log_softmax(z_s)[np.arange(len(z_s)), targets.labels].mean()
        expected = (1 - soft_share) * nll + soft_share * T**2 * kl(z_t, z_s, T).mean()
        assert value_of(ft.Hinton(teacher, T, soft_share), student, batch) == pytest.approx(expected, rel=1e-10)
        assert value_of(ft.Hinton(teacher, T, 0.0), student, batch) == pytest.approx(nll, rel=1e-12)
        word_level = 0.4 * nll + 0.6 * kl(z_t, z_s, 1).mean()
        assert value_of(ft.WordLevel(teacher, 0.6), student, batch) == pytest.approx(word_level, rel=1e-10)
        assert value_of(ft.WordLevel(student, 1.0), student, batch) == pytest.approx(0, abs=1e-12)


def check_teacher_rests() -> None:
    """The teacher gets no gradient, its pass has no dropout, and each of its modules keeps its mode."""
    student, teacher = pair()
    batch = BATCHES[0]
    for loss in (ft.Hinton(teacher), ft.WordLevel(teacher), ft.DistilBERTLoss(teacher, cosine=0.0)):
        teacher.eval()
        resting = value_of(loss, student, batch)
        teacher.train()
        targets = loss.read(batch)
        _, value = loss(student.eval(), targets, np.random.default_rng(0))
        assert float(value.data) == pytest.approx(resting, rel=1e-12)
        value.backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert any(p.grad is not None for p in student.parameters())
        assert all(module.training for module in teacher.modules())
        student.zero_grad()


def longer(batch: dict, columns: int = 3) -> dict:
    """The batch with more padding, with ids in it."""
    ids = np.pad(batch["ids"], ((0, 0), (0, columns)), constant_values=5)
    return {"ids": ids, "mask": np.pad(batch["mask"], ((0, 0), (0, columns)))}


def check_padding() -> None:
    """More padding changes no loss; other ids in the padding neither."""
    student, teacher = pair()
    same_width = make_gpt(11).to(dtype=np.float64)
    for batch in BATCHES[:2]:
        for loss in (ft.Hinton(teacher, 3.0, 0.7), ft.WordLevel(teacher), ft.DistilBERTLoss(same_width)):
            value = value_of(loss, student, batch)
            assert value_of(loss, student, longer(batch)) == pytest.approx(value, rel=1e-10)
            other = {**batch, "ids": np.where(batch["mask"], batch["ids"], 3)}
            assert value_of(loss, student, other) == pytest.approx(value, rel=1e-10)
    student, same_width = make_bert(0).to(dtype=np.float64), make_bert(5).to(dtype=np.float64)
    batch = masked_batch()
    value = value_of(ft.DistilBERTLoss(same_width), student, batch)
    padded = {**longer(batch), "labels": np.pad(batch["labels"], ((0, 0), (0, 3)), constant_values=-100)}
    assert value_of(ft.DistilBERTLoss(same_width), student, padded) == pytest.approx(value, rel=1e-10)


def check_classes() -> None:
    """Class labels: a row without a label does not count, and class weights weigh the teacher as the labels."""
    student = ft.classifier(make_gpt(), 4).to(dtype=np.float64)
    teacher = ft.classifier(make_gpt(3), 4, seed=2).to(dtype=np.float64)
    rng = np.random.default_rng(0)
    batch = {"ids": rng.integers(0, VOCAB, (5, 6)), "labels": np.array([0, 3, -100, 1, 1])}
    w = np.array([1.0, 2.0, 5.0, 0.5])
    z_s, z_t = host(student(batch["ids"])), host(teacher(batch["ids"]))
    rows = [0, 1, 3, 4]
    for class_weight in (None, w):
        weights = np.ones(4) if class_weight is None else w[batch["labels"][rows]]
        nll = -log_softmax(z_s)[rows, batch["labels"][rows]]
        expected = (weights * (0.5 * nll + 0.5 * 4 * kl(z_t, z_s, 2)[rows])).sum() / weights.sum()
        value = value_of(ft.Hinton(teacher), student, {**batch, "class_weight": class_weight})
        assert value == pytest.approx(expected, rel=1e-10)


def cosine_of(a: np.ndarray, b: np.ndarray, real: np.ndarray) -> float:
    return float(distilbert.cosine_loss(leaf(a), Tensor(dev(b)), dev(real)).data)


def check_cosine() -> None:
    """Between 0 and 2; 0 for positive multiples, 2 for negative ones; padding does not count."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        a, b = rng.standard_normal((2, 3, 4, 5))
        real = rng.random((3, 4)) < 0.7
        real[0, 0] = True
        cos = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
        scale = rng.uniform(0.1, 9, (3, 4, 1))
        assert cosine_of(a, b, real) == pytest.approx((1 - cos)[real].mean(), rel=1e-10)
        assert cosine_of(a * scale, b, real) == pytest.approx(cosine_of(a, b, real), rel=1e-10)
        assert cosine_of(a, a * scale, real) == pytest.approx(0, abs=1e-12)
        assert cosine_of(a, -a * scale, real) == pytest.approx(2, rel=1e-12)
        assert cosine_of(np.where(real[..., None], a, 99), b, real) == pytest.approx(cosine_of(a, b, real), rel=1e-10)
        gradcheck(lambda x, b=b, real=real: distilbert.cosine_loss(x, Tensor(dev(b)), dev(real)), [a], rng)


def masked_batch(seed: int = 0) -> dict:
    """A batch of masked language modelling, with padding: few labels, more real tokens."""
    rng = np.random.default_rng(seed)
    batch = make_batch([8, 5, 3], seed)
    chosen = (rng.random(batch["ids"].shape) < 0.3) & batch["mask"]
    chosen[:, 0] = True
    return {**batch, "labels": np.where(chosen, batch["ids"], -100)}


def make_bert(seed: int = 0, layers: int = 2, **more: Any) -> ft.BERT:
    config = {"vocab": VOCAB, "positions": 16, "width": 12, "layers": layers, "heads": 3, "hidden": 16}
    return ft.BERT(ft.BERTConfig(**{**config, **more}), seed=seed)


def check_triple() -> None:
    """a T² KL and c cosine over all real tokens, b CE over the masked ones; linear in a, b and c."""
    student, teacher = make_bert(0).to(dtype=np.float64), make_bert(5).to(dtype=np.float64)
    batch = masked_batch()
    mask, labels = batch["mask"], batch["labels"]
    z_s, z_t = (host(model(batch["ids"], mask=mask))[mask] for model in (student, teacher))
    states = []
    for model in (student, teacher):
        ctx = Context(mask=mask)
        model(batch["ids"], ctx)
        states.append(host(ctx.last_hidden_state)[mask])
    h_s, h_t = states
    has_label = labels[mask] != -100
    ce = -log_softmax(z_s)[has_label, labels[mask][has_label]].mean()
    cos = (h_s * h_t).sum(-1) / (np.linalg.norm(h_s, axis=-1) * np.linalg.norm(h_t, axis=-1))
    for T, a, b, c in ((2.0, 5, 2, 1), (1.0, 0, 0, 3), (3.0, 1, 0, 0), (2.0, 0, 1, 0)):
        expected = a * T**2 * kl(z_t, z_s, T).mean() + b * ce + c * (1 - cos).mean()
        loss = ft.DistilBERTLoss(teacher, T, a, b, c)
        assert value_of(loss, student, batch) == pytest.approx(expected, rel=1e-9)
    assert ft.DistilBERTLoss(teacher).read(batch).weight == mask.sum()
    same = ft.DistilBERTLoss(student, hard=0.0)
    assert value_of(same, student, batch) == pytest.approx(0, abs=1e-10)


CHECKS = [check_value, check_gradient, check_zero, check_limits, check_stable, check_hinton, check_teacher_rests,
          check_padding, check_classes, check_cosine, check_triple]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_distillation_loss_has_the_property(check):
    check()


# ── wrong losses ─────────────────────────────────────────────────────────────────────────────────────────────────────
def on_rows(rows: Any) -> Any:
    """A wrong soft loss from a function (log p, log q, T, w) -> a scalar."""
    def wrong(name: str, logits: Tensor, teacher: TeacherLogits, weight: Any, temperature: float) -> Tensor:
        logits = logits.reshape(-1, logits.shape[-1])
        z_t = Tensor(array.put_like(teacher.values, logits.data)).reshape(logits.shape)
        log_q = ops.log_softmax(logits * (1 / temperature))
        log_p = ops.log_softmax(z_t * (1 / temperature))
        return rows(log_p, log_q, temperature, weight)
    return wrong


def mean(rows: Tensor, weight: Any) -> Tensor:
    return (rows * weight).sum() * (1 / weight.sum())


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (ops.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def reversed_kl(log_p: Tensor, log_q: Tensor, T: float, w: Any) -> Tensor:
    return mean(forward_kl(log_q, log_p), w) * T**2


def over_classes(log_p: Tensor, log_q: Tensor, T: float, w: Any) -> Tensor:
    return mean(forward_kl(log_p, log_q), w) * (T**2 / log_p.shape[-1])


def without_square(log_p: Tensor, log_q: Tensor, T: float, w: Any) -> Tensor:
    return mean(forward_kl(log_p, log_q), w)


def with_T_once(log_p: Tensor, log_q: Tensor, T: float, w: Any) -> Tensor:
    return mean(forward_kl(log_p, log_q), w) * T


def summed(log_p: Tensor, log_q: Tensor, T: float, w: Any) -> Tensor:
    """`batchmean` of logits (B, T, V): divided by the number of rows of the batch, here 3."""
    return (forward_kl(log_p, log_q) * w).sum() * (T**2 / 3)


def unweighted(log_p: Tensor, log_q: Tensor, T: float, w: Any) -> Tensor:
    return forward_kl(log_p, log_q).mean() * T**2


def cross_entropy_form(log_p: Tensor, log_q: Tensor, T: float, w: Any) -> Tensor:
    return mean((ops.exp(log_p) * log_q).sum(axis=-1) * -1, w) * T**2


def unsafe(log_p: Tensor, log_q: Tensor, T: float, w: Any) -> Tensor:
    """The logarithm of a softmax, for which small probabilities are 0."""
    return mean((ops.exp(log_p) * (ops.log(ops.exp(log_p)) - ops.log(ops.exp(log_q)))).sum(axis=-1), w) * T**2


def sharp_teacher(name: str, logits: Tensor, teacher: TeacherLogits, weight: Any, temperature: float) -> Tensor:
    """Only the student's logits are divided by T."""
    values = array.put_like(teacher.values, logits.data) * temperature
    return soft_loss(name, logits, TeacherLogits(values), weight, temperature)


def teacher_in_its_own_mode(teacher: ft.Module, targets: ft.Targets) -> Context:
    """The teacher's dropout is active while the student trains."""
    ctx = targets.context(np.random.default_rng(1))
    teacher(targets.ids, ctx)
    return ctx


def teacher_with_gradient(name: str, model: ft.Module, targets: ft.Targets, rng: Any, teacher: ft.Module,
                          temperature: float, share: float) -> tuple[Context, Tensor]:
    """KL as one writes it down: both passes are recorded."""
    ctx = targets.context(rng)
    logits = model(targets.ids, ctx)
    hard = hinton.cross_entropy(model, logits, targets)
    theirs = teacher(targets.ids, targets.context())
    return ctx, hard * (1 - share) + ft.functional.kl_divergence(theirs, logits, temperature) * share


def shares_exchanged(name: str, model: ft.Module, targets: ft.Targets, rng: Any, teacher: ft.Module,
                     temperature: float, share: float) -> tuple[Context, Tensor]:
    return right_mixed(name, model, targets, rng, teacher, temperature, 1 - share)


def cosine_with_padding(student: Tensor, teacher: Tensor, real: Any) -> Tensor:
    return cosine_loss(student, teacher, real | True)


def cosine_as_a_dot(student: Tensor, teacher: Tensor, real: Any) -> Tensor:
    weight = (real / real.sum()).astype(student.dtype)
    return ((1 - (student * teacher).sum(axis=-1)) * weight).sum()


def masked_tokens_only(self: Any, batch: Any) -> ft.Targets:
    """KL and cosine at the masked positions alone."""
    return read_batch(batch)


def every_position(self: Any, batch: Any) -> ft.Targets:
    """Padding has logits, too."""
    targets = right_read(self, {key: value for key, value in batch.items() if key != "mask"})
    targets.facts = read_batch(batch).facts
    return targets


right_mixed = hinton.mixed_loss
right_read = ft.DistilBERTLoss.read
WRONG: dict[str, tuple[Any, str, Any]] = {
    "KL is a distance: its arguments may change places.": (hinton, "soft_loss", on_rows(reversed_kl)),
    "A mean is over all entries, the classes too.": (hinton, "soft_loss", on_rows(over_classes)),
    "A temperature needs no further factor.": (hinton, "soft_loss", on_rows(without_square)),
    "The gradient shrinks by T, so the factor is T.": (hinton, "soft_loss", on_rows(with_T_once)),
    "batchmean divides by the number of tokens.": (hinton, "soft_loss", on_rows(summed)),
    "Every row has the same weight.": (hinton, "soft_loss", on_rows(unweighted)),
    "The cross-entropy with the teacher is its KL.": (hinton, "soft_loss", on_rows(cross_entropy_form)),
    "log(softmax(z)) is log_softmax(z).": (hinton, "soft_loss", on_rows(unsafe)),
    "The teacher's probabilities are its own, at T = 1.": (hinton, "soft_loss", sharp_teacher),
    "The teacher is in evaluation mode by itself.": (soft, "run_teacher", teacher_in_its_own_mode),
    "Nobody updates the teacher, so it may have gradients.": (hinton, "mixed_loss", teacher_with_gradient),
    "λ is the share of the labels.": (hinton, "mixed_loss", shares_exchanged),
    "Padding has hidden states, too.": (distilbert, "cosine_loss", cosine_with_padding),
    "The cosine is the product of the states.": (distilbert, "cosine_loss", cosine_as_a_dot),
    "The teacher is asked where a label is.": (ft.DistilBERTLoss, "read", masked_tokens_only),
    "The teacher is asked everywhere.": (ft.DistilBERTLoss, "read", every_position),
}


@wrong_answers
@pytest.mark.parametrize("belief", WRONG)
def test_a_wrong_loss_is_caught(belief):
    owner, name, f = WRONG[belief]
    with replaced(owner, name, f):
        assert any(rejects(check) for check in CHECKS)


REJECTED = {
    check_value: "Every row has the same weight.",
    check_gradient: "The gradient shrinks by T, so the factor is T.",
    check_zero: "The cross-entropy with the teacher is its KL.",
    check_limits: "KL is a distance: its arguments may change places.",
    check_stable: "log(softmax(z)) is log_softmax(z).",
    check_hinton: "λ is the share of the labels.",
    check_teacher_rests: "Nobody updates the teacher, so it may have gradients.",
    check_padding: "The teacher is asked everywhere.",
    check_classes: "Every row has the same weight.",
    check_cosine: "The cosine is the product of the states.",
    check_triple: "The teacher is asked where a label is.",
}


@wrong_answers
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_check_rejects_a_wrong_loss(check):
    owner, name, f = WRONG[REJECTED[check]]
    with replaced(owner, name, f):
        assert rejects(check)


# ── in fit ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def kl_to(teacher: ft.Module, student: ft.Module) -> float:
    return ft.evaluate(student, BATCHES, loss=ft.Hinton(teacher, 1.0, 1.0))["loss"]


@pytest.mark.parametrize("kind", ["hinton", "word level", "triple"])
def test_a_student_comes_closer_to_its_teacher_and_resumes_bitwise(kind, tmp_path):
    teacher = make_gpt(3, dropout=0.3)
    for p in teacher.parameters():
        p.copy_(host(p) * 4)
    loss = {"hinton": ft.Hinton(teacher, 2.0, 0.9), "word level": ft.WordLevel(teacher, 0.9),
            "triple": ft.DistilBERTLoss(teacher, hard=0.5)}[kind]
    before = values_of(teacher)

    def run(name: str, stop: int = 0) -> tuple[ft.GPT, ft.History]:
        model = make_gpt(dropout=0.1)
        history = ft.fit(model, BATCHES, 10, ft.AdamW(0.03), stop_at(stop), loss=loss, out=tmp_path / name,
                         resume=True, save_every=2, accumulate=2, progress=False)
        return model, history

    model, history = run("straight")
    assert kl_to(teacher, model) < 0.8 * kl_to(teacher, make_gpt())
    with pytest.raises(Stop):
        run("stopped", stop=6)
    resumed, same_history = run("stopped")
    assert history == same_history
    assert equal(values_of(model), values_of(resumed))
    assert equal(values_of(teacher), before)


def test_without_a_mask_all_tokens_of_a_masked_batch_are_real():
    labels = np.full((2, 5), -100)
    labels[0, 1] = 3
    targets = ft.DistilBERTLoss(make_bert(5)).read({"ids": np.ones((2, 5), int), "labels": labels})
    assert targets.weight == 10 and targets.logit_positions is None
    np.testing.assert_array_equal(targets.labels, labels.reshape(-1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_distillation_in_16_bits_is_close_to_one_in_32(dtype):
    teacher = make_gpt(3)
    runs = []
    for autocast in (None, dtype):
        model = make_gpt()
        runs.append(ft.fit(model, BATCHES, 4, ft.AdamW(0.01), loss=ft.Hinton(teacher), autocast=autocast,
                           progress=False).losses)
    np.testing.assert_allclose(runs[0], runs[1], rtol=0.02)
    narrow = ft.fit(make_gpt().to(dtype=dtype), BATCHES, 4, ft.AdamW(0.01), loss=ft.Hinton(teacher), progress=False)
    np.testing.assert_allclose(narrow.losses, runs[0], rtol=0.03)


@pytest.mark.parametrize("make, words", [
    (lambda t: ft.Hinton(t, temperature=0), "Hinton: temperature wants a finite number > 0, got 0"),
    (lambda t: ft.Hinton(t, soft=1.5), "Hinton: soft wants a finite number >= 0 and <= 1"),
    (lambda t: ft.WordLevel(t, alpha=-1), "WordLevel: alpha wants"),
    (lambda t: ft.DistilBERTLoss(t, temperature=0), "DistilBERTLoss: temperature wants a finite number > 0, got 0"),
    (lambda t: ft.DistilBERTLoss(t, soft=0, hard=0, cosine=0), "a weight that is not 0"),
])
def test_a_loss_without_meaning_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make(make_gpt())


def test_teachers_that_do_not_fit_are_refused():
    student, batch = make_gpt(), BATCHES[0]
    larger = ft.GPT(ft.GPTConfig(VOCAB + 4, 16, 12, 2, 3, 16), seed=1)
    for loss in (ft.Hinton(larger), ft.WordLevel(larger), ft.DistilBERTLoss(larger)):
        with pytest.raises(ValueError, match="wants a teacher with the student's vocabulary of 19 tokens, got 23 tok"):
            value_of(loss, student, batch)
    with pytest.raises(ValueError, match="wants a teacher whose hidden states have the student's shape"):
        value_of(ft.DistilBERTLoss(make_gpt(1, width=9)), student, batch)
    classes = {**batch, "labels": np.array([0, 1, 1])}
    with pytest.raises(ValueError, match="Hinton wants a teacher with the student's logits of shape \\(3, 2\\), got"):
        value_of(ft.Hinton(ft.classifier(make_gpt(1), 3)), ft.classifier(make_gpt(), 2), classes)
    with pytest.raises(ValueError, match="one label per token.*take Hinton"):
        ft.DistilBERTLoss(student).read(classes)
    with pytest.raises(TypeError, match="Hinton: teacher wants a model or a TeacherCache, got 3"):
        ft.Hinton(3).read(batch)


def test_a_cache_of_another_vocabulary_is_refused(tmp_path):
    larger = ft.GPT(ft.GPTConfig(VOCAB + 4, 16, 12, 2, 3, 16), seed=1)
    for k in (4, None):
        cache = TeacherCache(tmp_path / str(k), larger, k)
        cache.fill(BATCHES)
        for source in (cache, TeacherCache(tmp_path / str(k))):
            with pytest.raises(ValueError, match="wants a teacher with the student's 19 classes, got a cache with 23"):
                value_of(ft.Hinton(source), make_gpt(), BATCHES[0])


def make_tokenizer(*words: str) -> Tokenizer:
    return Tokenizer(WordLevelModel({word: i for i, word in enumerate(words)}, unk_token=words[0]))


def test_another_tokenizer_is_refused_with_a_token_that_differs():
    check_tokenizers(make_tokenizer("?", "a", "b"), make_tokenizer("?", "a", "b"))
    with pytest.raises(ValueError, match="the token 'a' has the id 1 for the student and 2 for the teacher"):
        check_tokenizers(make_tokenizer("?", "a", "b"), make_tokenizer("?", "b", "a"))
    with pytest.raises(ValueError, match="the token 'c' has the id None for the student"):
        check_tokenizers(make_tokenizer("?", "a"), make_tokenizer("?", "a", "c"))


# ── a student's start ────────────────────────────────────────────────────────────────────────────────────────────────
def test_layer_maps():
    assert layer_map("spread", 12, 6) == [0, 2, 4, 7, 9, 11]
    assert layer_map("every_other", 12, 6) == [0, 2, 4, 6, 8, 10]
    for L in range(1, 30):
        assert layer_map("spread", L, L) == list(range(L))
        for m in range(1, L + 1):
            layers = layer_map("spread", L, m)
            assert layers == sorted(set(layers)) and len(layers) == m
            assert layers[0] == 0 and (m == 1 or layers[-1] == L - 1)
    assert layer_map([1, 3], 4, 2) == [1, 3]


@pytest.mark.parametrize("kind, L, m, words", [
    ("spread", 4, 5, "m wants a whole number from 1 to 4, got 5"),
    ("spread", 4, 0, "m wants a whole number from 1 to 4, got 0"),
    ("every_other", 6, 4, "every other layer of 6 gives at most 3 layers, wanted 4"),
    ("first", 6, 2, "kind wants one of 'spread', 'every_other', got 'first'"),
    ([0, 6], 6, 2, "a layer wants a whole number from 0 to 5, got 6"),
    ([3, 1], 6, 2, "wants 2 different layers, bottom to top"),
    ([1], 6, 2, "wants 2 different layers"),
])
def test_bad_layer_maps_are_refused(kind, L, m, words):
    with pytest.raises(ValueError, match=words):
        layer_map(kind, L, m)


@pytest.mark.parametrize("make", [lambda: make_bert(2, 6), lambda: ft.classifier(make_bert(2, 6), 3),
                                  lambda: ft.GPT(ft.GPTConfig(VOCAB, 16, 12, 6, 3, 16), seed=2)])
def test_a_student_has_its_teachers_parameters(make, tmp_path):
    teacher = make()
    teacher.blocks[0].attn.q.weight.train(on=False)
    before = values_of(teacher)
    model = ft.student(teacher, 3)
    theirs = teacher.named_parameters()
    for name, p in model.named_parameters().items():
        if name.startswith("blocks."):
            block = int(name.split(".")[1])
            name = name.replace(f"blocks.{block}.", f"blocks.{[0, 2, 5][block]}.")
        np.testing.assert_array_equal(host(p), host(theirs[name]))
        assert p.requires_grad and not np.shares_memory(host(p), host(theirs[name]))
    ids = BATCHES[0]["ids"]
    ft.save(model, tmp_path / "student")
    np.testing.assert_array_equal(host(ft.load(tmp_path / "student")[0](ids)), host(model(ids)))
    whole = ft.student(teacher, 6)
    np.testing.assert_array_equal(host(whole(ids)), host(teacher(ids)))
    assert equal(values_of(teacher), before) and len(teacher.blocks) == 6


def test_a_student_without_token_types_is_a_distilbert(tmp_path):
    teacher = make_bert(1, 4)
    model = ft.student(teacher, 2, token_types=False)
    assert model.type is None and model.pooler is None
    ft.save(model, tmp_path / "m")
    assert '"distilbert"' in (tmp_path / "m" / "config.json").read_text()
    with pytest.raises(ValueError, match="token_types=False wants a teacher with token types"):
        ft.student(model, 1, token_types=False)


def test_distilbert_has_as_many_parameters_as_the_paper_says():
    """66.36 of 109.48 million: without the head of masked language models, whose matrix is the embedding."""
    from tinyft.memory.training import build, without_numbers
    with without_numbers():
        teacher = build(ft.BERTConfig())
        teacher.head = None
        teacher.pooler = None
        total = ft.count(teacher).total
        small = ft.student(teacher, 6, token_types=False)
        assert ft.count(small).total == 66_362_880
    assert (total + 768 * 768 + 768) == 109_482_240
    assert 66_362_880 / 109_482_240 == pytest.approx(0.606, abs=5e-4)


def test_students_that_cannot_be_are_refused():
    teacher = make_bert(0, 4)
    ft.attach(teacher, ft.LoRA(r=2))
    with pytest.raises(ValueError, match="student wants a teacher without methods, got 'lora' attached"):
        ft.student(teacher, 2)
    with pytest.raises(ValueError, match="decoder_layers wants an encoder-decoder, got a GPT, which has one stack"):
        ft.student(make_gpt(), 1, decoder_layers=1)
    experts = ft.SwitchConfig(experts=2)
    switched = ft.GPT(ft.GPTConfig(VOCAB, 16, 12, 4, 3, 16, switch=experts), seed=0)
    with pytest.raises(ValueError, match=r"Switch layers at the blocks \[1\] of a student with 2 layers"):
        ft.student(switched, 2, [0, 2])
    assert ft.student(switched, 2, [0, 3]).blocks[1].mlp.router.weight.shape == (2, 12)


# ── the teacher's outputs on disk ────────────────────────────────────────────────────────────────────────────────────
def test_a_full_cache_is_the_teacher(tmp_path):
    student, teacher = make_gpt(), make_gpt(3, 0.3)
    cache = TeacherCache(tmp_path / "cache", teacher, k=None)
    for batch in BATCHES:
        for kind in (ft.Hinton, ft.WordLevel):
            live = value_of(kind(teacher), student, batch)
            assert value_of(kind(cache), student, batch) == pytest.approx(live, rel=1e-6)
    assert cache.passes == len(cache) == sum(len(batch["ids"]) for batch in BATCHES)


def test_an_epoch_pays_the_teacher_once_and_other_runs_pay_nothing(tmp_path):
    teacher = make_gpt(3)
    rows = [np.random.default_rng(i).integers(0, VOCAB, 7) for i in range(12)]
    batches = ft.data.Batches(rows, 5, seed=1)
    cache = TeacherCache(tmp_path / "cache", teacher, k=6)
    assert cache.fill(batches) == 12
    assert cache.fill(batches) == 0
    passes = []
    right = type(teacher).forward

    def counted(self: ft.GPT, ids: Any, ctx: Context) -> Tensor:
        passes.append(self is teacher)
        return right(self, ids, ctx)
    reopened = TeacherCache(tmp_path / "cache")
    assert len(reopened) == 12 and reopened.of == cache.of and reopened.k == 6
    with replaced(type(teacher), "forward", counted):
        for source in (cache, reopened):
            ft.fit(make_gpt(), batches, 7, loss=ft.Hinton(source), progress=False)
    assert len(passes) == 14 and not any(passes), "only the student ran"
    with pytest.raises(ValueError, match="TeacherCache wants a teacher for the 2 rows of this batch"):
        reopened.look_up(read_batch({"ids": np.zeros((2, 5), int)}))


def test_a_row_has_one_key_in_every_batch():
    """Padding, its side and the other rows do not count; labels, masks, token types and ids do."""
    ids = np.random.default_rng(0).integers(1, VOCAB, (3, 6))
    labels = np.where(ids % 2, ids, -100)
    labels[:, 0] = ids[:, 0]
    full = {"ids": ids, "labels": labels}
    keys = row_keys(read_batch(full))
    assert len(set(keys)) == 3
    assert row_keys(read_batch({"ids": ids[1:2], "labels": labels[1:2]})) == keys[1:2]
    for side in ((0, 3), (3, 0)):
        padded = {"ids": np.pad(ids, ((0, 0), side)), "labels": np.pad(labels, ((0, 0), side), constant_values=-100),
                  "mask": np.pad(np.ones((3, 6), bool), ((0, 0), side))}
        assert row_keys(read_batch(padded)) == keys
    others = labels.copy()
    others[0, 0] = -100
    others[0, 1:] = ids[0, 1:]
    for changed in ({"labels": others}, {"token_type_ids": np.eye(3, 6, dtype=int)}, {"ids": ids[:, ::-1]}):
        assert row_keys(read_batch({**full, **changed}))[0] != keys[0]


def keys_of(ids: Any, **facts: Any) -> list[bytes]:
    return row_keys(read_batch({"ids": np.asarray(ids), **facts}))


def test_the_key_of_a_row_follows_its_places_facts_and_source():
    """Labels everywhere, one label per row, a source and a task: each row has the key that it has alone or padded."""
    ids = np.random.default_rng(1).integers(1, VOCAB, (3, 5))
    mask = np.arange(8) < 5
    padded = {"ids": np.pad(ids, ((0, 0), (0, 3))), "mask": np.tile(mask, (3, 1))}
    everywhere = np.where(padded["mask"], 1, -100)
    per_row = keys_of(ids, labels=np.array([0, 1, 0]))
    per_token = keys_of(ids, labels=np.ones((3, 5), int))
    assert keys_of(**padded, labels=np.array([0, 1, 0])) == per_row
    assert keys_of(**padded, labels=everywhere) == per_token
    assert not set(per_row) & set(per_token)
    labels = np.where(np.arange(5) > 1, ids, -100)
    other = ids.copy()
    other[0, 0] = ids[0, 0] % (VOCAB - 1) + 1
    assert keys_of(other, labels=labels)[0] != keys_of(ids, labels=labels)[0], "a token without a label"

    same = np.tile(ids[:1], (3, 1))
    tasks = keys_of(same, task=np.array([0, 1, 0]))
    assert tasks[0] == tasks[2] != tasks[1]
    assert keys_of(same[:1], task=np.array([1])) == tasks[1:2]
    source = np.array([[3, 4], [3, 5], [3, 4]])
    sources = keys_of(same, source_ids=source)
    assert sources[0] == sources[2] != sources[1]
    assert keys_of(same, source_ids=source, source_mask=np.ones((3, 2), bool)) == sources
    in_source = keys_of([[5]], labels=np.array([[5]]), source_ids=np.array([[1, 1, 1]]))
    in_text = keys_of([[5, 1]], labels=np.array([[5, 1]]))
    assert in_source != in_text, "the end of a part counts"


def test_a_cache_of_all_classes_needs_no_tail(tmp_path):
    """k above V, a single row, and a teacher in float64: its logits are kept in float32."""
    teacher = make_gpt(3).to(dtype=np.float64)
    assert TeacherCache(tmp_path, teacher).k == 64
    targets = read_batch({"ids": np.array([[1, 2, 3]])})
    for k in (VOCAB + 5, VOCAB, None):
        cache = TeacherCache(tmp_path / f"{k}", teacher, k=k)
        for _ in range(2):
            found = cache.look_up(targets, 7.0)
            assert found.teacher_tail is None and cache.passes == 1
            assert found.teacher_values.dtype == np.float32 and found.teacher_values.shape == (2, VOCAB)
        cache.flush()
        assert len(TeacherCache(tmp_path / f"{k}", k=k)) == 1


def test_the_tail_is_a_sum_of_exponentials_of_any_size(rng):
    z = rng.standard_normal((4, 9)) * 3000
    columns = largest(z, 4)[1]
    assert columns.dtype == np.int32
    rest = np.sort(z, axis=-1)[:, :5]
    tails = cache.tail_sums(z, columns, [1.0, 2.0])
    assert tails.dtype == np.float32 and cache.tail_sums(z, columns, []).shape == (4, 0)
    for i, T in enumerate((1.0, 2.0)):
        np.testing.assert_allclose(tails[:, i], np.logaddexp.reduce(rest / T, axis=-1), rtol=1e-6)


def test_the_k_largest_of_many(rng):
    """With few, or with other numbers, NumPy's partition at k − 1 is one at k by chance."""
    z = rng.permutation(20 * 20000).reshape(20, 20000).astype(np.float32)
    for k in (2, 500):
        np.testing.assert_array_equal(largest(z, k)[0], -np.sort(-z, axis=-1)[:, :k])


def test_the_k_largest_logits(rng):
    for k in (1, 3, 9, None):
        logits = rng.integers(0, 4, (20, 9)).astype(np.float32) + np.float32(0.01) * np.arange(9, dtype=np.float32)
        values, columns = largest(logits, k)
        np.testing.assert_array_equal(values, -np.sort(-logits, axis=-1)[:, :k])
        np.testing.assert_array_equal(np.take_along_axis(logits, columns, axis=-1), values)


def of_cache(z_t: np.ndarray, k: int, T: float) -> TeacherLogits:
    """What a cache of k logits holds of a teacher's, for one temperature."""
    values, columns = largest(z_t, k)
    tail = cache.tail_sums(z_t, columns, [T])[:, 0]
    return TeacherLogits(dev(values), dev(columns), z_t.shape[-1], dev(tail))


def check_tail(soft_loss: Any = soft_loss) -> None:
    """KL of k + 1 classes: 0 for the teacher itself, never more than KL of all classes, and rising with k to it."""
    for seed in range(30):
        z_s, z_t, T, rng = draw(seed)
        N, V = z_t.shape
        z_t = z_t.astype(np.float32).astype(np.float64)
        weight = rng.uniform(0.5, 2, N)
        full = T**2 * (kl(z_t, z_s, T) * weight).sum() / weight.sum()
        values = []
        for k in range(1, V + 1):
            teacher = of_cache(z_t, k, T)
            values.append(float(soft_loss("L", leaf(z_s), teacher, dev(weight), T).data))
            order = np.argsort(-z_t, axis=-1, kind="stable")
            p, q = (np.take_along_axis(np.exp(log_softmax(z / T)), order, -1) for z in (z_t, z_s))
            merged_p, merged_q = (np.append(a[:, :k], a[:, k:].sum(-1, keepdims=True), -1) for a in (p, q))
            with np.errstate(invalid="ignore", divide="ignore"):
                terms = np.where(merged_p > 0, merged_p * np.log(merged_p / merged_q), 0)
            expected = T**2 * (terms.sum(-1) * weight).sum() / weight.sum()
            assert values[-1] == pytest.approx(expected, rel=1e-5, abs=1e-6)
            same = float(soft_loss("L", leaf(z_t), teacher, dev(weight), T).data)
            assert same == pytest.approx(0, abs=1e-6)
        assert all(a <= b + 1e-6 for a, b in zip(values, values[1:]))
        assert values[-1] == pytest.approx(full, rel=1e-6, abs=1e-9)
        if V > 2:
            gradcheck(lambda z, t=of_cache(z_t, 2, T), w=weight, T=T: soft_loss("L", z, t, dev(w), T), [z_s], rng)


def test_the_classes_beyond_k_count_as_one():
    check_tail()
    far = np.array([[60.0, 0.0, -60.0, -90.0], [0.0, 900.0, -900.0, 0.0]])
    for z_s, z_t in ((far, -far), (far, far[:, ::-1].copy()), (far, far)):
        x = leaf(z_s, np.float32)
        loss = soft_loss("L", x, of_cache(z_t, 2, 1.0), dev(np.ones(2, np.float32)), 1.0)
        loss.backward()
        assert np.isfinite(host(loss)) and np.isfinite(host(x.grad)).all()


def shared_out(name: str, logits: Tensor, teacher: TeacherLogits, weight: Any, T: float) -> Tensor:
    """The probability of the others is shared out among the k classes: the loss without tails."""
    return soft_loss(name, logits, TeacherLogits(teacher.values, teacher.columns, teacher.classes), weight, T)


def left_out(name: str, logits: Tensor, teacher: TeacherLogits, weight: Any, T: float) -> Tensor:
    """The others have no term: Σ p log p/q over k classes."""
    log_q = ops.gather(ops.log_softmax(logits * (1 / T)), teacher.columns)
    all_logits = ops.concatenate(Tensor(teacher.values) * (1 / T), Tensor(teacher.tail[:, None]), axis=-1)
    log_p = ops.log_softmax(all_logits)[:, :-1]
    return mean(forward_kl(log_p, log_q), weight) * T**2


def student_shares_out(name: str, logits: Tensor, teacher: TeacherLogits, weight: Any, T: float) -> Tensor:
    """Both distributions are those of the k classes alone."""
    log_q = ops.log_softmax(ops.gather(logits * (1 / T), teacher.columns))
    log_p = ops.log_softmax(Tensor(teacher.values) * (1 / T))
    return mean(forward_kl(log_p, log_q), weight) * T**2


def tail_as_a_logit(name: str, logits: Tensor, teacher: TeacherLogits, weight: Any, T: float) -> Tensor:
    """The tail is divided by T, as if it were a logit."""
    other = TeacherLogits(teacher.values, teacher.columns, teacher.classes, teacher.tail / T)
    return soft_loss(name, logits, other, weight, T)


@wrong_answers
@pytest.mark.parametrize("wrong", [shared_out, left_out, student_shares_out, tail_as_a_logit])
def test_a_wrong_tail_is_caught(wrong):
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        check_tail(wrong)


def soft_value(student: ft.Module, teacher: ft.Module, batch: dict, k: int, T: float) -> float:
    """The soft loss of a teacher of which k logits and their tail are known, from its own pass."""
    targets = read_batch(batch)
    z_s, z_t = (host(soft.run_teacher(model, targets).output).reshape(-1, VOCAB) for model in (student, teacher))
    weight = targets.labels != -100
    return float(soft_loss("L", leaf(z_s), of_cache(z_t, k, T), dev(weight.astype(z_s.dtype)), T).data)


def check_temperatures(folder: Any) -> None:
    """A cache, with no word about temperatures, gives the loss of each: also of one that comes after it was filled.

    For that one, the teacher runs once more on each row."""
    student, teacher = make_gpt(), make_gpt(3)
    cache = TeacherCache(folder, teacher, k=4)
    rows = cache.fill(BATCHES)
    for T, passes in ((1.0, rows), (2.0, rows), (3.0, 2 * rows), (3, 2 * rows), (1.0, 2 * rows)):
        for batch in BATCHES:
            value = value_of(ft.Hinton(cache, T, 1.0), student, batch)
            assert value == pytest.approx(soft_value(student, teacher, batch, 4, T), rel=1e-5)
        assert cache.passes == passes
    assert len(cache) == rows
    cache.flush()
    reopened = TeacherCache(folder)
    for T in (1.0, 2.0, 3.0):
        value = value_of(ft.Hinton(reopened, T, 1.0), student, BATCHES[0])
        assert value == pytest.approx(soft_value(student, teacher, BATCHES[0], 4, T), rel=1e-5)
    with pytest.raises(ValueError, match="for the 3 rows .* not hold with tails at the temperature 4.0"):
        ft.Hinton(reopened, 4.0).read(BATCHES[0])


def test_a_cache_gives_the_loss_of_its_temperature(tmp_path):
    check_temperatures(tmp_path)
    with pytest.raises(TypeError, match="temperatures wants a tuple of numbers, such as"):
        TeacherCache(tmp_path / "new", make_gpt(3), temperatures=2.0)


def without_tail(self: TeacherCache, targets: ft.Targets, temperature: float | None = None) -> Any:
    """The probability of the others is shared out among the k classes: the default of earlier versions."""
    return right_look_up(self, targets, None)


def of_the_first_tail(self: TeacherCache, targets: ft.Targets, temperature: float | None = None) -> Any:
    """The tail of the lowest temperature serves all."""
    return right_look_up(self, targets, 1.0)


def never_again(self: TeacherCache, keys: Any, temperatures: Any) -> list[int]:
    """A row that is there is there at all temperatures."""
    return [i for i, key in enumerate(keys) if key not in self._entries]


def again_and_again(self: TeacherCache, keys: Any, temperatures: Any) -> list[int]:
    """Every row is computed, whatever the cache holds."""
    return list(range(len(keys)))


right_look_up = TeacherCache.look_up


@wrong_answers
@pytest.mark.parametrize("name, wrong", [
    ("look_up", without_tail), ("look_up", of_the_first_tail), ("_lacking", never_again), ("_lacking", again_and_again),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_cache_of_another_temperature_is_caught(name, wrong, tmp_path):
    with replaced(TeacherCache, name, wrong), pytest.raises((AssertionError, KeyError)):
        check_temperatures(tmp_path)


def test_a_folder_without_tails_is_read_and_completed(tmp_path):
    """Files of earlier versions have no tails unless they were asked for; these files are the same."""
    student, teacher = make_gpt(), make_gpt(3)
    rows = TeacherCache(tmp_path, teacher, k=4, temperatures=()).fill(BATCHES)
    (file,) = tmp_path.iterdir()
    arrays, facts = read_tensors(file)
    assert arrays.keys() == {"keys", "counts", "values", "columns"} and facts["temperatures"] == []
    with pytest.raises(ValueError, match=f"wants a teacher for the {len(BATCHES[0]['ids'])} rows"):
        ft.Hinton(TeacherCache(tmp_path)).read(BATCHES[0])
    cache = TeacherCache(tmp_path, teacher, k=4)
    assert len(cache) == 0
    assert cache.fill(BATCHES) == rows == len(cache) == len(TeacherCache(tmp_path, teacher, k=4))
    expected = soft_value(student, teacher, BATCHES[0], 4, 2.0)
    value = value_of(ft.Hinton(TeacherCache(tmp_path), 2.0, 1.0), student, BATCHES[0])
    assert value == pytest.approx(expected, rel=1e-5)


def test_more_logits_come_closer_to_the_teacher(tmp_path):
    """The soft loss of a cache differs from the teacher's by less, the larger k is; over three batches."""
    student, teacher = make_gpt(), make_gpt(3)
    for p in teacher.parameters():
        p.copy_(host(p) * 4)
    errors = []
    for k in (2, 6, 12, None):
        cache = TeacherCache(tmp_path / str(k), teacher, k)
        differences = []
        for batch in BATCHES:
            live = value_of(ft.Hinton(teacher, 2.0, 1.0), student, batch)
            differences.append(abs(value_of(ft.Hinton(cache, 2.0, 1.0), student, batch) - live))
        errors.append(np.mean(differences))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5 < errors[-2]


def test_a_cache_of_another_teacher_or_a_damaged_one_is_refused(tmp_path):
    cache = TeacherCache(tmp_path / "cache", make_gpt(3), k=4)
    cache.fill(BATCHES)
    with pytest.raises(ValueError, match="wants outputs of this teacher, got .* of another one"):
        TeacherCache(tmp_path / "cache", make_gpt(4), k=4)
    with pytest.raises(ValueError, match="wants k=5, got .* with k=4"):
        TeacherCache(tmp_path / "cache", make_gpt(3), k=5)
    with pytest.raises(ValueError, match="wants a teacher, or a folder that holds the outputs of one"):
        TeacherCache(tmp_path / "empty")
    file = next((tmp_path / "cache").iterdir())
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        TeacherCache(tmp_path / "cache", make_gpt(3), k=4)
    with pytest.raises(IndexError, match="token id 30 is outside the teacher's vocabulary of 19"):
        TeacherCache(tmp_path / "new", make_gpt(3)).look_up(read_batch({"ids": np.full((1, 4), 30)}))


def test_a_run_on_a_cache_resumes(tmp_path):
    def run(name: str, stop: int = 0) -> list[np.ndarray]:
        cache = TeacherCache(tmp_path / "cache", make_gpt(3), k=5)
        model = make_gpt(dropout=0.1)
        ft.fit(model, BATCHES, 6, ft.AdamW(0.02), stop_at(stop), loss=ft.Hinton(cache), out=tmp_path / name,
               resume=True, save_every=2, progress=False)
        return values_of(model)

    straight = run("straight")
    with pytest.raises(Stop):
        run("stopped", stop=4)
    assert equal(run("stopped"), straight)


# ── a Switch model into a dense one ──────────────────────────────────────────────────────────────────────────────────
def make_switched(kind: str, experts: int, seed: int = 1, **more: Any) -> ft.Module:
    switch = ft.SwitchConfig(experts=experts, eval_capacity=float(experts), min_capacity=1)
    if kind == "gpt":
        return ft.GPT(ft.GPTConfig(VOCAB, 16, 12, 4, 3, 16, switch=switch, **more), seed=seed)
    return make_bert(seed, 4, switch=switch, **more)


@pytest.mark.parametrize("kind", ["gpt", "bert"])
@pytest.mark.parametrize("start", ["new", "mean", [2, 0]])
def test_a_dense_student_has_all_parts_but_the_experts(kind, start, tmp_path):
    teacher = make_switched(kind, 3)
    before = values_of(teacher)
    model = ft.dense_student(teacher, start)
    theirs = teacher.named_parameters()
    ours = model.named_parameters()
    feed_forwards = {name for name in ours if name.startswith(("blocks.1.mlp.", "blocks.3.mlp."))}
    assert len(feed_forwards) == 8
    for name in ours.keys() - feed_forwards:
        np.testing.assert_array_equal(host(ours[name]), host(theirs[name]))
        assert not np.shares_memory(host(ours[name]), host(theirs[name]))
    experts = [host(theirs[f"blocks.1.mlp.experts.{j}.up.weight"]) for j in range(3)]
    up = host(ours["blocks.1.mlp.up.weight"])
    if start == "new":
        assert not any(np.array_equal(up, expert) for expert in experts)
        other = ft.dense_student(teacher, start, seed=5).blocks[1].mlp.up.weight
        assert not np.array_equal(up, host(other))
    else:
        expected = np.mean(experts, axis=0) if start == "mean" else experts[2]
        np.testing.assert_allclose(up, expected, rtol=1e-6, atol=1e-8)
    ft.save(model, tmp_path / "student")
    ids = BATCHES[0]["ids"]
    np.testing.assert_array_equal(host(ft.load(tmp_path / "student")[0](ids)), host(model(ids)))
    assert equal(values_of(teacher), before)


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_the_student_of_a_teacher_with_one_expert_is_the_teacher(kind):
    teacher = make_switched(kind, 1)
    ids, mask = BATCHES[0]["ids"], BATCHES[0]["mask"]
    for start in ("mean", [0, 0]):
        model = ft.dense_student(teacher, start)
        np.testing.assert_allclose(host(model(ids, mask=mask))[mask], host(teacher(ids, mask=mask))[mask], atol=1e-6)


def test_a_dense_student_learns_from_a_switch_teacher():
    """λ = 0.25, T = 1: the mix of the paper. The teacher's auxiliary losses do not count."""
    teacher = make_switched("gpt", 3)
    for p in teacher.parameters():
        p.copy_(host(p) * 3)
    student = ft.dense_student(teacher)
    loss = ft.Hinton(teacher, temperature=1.0, soft=0.25)
    targets = read_batch(BATCHES[0])
    z_s, z_t = (host(model(targets.ids, targets.context())).reshape(-1, VOCAB) for model in (student, teacher))
    nll = -log_softmax(z_s)[np.arange(len(z_s)), targets.labels].mean()
    assert value_of(loss, student, BATCHES[0]) == pytest.approx(0.75 * nll + 0.25 * kl(z_t, z_s, 1).mean(), rel=1e-5)
    before = kl_to(teacher, student)
    history = ft.fit(student, BATCHES, 30, ft.AdamW(0.002), loss=ft.Hinton(teacher, 1.0, 1.0), progress=False)
    assert history.terms.keys() == {"loss"}
    assert kl_to(teacher, student) < 0.7 * before


def test_dense_students_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="dense_student wants a model with Switch layers, got a GPT without"):
        ft.dense_student(make_gpt())
    teacher = make_switched("gpt", 3)
    with pytest.raises(ValueError, match="wants one expert for each of the 2 Switch layers, got 1"):
        ft.dense_student(teacher, [0])
    with pytest.raises(ValueError, match="an expert wants a whole number from 0 to 2, got 3"):
        ft.dense_student(teacher, [0, 3])
    with pytest.raises(ValueError, match="start wants one of 'new', 'mean', got 'busiest'"):
        ft.dense_student(teacher, "busiest")
    ft.attach(teacher, ft.LoRA(r=2))
    with pytest.raises(ValueError, match="dense_student wants a teacher without methods, got 'lora' attached"):
        ft.dense_student(teacher)


# ── encoder-decoders ─────────────────────────────────────────────────────────────────────────────────────────────────
def make_seq2seq(seed: int = 0, switch: ft.SwitchConfig | None = None) -> ft.Seq2Seq:
    return ft.Seq2Seq(ft.Seq2SeqConfig(VOCAB, 16, 12, 4, 3, 16, switch=switch), seed=seed)


def source_batch(padding: int = 0) -> dict:
    rng = np.random.default_rng(0)
    ids, source = rng.integers(0, VOCAB, (3, 5)), rng.integers(0, VOCAB, (3, 7))
    mask = np.arange(7) < np.array([7, 2, 4])[:, None]
    sides = ((0, 0), (0, padding))
    return {"ids": ids, "source_ids": np.pad(source, sides), "source_mask": np.pad(mask, sides)}


def test_word_level_distillation_of_an_encoder_decoder(tmp_path):
    """The KL at gold prefixes, from each model's own pass over the source; the same from a cache of all logits."""
    student, teacher = make_seq2seq().to(dtype=np.float64), make_seq2seq(4).to(dtype=np.float64)
    batch = source_batch()
    facts = {"source_ids": batch["source_ids"], "source_mask": batch["source_mask"]}
    z_s, z_t = (host(model(batch["ids"][:, :-1], **facts)).reshape(-1, VOCAB) for model in (student, teacher))
    nll = -log_softmax(z_s)[np.arange(len(z_s)), batch["ids"][:, 1:].reshape(-1)].mean()
    expected = 0.4 * nll + 0.6 * kl(z_t, z_s, 1).mean()
    assert value_of(ft.WordLevel(teacher, 0.6), student, batch) == pytest.approx(expected, rel=1e-10)
    assert value_of(ft.WordLevel(teacher, 0.6), student, source_batch(3)) == pytest.approx(expected, rel=1e-10)
    cache = TeacherCache(tmp_path / "cache", teacher, k=None)
    assert value_of(ft.WordLevel(cache, 0.6), student, batch) == pytest.approx(expected, rel=1e-6)
    assert row_keys(read_batch(source_batch(3))) == row_keys(read_batch(batch))
    other = {**batch, "source_ids": batch["source_ids"][::-1], "source_mask": batch["source_mask"][::-1]}
    assert row_keys(read_batch(other))[0] != row_keys(read_batch(batch))[0]


def test_a_student_of_an_encoder_decoder(tmp_path):
    teacher = make_seq2seq(2)
    model = ft.student(teacher, 3, decoder_layers=1)
    assert (len(model.encoder), len(model.decoder)) == (3, 1)
    for ours, theirs in ((model.encoder[2], teacher.encoder[3]), (model.decoder[0], teacher.decoder[0])):
        np.testing.assert_array_equal(host(ours.mlp.up.weight), host(theirs.mlp.up.weight))
    ft.save(model, tmp_path / "student")
    batch = source_batch()
    facts = {"source_ids": batch["source_ids"], "source_mask": batch["source_mask"]}
    loaded, _ = ft.load(tmp_path / "student")
    np.testing.assert_array_equal(host(loaded(batch["ids"], **facts)), host(model(batch["ids"], **facts)))
    switched = make_seq2seq(2, ft.SwitchConfig(experts=1, eval_capacity=1.0))
    dense = ft.dense_student(switched, "mean")
    np.testing.assert_allclose(host(dense(batch["ids"], **facts)), host(switched(batch["ids"], **facts)), atol=1e-6)
    assert not any(isinstance(module, type(switched.encoder[1].mlp)) for module in dense.modules())
