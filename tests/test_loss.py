"""Losses of users, auxiliary losses of modules, and penalties of methods: in `fit`, `evaluate` and checkpoints."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import host, wrong_answers

import tinyft as ft
from tinyft import array, functional, train
from tinyft.files import read_tensors
from tinyft.nn import Context, Linear, Module
from tinyft.train.batch import compute_loss, read_batch

VOCAB, WIDTH = 19, 12


def make_gpt(seed: int = 0, dropout: float = 0.0, width: int = WIDTH) -> ft.GPT:
    return ft.GPT(ft.GPTConfig(VOCAB, 16, width, 2, 3, 16, dropout), seed=seed)


def make_batch(lengths: list[int], seed: int = 0, T: int = 8) -> dict[str, np.ndarray]:
    """Rows of these lengths, padded on the right to T."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, (len(lengths), T))
    return {"ids": ids, "mask": np.arange(T) < np.array(lengths)[:, None]}


def join(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    joined = {}
    for key in batches[0]:
        joined[key] = np.concatenate([batch[key] for batch in batches])
    return joined


BATCHES = [make_batch([8, 3, 5], seed=1), make_batch([2, 4], seed=2), make_batch([7, 8, 8], seed=3)]


# ── losses and modules under test ────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, eq=False)
class Distillation(ft.Loss):
    """KL(teacher ‖ student) of the predicted distributions, mean over the labelled positions."""
    teacher: Module
    temperature: float = 2.0

    def __call__(self, model: Module, targets: ft.Targets, rng: Any = None) -> tuple[Context, ft.Tensor]:
        ctx = targets.context(rng)
        student_logits = model(targets.ids, ctx)
        with ft.no_grad():
            teacher_logits = self.teacher(targets.ids, targets.context())
        return ctx, functional.kl_divergence(teacher_logits, student_logits, self.temperature)

    def metrics(self, ctx: Context, targets: ft.Targets) -> dict[str, float]:
        return {"positions": len(targets.labels)}


@dataclass(frozen=True, eq=False)
class HiddenStateLoss(ft.Loss):
    """Cross-entropy, and the squared distance of a projected hidden state to a teacher's. The projection trains."""
    teacher: Module
    projection: Linear
    hidden_states = True

    @property
    def module(self) -> Module:
        return self.projection

    def __call__(self, model: Module, targets: ft.Targets, rng: Any = None) -> tuple[Context, ft.Tensor]:
        ctx, loss = compute_loss(model, targets, rng)
        with ft.no_grad():
            teacher_ctx = targets.context()
            self.teacher(targets.ids, teacher_ctx)
        difference = self.projection(ctx.hidden_states[1], ctx) - teacher_ctx.hidden_states[1]
        return ctx, loss + (difference * difference).mean()


def make_hidden_state_loss(seed: int = 0, kind: type = HiddenStateLoss) -> Any:
    return kind(make_gpt(seed=5, width=6), Linear(WIDTH, 6, rng=np.random.default_rng(seed)))


class BalancedMLP(Module):
    """An MLP that adds an auxiliary loss: the mean square of its output over real tokens, times `weight`."""
    counts_padding = False                                              # True: a wrong answer

    def __init__(self, mlp: Module, weight: float = 1e4):
        self.mlp = mlp
        self.weight = weight

    def forward(self, x: ft.Tensor, ctx: Context) -> ft.Tensor:
        y = self.mlp(x, ctx)
        square = (y * y).mean(axis=-1)                                  # (B, T)
        if ctx.mask is None or self.counts_padding:
            loss = square.mean()
        else:
            real = ctx.mask.astype(square.dtype)
            loss = (square * ft.Tensor(real / real.sum())).sum()
        ctx.add_loss("balance", loss * self.weight)
        return y


def make_balanced_gpt(seed: int = 0, dropout: float = 0.0) -> ft.GPT:
    model = make_gpt(seed, dropout)
    for block in model.blocks:
        block.mlp = BalancedMLP(block.mlp)
    return model


@dataclass(frozen=True)
class SmallStates(ft.LoRA):
    """LoRA with a penalty on the size of every block's output."""
    hidden_states = True

    def penalty(self, edits: dict, model: Module, ctx: Context) -> ft.Tensor:
        assert len(ctx.hidden_states) == 3, "the input of the first block, and the output of each"
        return sum((h * h).mean() for h in ctx.hidden_states[1:]) * 0.1


class Stop(Exception):
    pass


def stop_at(step: int) -> Callable[[int, int], float]:
    """A schedule that stops the run before the update of a step; 0: never."""
    calls = iter(range(1, 1000))

    def schedule(t: int, T: int) -> float:
        if next(calls) == step:
            raise Stop
        return 1.0
    return schedule


def values_of(*modules: Module) -> list[np.ndarray]:
    return [np.array(host(p)) for module in modules for p in module.parameters()]


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


# ── distillation ─────────────────────────────────────────────────────────────────────────────────────────────────────
def distil(
    out: Path | None = None, teacher_seed: int = 3, temperature: float = 2.0, stop: int = 0,
) -> tuple[ft.GPT, ft.History]:
    model = make_gpt(dropout=0.1)
    ft.attach(model, ft.LoRA(r=2))
    loss = Distillation(make_gpt(teacher_seed, dropout=0.3), temperature)
    history = ft.fit(model, BATCHES, 8, ft.AdamW(0.02), stop_at(stop), loss=loss, out=out, resume=True, save_every=2,
                     accumulate=2, progress=False)
    return model, history


def check_resume(tmp_path: Path) -> None:
    """A distillation that is stopped and resumed ends bitwise as one that never stops."""
    model, history = distil(tmp_path / "straight")
    with pytest.raises(Stop):
        distil(tmp_path / "stopped", stop=6)
    resumed, same_history = distil(tmp_path / "stopped")
    assert history == same_history
    assert equal(values_of(model), values_of(resumed))


def test_distillation_lowers_the_divergence_and_resumes_bitwise(tmp_path):
    check_resume(tmp_path)
    _, history = distil()
    assert history.losses[-1] < history.losses[0]
    assert history.terms == {"loss": history.losses}


def test_a_teacher_is_never_saved_and_never_trained(tmp_path):
    model = make_gpt()
    teacher = make_gpt(3)
    before = values_of(teacher)
    ft.fit(model, BATCHES, 2, ft.AdamW(0.02), loss=Distillation(teacher), out=tmp_path, progress=False)
    assert equal(values_of(teacher), before)
    assert all(p.grad is None for p in teacher.parameters())
    arrays, _ = read_tensors(tmp_path / "checkpoint.safetensors")
    saved = {name for name in arrays if name.startswith("model/")}
    assert saved == {f"model/{name}" for name in model.named_parameters()}
    assert not any(np.array_equal(a, b) for a in arrays.values() for b in before if b.std() > 0)
    assert not model.training and not teacher.training


@pytest.mark.parametrize("changes, words", [
    ({"teacher_seed": 4}, "its loss: Distillation.*fingerprint"),
    ({"temperature": 3.0}, "its loss: Distillation.*temperature=2.0.*here: .*temperature=3.0"),
])
def test_resuming_with_another_loss_is_refused(changes, words, tmp_path):
    with pytest.raises(Stop):
        distil(tmp_path, stop=6)
    with pytest.raises(ValueError, match=words):
        distil(tmp_path, **changes)
    model = make_gpt(dropout=0.1)
    ft.attach(model, ft.LoRA(r=2))
    with pytest.raises(ValueError, match="its loss: Distillation.*here: CrossEntropy"):
        ft.fit(model, BATCHES, 8, ft.AdamW(0.02), out=tmp_path, resume=True, accumulate=2, progress=False)


@pytest.mark.parametrize("loss, name", [(stop_at, "function"), (Distillation, "Distillation"), (3, "int")])
def test_fit_and_evaluate_refuse_an_object_that_is_not_a_loss(loss, name):
    with pytest.raises(TypeError, match=f"a loss wants read.*got {name}"):
        ft.fit(make_gpt(), BATCHES, 1, loss=loss, progress=False)
    with pytest.raises(TypeError, match=f"a loss wants read.*got {name}"):
        ft.evaluate(make_gpt(), BATCHES, loss=loss)


@dataclass(frozen=True, eq=False)
class PlainLoss:
    """A loss that derives from no class of the library: only `read` and `__call__`."""
    teacher: Module

    def read(self, batch: Any) -> ft.Targets:
        return read_batch(batch)

    def __call__(self, model: Module, targets: ft.Targets, rng: Any = None) -> tuple[Context, ft.Tensor]:
        return Distillation(self.teacher)(model, targets, rng)


@dataclass(frozen=True, eq=False)
class PlainHiddenStateLoss:
    """HiddenStateLoss with its optional members, but derived from no class of the library."""
    teacher: Module
    projection: Linear
    hidden_states = True
    module = HiddenStateLoss.module
    read = PlainLoss.read
    __call__ = HiddenStateLoss.__call__


class ObjectLoss:
    """The same as an ordinary object, not a dataclass: a checkpoint identifies it by its class alone."""
    hidden_states = True
    read = PlainLoss.read
    __call__ = HiddenStateLoss.__call__

    def __init__(self, teacher: Module, projection: Linear):
        self.teacher = teacher
        self.projection = self.module = projection


def test_a_loss_need_not_derive_from_a_class_of_the_library(tmp_path):
    teacher = make_gpt(3)
    results = []
    for loss in (PlainLoss(teacher), Distillation(teacher)):
        history = ft.fit(make_gpt(), BATCHES, 3, ft.AdamW(0.02), loss=loss, progress=False)
        results.append((history.losses, ft.evaluate(make_gpt(), BATCHES, loss=loss)["loss"]))
    assert results[0] == results[1]
    assert not train.batch.as_loss(PlainLoss(teacher)).hidden_states
    check_projection_resumes(tmp_path / "object", ObjectLoss)
    check_projection_resumes(tmp_path, PlainHiddenStateLoss)
    with pytest.raises(ValueError, match="its loss: PlainHiddenStateLoss.*here: CrossEntropy"):
        ft.fit(make_gpt(dropout=0.1), BATCHES, 8, ft.AdamW(0.02), out=tmp_path / "straight", resume=True,
               progress=False)


# ── auxiliary losses ─────────────────────────────────────────────────────────────────────────────────────────────────
def gradients_of_a_step(model: Module, batches: list[dict], **more: Any) -> tuple[dict[str, np.ndarray], ft.History]:
    """The change that one step of plain SGD makes to every parameter, and the history."""
    before = {name: np.array(host(p)) for name, p in model.named_parameters().items()}
    history = ft.fit(model, batches, 1, ft.SGD(1.0), clip=None, accumulate=len(batches), progress=False, **more)
    return {name: before[name] - host(p) for name, p in model.named_parameters().items()}, history


def expected_gradients(model: Module, batch: dict, with_balance: bool) -> tuple[dict[str, np.ndarray], float, float]:
    """(gradients, cross-entropy, balance loss) of one pass by hand."""
    model.zero_grad()
    ctx, loss = compute_loss(model, read_batch(batch))
    balance = ctx.losses["balance"]
    (loss + balance if with_balance else loss).backward()
    gradients = {name: np.array(host(p.grad)) for name, p in model.named_parameters().items()}
    model.zero_grad()
    return gradients, float(loss.data), float(balance.data)


def close(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.allclose(v, b[name], rtol=1e-7, atol=1e-12) for name, v in a.items())


def check_auxiliary_loss(loss: ft.Loss | None = None) -> None:
    """An auxiliary loss is added to the gradient and logged under its name."""
    batch = BATCHES[0]
    model = make_balanced_gpt().to(dtype=np.float64)
    wanted, cross_entropy, balance = expected_gradients(model, batch, with_balance=True)
    got, history = gradients_of_a_step(model, [batch], loss=loss)
    assert close(wanted, got)
    assert history.losses == [pytest.approx(cross_entropy + balance, rel=1e-9)]
    assert history.terms.keys() == {"loss", "balance"}
    assert history.terms["loss"] == [pytest.approx(cross_entropy, rel=1e-9)]
    assert history.terms["balance"] == [pytest.approx(balance, rel=1e-9)]


def test_an_auxiliary_loss_is_added_and_logged():
    check_auxiliary_loss()
    without, _, _ = expected_gradients(make_balanced_gpt().to(dtype=np.float64), BATCHES[0], with_balance=False)
    wanted, _, _ = expected_gradients(make_balanced_gpt().to(dtype=np.float64), BATCHES[0], with_balance=True)
    assert not close(wanted, without)


def check_padding() -> None:
    """Rows that are padded further have the same gradients and the same terms."""
    short = make_batch([5, 3], seed=1, T=6)                          # the last column is a label only
    padding = ((0, 0), (0, 3))
    long = {"ids": np.pad(short["ids"], padding), "mask": np.pad(short["mask"], padding)}
    gradients, history = gradients_of_a_step(make_balanced_gpt().to(dtype=np.float64), [short])
    same_gradients, same_history = gradients_of_a_step(make_balanced_gpt().to(dtype=np.float64), [long])
    assert history.terms["loss"] == pytest.approx(same_history.terms["loss"])
    assert history.terms["balance"] == pytest.approx(same_history.terms["balance"])
    for name, gradient in gradients.items():
        assert np.allclose(gradient, same_gradients[name], rtol=1e-7, atol=1e-12), name


def test_padding_changes_no_auxiliary_loss(monkeypatch):
    check_padding()
    monkeypatch.setattr(BalancedMLP, "counts_padding", True)
    with pytest.raises(AssertionError):
        check_padding()


@dataclass(frozen=True, eq=False)
class SharedContextTeacher(Distillation):
    """A wrong loss: it returns the Context of the teacher's pass."""

    def __call__(self, model: Module, targets: ft.Targets, rng: Any = None) -> tuple[Context, ft.Tensor]:
        _, loss = super().__call__(model, targets, rng)
        teacher_ctx = targets.context()
        self.teacher(targets.ids, teacher_ctx)
        return teacher_ctx, loss


def check_only_the_students_losses_count(kind: type[Distillation]) -> None:
    """The auxiliary losses of a teacher's pass count neither in the loss nor in the log."""
    teacher = make_balanced_gpt(seed=3)
    _, plain = gradients_of_a_step(make_gpt(), BATCHES[:1], loss=kind(teacher))
    assert plain.terms.keys() == {"loss"} and plain.losses == plain.terms["loss"]
    _, balanced = gradients_of_a_step(make_balanced_gpt(), BATCHES[:1], loss=kind(teacher))
    ctx = read_batch(BATCHES[0]).context()
    make_balanced_gpt()(read_batch(BATCHES[0]).ids, ctx)
    assert balanced.terms["balance"] == [pytest.approx(float(ctx.losses["balance"].data), rel=1e-5)]


def test_a_teachers_auxiliary_losses_do_not_count():
    check_only_the_students_losses_count(Distillation)
    with pytest.raises(AssertionError):
        check_only_the_students_losses_count(SharedContextTeacher)


def test_an_auxiliary_loss_named_loss_is_refused():
    class Replacing(BalancedMLP):
        def forward(self, x: ft.Tensor, ctx: Context) -> ft.Tensor:
            y = self.mlp(x, ctx)
            ctx.add_loss("loss", (y * y).mean())
            return y
    model = make_gpt()
    model.blocks[0].mlp = Replacing(model.blocks[0].mlp)
    with pytest.raises(ValueError, match="another name than 'loss'"):
        ft.fit(model, BATCHES, 1, progress=False)


# ── penalties that read hidden states ────────────────────────────────────────────────────────────────────────────────
def fit_with_penalty(**more: Any) -> ft.History:
    model = make_gpt()
    ft.attach(model, SmallStates(r=2))
    return ft.fit(model, BATCHES[:1], 2, ft.AdamW(0.02), progress=False, **more)


def test_a_penalty_reads_hidden_states_and_is_logged():
    history = fit_with_penalty()
    assert history.terms.keys() == {"loss", "penalty.smallstates"}
    model = make_gpt()
    ctx = dataclasses.replace(read_batch(BATCHES[0]), output_hidden_states=True).context()
    model(read_batch(BATCHES[0]).ids, ctx)
    wanted = sum(float((host(h)**2).mean()) for h in ctx.hidden_states[1:]) * 0.1
    assert history.terms["penalty.smallstates"][0] == pytest.approx(wanted, rel=1e-5)
    assert history.losses[0] == pytest.approx(history.terms["loss"][0] + wanted, rel=1e-5)


@wrong_answers
def test_a_pass_without_the_hidden_states_that_a_penalty_wants_is_caught(monkeypatch):
    read = train.loop.Run.read_batch

    def without_hidden_states(run: train.loop.Run) -> ft.Targets:
        return dataclasses.replace(read(run), output_hidden_states=False)
    monkeypatch.setattr(train.loop.Run, "read_batch", without_hidden_states)
    with pytest.raises(AssertionError, match="the input of the first block"):
        fit_with_penalty()


def test_hidden_states_are_kept_only_if_something_wants_them():
    seen = []

    class Plain(ft.LoRA):
        def penalty(self, edits: dict, model: Module, ctx: Context) -> float:
            seen.append(len(ctx.hidden_states))
            return 0.0
    model = make_gpt()
    ft.attach(model, Plain(r=2))
    history = ft.fit(model, BATCHES[:1], 1, progress=False)
    assert seen == [0]
    assert history.terms["penalty.plain"] == [0.0]


# ── accumulation ─────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class TokenPenalty(ft.Full):
    """A penalty per labelled position, so that micro-batches weighted by their labels give the large batch's value."""

    def penalty(self, edits: dict, model: Module, ctx: Context) -> ft.Tensor:
        return (ctx.output * ctx.output).mean() * 0.1


def check_accumulation() -> None:
    """The gradient and every term of k micro-batches are those of one large batch."""
    parts = [make_batch([8] * rows, seed=rows) for rows in (4, 1, 2)]
    results = []
    for batches in ([join(parts)], parts):
        model = make_balanced_gpt().to(dtype=np.float64)
        ft.attach(model, TokenPenalty())
        results.append(gradients_of_a_step(model, batches))
    (one, one_history), (many, many_history) = results
    assert close(one, many)
    assert one_history.terms.keys() == many_history.terms.keys() == {"loss", "penalty.tokenpenalty", "balance"}
    for name, values in one_history.terms.items():
        assert values == pytest.approx(many_history.terms[name], rel=1e-9), name
    assert one_history.losses == pytest.approx(many_history.losses, rel=1e-9)


def test_accumulated_terms_are_those_of_one_large_batch():
    check_accumulation()


@wrong_answers
def test_terms_that_are_averaged_and_not_weighted_are_caught(monkeypatch):
    def read_unweighted(batch: Any) -> ft.Targets:
        return dataclasses.replace(read_batch(batch), weight=1.0)
    monkeypatch.setattr(train.batch, "read_batch", read_unweighted)
    with pytest.raises(AssertionError):
        check_accumulation()


@wrong_answers
def test_auxiliary_losses_that_are_not_weighted_are_caught(monkeypatch):
    right = train.loop.add_gradients

    def unweighted(run: train.loop.Run, batches: list[ft.Targets], rng: Any) -> Any:
        loss, terms = right(run, batches, rng)
        for targets in batches:
            ctx, _ = run.loss(run.model, targets)
            ctx.losses["balance"].backward()
        return loss, terms
    monkeypatch.setattr(train.loop, "add_gradients", unweighted)
    with pytest.raises(AssertionError):
        check_accumulation()


def test_a_term_that_begins_late_counts_zero_before():
    history = ft.History()
    history.add_step(1.0, {"loss": 1.0})
    history.add_step(3.0, {"loss": 2.0, "late": 1.0})
    history.add_step(2.0, {"loss": 2.0})
    assert history.terms == {"loss": [1.0, 2.0, 2.0], "late": [0.0, 1.0, 0.0]}
    assert history.losses == [1.0, 3.0, 2.0]


# ── a loss with trainable parts ──────────────────────────────────────────────────────────────────────────────────────
def fit_with_projection(
    out: Path, loss: HiddenStateLoss | None = None, stop: int = 0,
) -> tuple[ft.GPT, HiddenStateLoss, ft.History]:
    model = make_gpt(dropout=0.1)
    loss = make_hidden_state_loss() if loss is None else loss
    history = ft.fit(model, BATCHES, 8, ft.AdamW(0.02), stop_at(stop), loss=loss, out=out, resume=True, save_every=2,
                     progress=False)
    return model, loss, history


def check_projection_resumes(folder: Path, kind: type = HiddenStateLoss) -> None:
    """A run whose loss has a trainable module resumes bitwise, the module as well."""
    model, loss, history = fit_with_projection(folder / "straight", make_hidden_state_loss(kind=kind))
    with pytest.raises(Stop):
        fit_with_projection(folder / "stopped", make_hidden_state_loss(kind=kind), stop=6)
    resumed, same_loss, same_history = fit_with_projection(folder / "stopped", make_hidden_state_loss(kind=kind))
    assert history == same_history
    assert equal(values_of(model, loss.projection), values_of(resumed, same_loss.projection))


def test_the_module_of_a_loss_trains_and_resumes_bitwise(tmp_path):
    check_projection_resumes(tmp_path)
    arrays, _ = read_tensors(tmp_path / "straight" / "checkpoint.safetensors")
    assert {"loss/weight", "loss/bias"} <= arrays.keys()
    _, loss, _ = fit_with_projection(tmp_path / "straight")
    assert not equal(values_of(loss.projection), values_of(make_hidden_state_loss().projection))
    assert not loss.projection.training
    assert all(p.grad is None for p in loss.projection.parameters())


def test_a_loss_module_that_was_trained_already_resumes_too(tmp_path):
    loss = make_hidden_state_loss()
    with pytest.raises(Stop):
        fit_with_projection(tmp_path / "stopped", loss=loss, stop=6)
    _, same_loss, history = fit_with_projection(tmp_path / "stopped", loss=loss)
    _, other_loss, other_history = fit_with_projection(tmp_path / "straight")
    assert history == other_history
    assert equal(values_of(same_loss.projection), values_of(other_loss.projection))


@wrong_answers
def test_a_checkpoint_that_forgets_the_loss_module_is_caught(tmp_path, monkeypatch):
    right = train.loop.Run.load_state_dict

    def forgetful(run: train.loop.Run, arrays: dict, facts: dict) -> None:
        own = {name: value for name, value in train.checkpoint.copy_values(run).items() if name.startswith("loss/")}
        right(run, arrays | own, facts)
    monkeypatch.setattr(train.loop.Run, "load_state_dict", forgetful)
    with pytest.raises(AssertionError):
        check_projection_resumes(tmp_path)


def test_the_module_of_a_loss_is_in_training_mode_while_it_trains_and_a_teacher_is_not():
    modes = []

    @dataclass(frozen=True, eq=False)
    class Watched(HiddenStateLoss):
        def __call__(self, model: Module, targets: ft.Targets, rng: Any = None) -> tuple[Context, ft.Tensor]:
            modes.append((model.training, self.projection.training, self.teacher.training))
            return super().__call__(model, targets, rng)
    right = make_hidden_state_loss()
    loss = Watched(right.teacher, right.projection)
    model = make_gpt()
    ft.fit(model, BATCHES, 1, loss=loss, progress=False)
    loss.projection.train()
    ft.evaluate(model, BATCHES, loss=loss)
    assert modes == [(True, True, False)] + [(False, False, False)] * 3
    assert loss.projection.training


def test_the_module_of_a_loss_follows_the_model_to_its_device():
    loss = make_hidden_state_loss()                                     # on the backend in use
    ft.use("strict")
    model = make_gpt()
    loss.teacher.to("strict")
    ft.fit(model, BATCHES, 2, ft.AdamW(0.02), loss=loss, progress=False)
    assert all(array.name_of(p.data) == "strict" for p in loss.projection.parameters())


def test_the_module_of_a_loss_is_not_saved_with_the_model(tmp_path):
    model, _, _ = fit_with_projection(tmp_path / "run")
    ft.save(model, tmp_path / "model")
    names = [name for file in (tmp_path / "model").glob("*.safetensors") for name in read_names(file)]
    assert names and not any("projection" in name or name.startswith("loss") for name in names)


def read_names(file: Path) -> list[str]:
    from safetensors import safe_open
    with safe_open(file, framework="numpy") as f:
        return list(f.keys())


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_evaluate_takes_a_loss_without_penalties_and_auxiliary_losses():
    model = make_balanced_gpt()
    ft.attach(model, SmallStates(r=2))
    teacher = make_gpt(3)
    got = ft.evaluate(model, BATCHES, loss=Distillation(teacher))
    weights = [read_batch(batch).weight for batch in BATCHES]
    divergences = []
    for batch in BATCHES:
        _, loss = Distillation(teacher)(model, read_batch(batch))
        divergences.append(float(loss.data))
    assert got["loss"] == pytest.approx(np.average(divergences, weights=weights), rel=1e-5)
    assert got["positions"] == pytest.approx(np.average(weights, weights=weights))
    plain = ft.evaluate(model, BATCHES)
    assert got["accuracy"] == plain["accuracy"]
    assert got["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-6)
    assert got["loss"] != pytest.approx(plain["loss"], rel=1e-2)
    assert plain["loss"] == pytest.approx(np.log(plain["perplexity"]), rel=1e-6)


def smoothed(z: np.ndarray, labels: np.ndarray, eps: float, others: bool = False) -> float:
    """Mean cross-entropy with targets (1 − ε) onehot + ε/V; others: ε spread over the V − 1 other classes."""
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    N, V = z.shape
    spread = eps / (V - 1) if others else eps / V
    target = np.full((N, V), spread)
    target[np.arange(N), labels] = 1 - eps + (0 if others else spread)
    return float(-(target * log_p).sum(axis=-1).mean())


def check_smoothing(loss_of: Callable[[float], ft.Loss], eps: float = 0.1) -> None:
    model = make_gpt().to(dtype=np.float64)
    for batch in BATCHES:
        targets = read_batch(batch)
        z = host(model(targets.ids, targets.context())).reshape(-1, VOCAB)
        for smoothing in (0.0, eps, 0.5):
            loss = loss_of(smoothing)
            _, value = loss(model, loss.read(batch))
            assert float(value.data) == pytest.approx(smoothed(z, targets.labels, smoothing), rel=1e-10)


def test_label_smoothing_spreads_over_all_classes():
    check_smoothing(ft.CrossEntropy)
    model = make_gpt()
    plain = ft.evaluate(model, BATCHES)
    got = ft.evaluate(model, BATCHES, loss=ft.CrossEntropy(0.1))
    assert got["loss"] != pytest.approx(plain["loss"], rel=1e-4)
    assert got["perplexity"] == plain["perplexity"], "of the labels themselves"
    for wrong in (-0.1, 1.0, "0.1", None):
        with pytest.raises((TypeError, ValueError), match="CrossEntropy: smoothing wants a finite number >= 0 and < 1"):
            ft.CrossEntropy(wrong)


@dataclass(frozen=True)
class SpreadOverOthers(ft.CrossEntropy):
    """The label itself gets no share of ε, as in fairseq."""

    def __call__(self, model: Module, targets: ft.Targets, rng: Any = None) -> tuple[Context, ft.Tensor]:
        ctx = targets.context(rng)
        z = host(model(targets.ids, ctx)).reshape(-1, VOCAB)
        return ctx, ft.Tensor(np.array(smoothed(z, targets.labels, self.smoothing, others=True)))


@dataclass(frozen=True)
class SmoothedNothing(ft.CrossEntropy):
    """Takes the setting and forgets it."""

    def __call__(self, model: Module, targets: ft.Targets, rng: Any = None) -> tuple[Context, ft.Tensor]:
        return ft.CrossEntropy()(model, targets, rng)


@wrong_answers
@pytest.mark.parametrize("wrong", [SpreadOverOthers, SmoothedNothing])
def test_a_wrong_smoothing_is_caught(wrong):
    with pytest.raises(AssertionError):
        check_smoothing(wrong)


@dataclass(frozen=True)
class Regression(ft.Loss):
    """The squared distance of the mean logit of a row to a number of its own. A loss without integer labels."""

    def read(self, batch: dict) -> ft.Targets:
        labels = np.asarray(batch["labels"], np.float32)
        return ft.Targets(np.asarray(batch["ids"]), {}, labels, None, weight=float(len(labels)))

    def __call__(self, model: Module, targets: ft.Targets, rng: Any = None) -> tuple[Context, ft.Tensor]:
        ctx = targets.context(rng)
        scores = model(targets.ids, ctx).mean(axis=-1).mean(axis=-1)    # (B,)
        labels = ft.array.put_like(targets.labels, scores.data)
        difference = scores - ft.Tensor(labels)
        return ctx, (difference * difference).mean()


def test_a_loss_without_integer_labels_has_no_perplexity_and_no_accuracy():
    model = make_gpt()
    batch = {"ids": BATCHES[0]["ids"], "labels": np.array([0.5, -1.0, 2.0])}
    history = ft.fit(model, [batch], 30, ft.AdamW(0.02), loss=Regression(), progress=False)
    assert history.losses[-1] < history.losses[0] / 2
    metrics = ft.evaluate(model, [batch], loss=Regression())
    assert metrics.keys() == {"loss"}
    assert metrics["loss"] < history.losses[0]


def test_evaluate_keeps_hidden_states_for_a_loss_that_wants_them():
    metrics = ft.evaluate(make_gpt(), BATCHES, loss=make_hidden_state_loss())
    assert metrics["loss"] > ft.evaluate(make_gpt(), BATCHES)["loss"]


def test_a_loss_of_16_bits_skips_and_logs_every_term():
    model = make_balanced_gpt()
    history = ft.fit(model, BATCHES, 4, ft.AdamW(0.01), autocast="float16", progress=False)
    assert len(history.losses) == len(history.terms["loss"]) == len(history.terms["balance"]) == 4
    assert np.allclose(np.add(history.terms["loss"], history.terms["balance"]), history.losses, rtol=1e-3)


def test_operations_of_a_loss_are_differentiable():
    """The gradient that reaches the model through a user's loss is that of the loss by differences."""
    model = make_gpt().to(dtype=np.float64)
    loss = Distillation(make_gpt(3).to(dtype=np.float64))
    targets = loss.read(BATCHES[0])
    _, value = loss(model, targets)
    value.backward()
    p = model.blocks[0].mlp.up.weight
    direction = np.random.default_rng(0).standard_normal(p.shape)
    exact = float((host(p.grad) * direction).sum())
    start = np.array(host(p))
    ends = []
    for sign in (1, -1):
        p.copy_(start + sign * 1e-5 * direction)
        ends.append(float(loss(model, targets)[1].data))
    assert exact == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
