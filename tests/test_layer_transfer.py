"""TinyBERT's loss beside its formulas in NumPy; attention scores; projections that train and are not saved.

The checks are called with the library's functions, and again with each wrong one of WRONG, which they must reject.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import dev, gradcheck, host, rejects, wrong_answers
from test_distill import kl, log_softmax, longer, make_bert, masked_batch, value_of
from test_loss import BATCHES, VOCAB, Stop, equal, stop_at, values_of
from wrong import replaced

import tinyft as ft
from tinyft.compress.distill import layer_transfer
from tinyft.compress.distill.layer_transfer import squared_distance, teacher_blocks
from tinyft.models.attention import Attention
from tinyft.nn import Context
from tinyft.tensor import Tensor

OFF = {"embeddings": 0.0, "hidden": 0.0, "attention": 0.0, "prediction": 0.0}


def spread_out(model: ft.Module, seed: int = 0) -> ft.Module:
    """Weights at a generic point, in float64, so that scores and hidden states differ between layers."""
    rng = np.random.default_rng(seed)
    for p in model.parameters():
        p.copy_(host(p) + 0.3 * rng.standard_normal(p.shape))
    return model.to(dtype=np.float64)


def models(width: int = 12, causal: bool = False) -> tuple[ft.Module, ft.Module]:
    """(student with two blocks, teacher with four blocks and width 18)"""
    if causal:
        student = ft.GPT(ft.GPTConfig(VOCAB, 16, width, 2, 3, 16), seed=0)
        teacher = ft.GPT(ft.GPTConfig(VOCAB, 16, 18, 4, 3, 16), seed=5)
    else:
        student, teacher = make_bert(0, 2, width=width), make_bert(5, 4, width=18)
    return spread_out(student, 1), spread_out(teacher, 2)


def make_loss(teacher: ft.Module, width: int, **fields: Any) -> ft.TinyBERTLoss:
    """The loss with projections in float64, at a generic point."""
    loss = ft.TinyBERTLoss(teacher, width, **fields)
    loss.module.to(dtype=np.float64)
    rng = np.random.default_rng(3)
    for p in loss.module.parameters():
        p.copy_(rng.standard_normal(p.shape))
    return loss


def observe(model: ft.Module, batch: dict) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """(hidden states, attention scores of each block, logits)"""
    ctx = Context(mask=batch["mask"], output_hidden_states=True, output_attention_scores=True)
    model(batch["ids"], ctx)
    scores = [host(ctx.attention_scores(block.attn)) for block in model.blocks]
    return [host(x) for x in ctx.hidden_states], scores, host(ctx.output)


def written_out(loss: ft.TinyBERTLoss, student: ft.Module, batch: dict, causal: bool) -> dict[str, float]:
    """The four terms, by loops over rows and real positions."""
    H_s, A_s, z_s = observe(student, batch)
    H_t, A_t, z_t = observe(loss.teacher, batch)
    W_e, W_h = host(loss.module.embeddings.weight), host(loss.module.hidden.weight)
    mask = batch["mask"]
    embeddings = np.mean((H_s[0] @ W_e.T - H_t[0])[mask] ** 2)
    hidden = attention = 0.0
    for m, block in enumerate([1, 3]):
        hidden += np.mean((H_s[m + 1] @ W_h.T - H_t[block + 1])[mask] ** 2)
        squares = []
        for b, row in enumerate(mask):
            for i in np.flatnonzero(row):
                for j in np.flatnonzero(row):
                    if j <= i or not causal:
                        squares.append(np.mean((A_s[m][b, :, i, j] - A_t[block][b, :, i, j]) ** 2))
        attention += np.mean(squares)
    has_label = batch["labels"] != -100 if "labels" in batch else mask
    prediction = kl(z_t[has_label], z_s[has_label], 1.0).mean()
    return {"embeddings": embeddings, "hidden": hidden, "attention": attention, "prediction": prediction}


# ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────────
def check_terms() -> None:
    """Each term by loops, and the sum with its weights; a BERT with labels and without, a GPT."""
    rng = np.random.default_rng(0)
    for causal, batch in ((False, masked_batch()), (False, BATCHES[0]), (True, BATCHES[2]), (True, BATCHES[0])):
        student, teacher = models(causal=causal)
        weights = dict(zip(OFF, rng.uniform(0.5, 2, 4).tolist(), strict=True))
        loss = make_loss(teacher, 12, **weights)
        terms = written_out(loss, student, batch, causal)
        for name, term in terms.items():
            one = make_loss(teacher, 12, **{**OFF, name: 3.0})
            assert value_of(one, student, batch) == pytest.approx(3 * term, rel=1e-9), name
        total = sum(weights[name] * term for name, term in terms.items())
        assert value_of(loss, student, batch) == pytest.approx(total, rel=1e-9)


def check_scores() -> None:
    """The softmax of the kept scores, times the values, is the output of attention: grouped, relative and cross."""
    llama = ft.Llama(ft.LlamaConfig(VOCAB, 16, 12, 1, 4, hidden=16, key_value_heads=2, head_width=4), seed=1)
    t5 = ft.T5(ft.T5Config(VOCAB, width=12, layers=1, heads=3, head_width=5, hidden=16, buckets=8, max_distance=6), 1)
    ids = BATCHES[0]["ids"]
    right = ft.ops.attention
    for model, facts in ((make_bert(1, 1), {}), (llama, {}), (t5, {"source_ids": ids[:, :4]})):
        spread_out(model)
        calls: list[tuple] = []

        def recorded(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor, calls: list = calls, **settings: Any) -> Tensor:
            y = right(q, k, v, *bias, **settings)
            calls.append((v, settings["causal"], y))
            return y
        ctx = Context(output_attention_scores=True, **facts)
        with replaced(ft.ops, "attention", recorded):
            model(ids, ctx)
        attentions = [module for module in model.modules() if isinstance(module, Attention)]
        decoder = attentions[-2:] if facts else attentions
        for attention, (v, causal, y) in zip(decoder, calls[-len(decoder):], strict=True):
            scores = host(ctx.attention_scores(attention))                       # (B, H, Tq, Tk)
            if causal:
                scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
            p = np.exp(log_softmax(scores))
            values = np.repeat(host(v), scores.shape[1] // v.shape[1], axis=1)
            np.testing.assert_allclose(p @ values, host(y), atol=1e-10)


def check_zero() -> None:
    """0 for the teacher itself with W = I, which is the start for equal widths; never negative."""
    for causal, batch in ((False, masked_batch()), (True, BATCHES[0])):
        student, teacher = models(18, causal)
        loss = ft.TinyBERTLoss(teacher, 18)
        loss.module.to(dtype=np.float64)
        assert value_of(loss, teacher, batch) == pytest.approx(0, abs=1e-12)
        for name in OFF:
            one = make_loss(teacher, 18, **{**OFF, name: 1.0})
            assert value_of(one, student, batch) > 1e-3


def check_padding() -> None:
    """More padding, and other ids in it, change nothing."""
    for causal, batch in ((False, masked_batch()), (True, BATCHES[0]), (False, BATCHES[1])):
        student, teacher = models(causal=causal)
        loss = make_loss(teacher, 12)
        expected = value_of(loss, student, batch)
        padded = longer(batch)
        if "labels" in batch:
            padded["labels"] = np.pad(batch["labels"], ((0, 0), (0, 3)), constant_values=-100)
        assert value_of(loss, student, padded) == pytest.approx(expected, rel=1e-10)
        other = {**batch, "ids": np.where(batch["mask"], batch["ids"], 3)}
        assert value_of(loss, student, other) == pytest.approx(expected, rel=1e-10)


def check_gradients() -> None:
    """Gradients reach the student and both projections, and nothing of the teacher, which rests."""
    student, teacher = models()
    teacher.train()
    loss = make_loss(teacher, 12)
    _, value = loss(student, loss.read(masked_batch()))
    value.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(module.training for module in teacher.modules())
    for p in loss.module.parameters():
        assert p.grad is not None and np.abs(host(p.grad)).max() > 0
    for name, p in student.named_parameters().items():
        assert p.grad is not None, name
    student.zero_grad()
    only_scores = make_loss(teacher, 12, **{**OFF, "attention": 1.0})
    _, value = only_scores(student, only_scores.read(masked_batch()))
    value.backward()
    assert student.blocks[1].attn.q.weight.grad is not None and student.blocks[1].mlp.up.weight.grad is None
    rng = np.random.default_rng(0)
    mask = dev(np.array([[True, True, False], [True, False, False]]))
    y = Tensor(dev(rng.standard_normal((2, 3, 4))))
    gradcheck(lambda x: squared_distance(x, y, mask), [rng.standard_normal((2, 3, 4))], rng)


CHECKS = [check_terms, check_scores, check_zero, check_padding, check_gradients]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_layer_transfer(check):
    check()


# ── wrong ones ───────────────────────────────────────────────────────────────────────────────────────────────────────
def with_padding(ours: Tensor, theirs: Tensor, mask: Any) -> Tensor:
    return right_distance(ours, theirs, None)


def summed_features(ours: Tensor, theirs: Tensor, mask: Any) -> Tensor:
    return right_distance(ours, theirs, mask) * ours.shape[-1]


def both_learn(ours: Tensor, theirs: Tensor, mask: Any) -> Tensor:
    """The teacher's states are not detached, and its pass is recorded."""
    return right_distance(theirs, ours, mask)


def every_pair(ours: Any, ctx: Context, theirs: Any, teacher_ctx: Context) -> Tensor:
    x, y = ctx.attention_scores(ours), teacher_ctx.attention_scores(theirs)
    difference = x - y.detach()
    return (difference * difference).mean()


def real_keys_only(ours: Any, ctx: Context, theirs: Any, teacher_ctx: Context) -> Tensor:
    """Padded queries count."""
    x, y = ctx.attention_scores(ours), teacher_ctx.attention_scores(theirs)
    difference = x - y.detach()
    keys = np.ones((x.shape[0], x.shape[-1]), bool) if ctx.mask is None else host(ctx.mask)
    weight = np.broadcast_to(keys[:, None, None, :], x.shape) / np.broadcast_to(keys[:, None, None, :], x.shape).sum()
    return (difference * difference * Tensor(weight)).sum()


def probabilities(self: Any, q: Tensor, k: Tensor, bias: Any) -> Tensor:
    return ft.ops.softmax(right_scores(self, q, k, bias))


def unscaled(self: Any, q: Tensor, k: Tensor, bias: Any) -> Tensor:
    return right_scores(self, q, k, bias) * q.shape[-1] ** 0.5


def without_bias(self: Any, q: Tensor, k: Tensor, bias: Any) -> Tensor:
    return right_scores(self, q, k, None)


def first_blocks(layers: Any, N: int, M: int) -> list[int]:
    return list(range(M))


def too_early(layers: Any, N: int, M: int) -> list[int]:
    """g(m) counted from 0: the embeddings would be a block."""
    return [m * N // M for m in range(M)]


class RandomProjections(layer_transfer.Projections):
    """Projections start at random, whatever the widths are."""

    def __init__(self, width: int, teacher_width: int, seed: int):
        super().__init__(width, teacher_width, seed)
        rng = np.random.default_rng(seed)
        for p in self.parameters():
            p.copy_(rng.standard_normal(p.shape))


right_distance = layer_transfer.squared_distance
right_scores = Attention.scores
WRONG: dict[str, tuple[Any, str, Any]] = {
    "Padding has hidden states, too.": (layer_transfer, "squared_distance", with_padding),
    "A squared distance is a sum over features.": (layer_transfer, "squared_distance", summed_features),
    "A distance is the same in both directions.": (layer_transfer, "squared_distance", both_learn),
    "Every pair of positions has a score.": (layer_transfer, "score_distance", every_pair),
    "A mask is about keys alone.": (layer_transfer, "score_distance", real_keys_only),
    "Attention is the matrix of probabilities.": (Attention, "scores", probabilities),
    "A score is the product of query and key.": (Attention, "scores", unscaled),
    "The bias is no part of a score.": (Attention, "scores", without_bias),
    "A projection starts at random.": (layer_transfer, "Projections", RandomProjections),
    "A shallow student is the lower part of its teacher.": (layer_transfer, "teacher_blocks", first_blocks),
    "The first block learns from the first block.": (layer_transfer, "teacher_blocks", too_early),
}


@wrong_answers
@pytest.mark.parametrize("belief", WRONG)
def test_a_wrong_answer_is_caught(belief):
    owner, name, f = WRONG[belief]
    with replaced(owner, name, f):
        assert any(rejects(check) for check in CHECKS)


REJECTED = {
    check_terms: "A shallow student is the lower part of its teacher.",
    check_scores: "The bias is no part of a score.",
    check_zero: "A projection starts at random.",
    check_padding: "A mask is about keys alone.",
    check_gradients: "A distance is the same in both directions.",
}


@wrong_answers
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_property_rejects_something(check):
    owner, name, f = WRONG[REJECTED[check]]
    with replaced(owner, name, f):
        assert rejects(check)


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_two_stages_bring_a_student_to_its_teacher_and_resume_bitwise(tmp_path):
    """General, then the task. The projections are in the checkpoint, and not in the student's files."""
    teacher = make_bert(5, 4, width=18)

    def run(name: str, stop: int = 0) -> tuple[ft.Module, ft.TinyBERTLoss]:
        student = make_bert(0, 2)
        ft.fit(student, BATCHES, 6, ft.AdamW(0.01), loss=ft.TinyBERTLoss(teacher, 12, prediction=0.0), progress=False)
        loss = ft.TinyBERTLoss(teacher, 12)
        ft.fit(student, [masked_batch()], 8, ft.AdamW(0.01), stop_at(stop), loss=loss, out=tmp_path / name, resume=True,
               save_every=2, progress=False)
        return student, loss

    straight, loss = run("straight")
    with pytest.raises(Stop):
        run("stopped", stop=5)
    resumed, resumed_loss = run("stopped")
    assert equal(values_of(resumed), values_of(straight))
    assert equal(values_of(resumed_loss.module), values_of(loss.module))
    start = values_of(ft.TinyBERTLoss(teacher, 12).module)
    assert not any(np.array_equal(a, b) for a, b in zip(values_of(loss.module), start, strict=True))
    ft.save(straight, tmp_path / "student")
    assert ft.load(tmp_path / "student")[0].named_parameters().keys() == straight.named_parameters().keys()
    before = ft.evaluate(make_bert(0, 2), [masked_batch()], loss=ft.TinyBERTLoss(teacher, 12))["loss"]
    assert ft.evaluate(straight, [masked_batch()], loss=loss)["loss"] < 0.9 * before


def test_recomputation_gives_the_same_gradients():
    student, teacher = models()
    loss = make_loss(teacher, 12)
    gradients = []
    for enabled in (False, True):
        student.zero_grad()
        with ft.recompute(enabled):
            _, value = loss(student, loss.read(masked_batch()))
        value.backward()
        gradients.append([host(p.grad).copy() for p in student.parameters()])
    assert equal(*gradients)


def test_a_classifier_learns_from_a_classifier():
    student = ft.classifier(make_bert(0, 2), 3)
    teacher = ft.classifier(make_bert(5, 4, width=18), 3)
    batch = {**BATCHES[0], "labels": np.array([0, 2, 1])}
    history = ft.fit(student, [batch], 12, ft.AdamW(0.01), loss=ft.TinyBERTLoss(teacher, 12), progress=False)
    assert history.losses[-1] < 0.8 * history.losses[0]


def test_a_batch_of_embeddings_needs_no_labels():
    loss = make_loss(models()[1], 12)
    assert loss.read({"ids": Tensor(np.zeros((2, 3, 12)))}).weight == 6
    assert loss.read({"ids": np.zeros((2, 3), int)}).weight == 6


def test_the_map_of_layers():
    assert teacher_blocks("uniform", 12, 4) == [2, 5, 8, 11]
    assert teacher_blocks("uniform", 3, 3) == [0, 1, 2]
    assert teacher_blocks([1, 4], 6, 2) == [1, 4]


def test_models_that_do_not_fit_get_one_sentence():
    student, teacher = make_bert(0, 3), make_bert(5, 4, width=18)
    with pytest.raises(ValueError, match="the student's 3 blocks do not divide the teacher's 4: give layers="):
        value_of(ft.TinyBERTLoss(teacher, 12), student, masked_batch())
    heads = make_bert(0, 4, heads=2)
    with pytest.raises(ValueError, match=r"a teacher with the student's attention, scores of shape .*: attention=0"):
        value_of(ft.TinyBERTLoss(teacher, 12), heads, masked_batch())
    assert value_of(ft.TinyBERTLoss(teacher, 12, attention=0.0), heads, masked_batch()) > 0
    with pytest.raises(ValueError, match="TinyBERTLoss wants a model with one stack of blocks, got a Seq2Seq with 2"):
        ft.TinyBERTLoss(ft.Seq2Seq(ft.Seq2SeqConfig(VOCAB, 16, 12, 1, 3), seed=0), 12)
    with pytest.raises(ValueError, match="got 0 for all four"):
        ft.TinyBERTLoss(teacher, 12, **OFF)
    with pytest.raises(ValueError, match="wants a teacher with the student's vocabulary of 30 tokens"):
        value_of(ft.TinyBERTLoss(teacher, 12), make_bert(0, 2, vocab=30), masked_batch())
    ctx = Context()
    student(BATCHES[0]["ids"], ctx)
    with pytest.raises(LookupError, match="wants a pass with output_attention_scores=True"):
        ctx.attention_scores(student.blocks[0].attn)
