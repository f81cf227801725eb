"""Quantization-aware training: the forward pass of round-to-nearest, straight-through gradients, learned steps."""
from __future__ import annotations

import contract
import numpy as np
import pytest
from contract import Row, build
from helpers import dev, host, wrong_answers

import tinyft as ft
from tinyft import array, edit
from tinyft.compress import Uniform
from tinyft.compress.grids import KINDS
from tinyft.compress.quantize import qat
from tinyft.compress.quantize.qat import FakeQuantize, LearnedStep
from tinyft.tensor import Tensor

GRIDS = [("affine", 1), ("affine", 3), ("affine", 8), ("symmetric", 1), ("symmetric", 2), ("symmetric", 4),
         ("absmax", 2), ("absmax", 8), ("ternary", 2), ("sign", 1)]
SEEDS = range(12)


def draw(seed: int) -> tuple[np.ndarray, int]:
    """W (out, in) and a group: ordinary, constant, one-sided, with zeros, with one huge weight, with ties."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((int(rng.integers(1, 7)), int(rng.integers(1, 25))))
    kind = seed % 6
    if kind == 1:
        W[rng.integers(len(W))] = 0
    elif kind == 2:
        W[:] = 0.75
    elif kind == 3:
        W = abs(W) * 3
    elif kind == 4:
        W[0, rng.integers(W.shape[1])] = 1e3
    elif kind == 5:
        W = np.rint(W * 4) / 8
    return W.astype(np.float32 if seed % 2 else np.float64), int(rng.integers(1, 10))


def value_and_gradients(e: edit.Edit, W: np.ndarray, G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weight that an edit gives, and the gradient of W from the gradient G of that weight."""
    w = Tensor(dev(W), requires_grad=True)
    y = e.tensor("weight", w)
    y.backward(dev(G, W.dtype))
    return host(y), host(w.grad)


def group_parts(width: int, group: int) -> list[slice]:
    return [slice(start, min(start + group, width)) for start in range(0, width, group)]


# ── the properties ───────────────────────────────────────────────────────────────────────────────────────────────────
def check_the_forward_pass_is_rounding_to_nearest():
    for seed in SEEDS:
        W, group = draw(seed)
        for kind, bits in GRIDS:
            for g in (group, None):
                y, _ = value_and_gradients(FakeQuantize(kind, bits, g), W, np.ones_like(W))
                wanted = host(ft.RTN(bits, g, kind)(W).dequantize())
                np.testing.assert_array_equal(y.astype(np.float32), wanted, err_msg=f"{seed} {kind} {bits}")


def check_the_gradient_passes_inside_the_grid_alone():
    outside = 0
    for seed in SEEDS:
        W, group = draw(seed)
        G = np.random.default_rng(seed + 99).standard_normal(W.shape).astype(W.dtype)
        for kind, bits in GRIDS:
            _, dw = value_and_gradients(FakeQuantize(kind, bits, group), W, G)
            if kind in ("ternary", "sign"):
                inside = abs(W) <= 1
            else:
                packed = ft.RTN(bits, group, kind)(W)
                each = np.arange(W.shape[1]) // packed.group
                s = host(packed.scale).T[:, each].astype(W.dtype)
                z = host(packed.zero).T[:, each] if kind == "affine" else packed.zero
                q = np.rint(W / s) + z
                inside = (q >= 0) & (q <= {"absmax": 2**bits - 2}.get(kind, 2**bits - 1))
            outside += (~inside).sum()
            np.testing.assert_array_equal(dw, np.where(inside, G, 0), err_msg=f"{seed} {kind} {bits}")
    assert outside > 100


def learned(W: np.ndarray, bits: int, group: int, seed: int) -> LearnedStep:
    """Steps away from their start, so that many weights lie outside."""
    e = LearnedStep(W, bits, group)
    rng = np.random.default_rng(seed)
    e.s.copy_(host(e.s) * rng.uniform(0.2, 1.5, e.s.shape))
    return e.to(dtype=W.dtype)


def check_learned_steps_round_and_have_the_gradients_of_the_paper():
    outside = 0
    for seed in SEEDS:
        W, group = draw(seed)
        W = W.astype(np.float64)
        G = np.random.default_rng(seed + 99).standard_normal(W.shape)
        for bits in (2, 3, 8):
            e = learned(W, bits, group, seed)
            s = host(e.s).copy()
            y, dw = value_and_gradients(e, W, G)
            most = 2**(bits - 1) - 1
            assert e.s.grad is not None
            for row in range(len(W)):
                for b, part in enumerate(group_parts(W.shape[1], group)):
                    step, ds = s[row, b], 0.0
                    for i in range(part.start, part.stop):
                        q = np.rint(W[row, i] / step)
                        c = min(max(q, -most - 1), most)
                        inside = q == c
                        outside += not inside
                        assert y[row, i] == step * c
                        assert np.isclose(dw[row, i], G[row, i] * inside, rtol=1e-12, atol=1e-300)
                        ds += G[row, i] * (c - W[row, i] / step * inside)
                    ds /= np.sqrt((part.stop - part.start) * most)
                    np.testing.assert_allclose(host(e.s.grad)[row, b], ds, rtol=1e-9, atol=1e-9 * abs(G).sum())
    assert outside > 100


def check_the_first_step_is_that_of_the_paper():
    for seed in SEEDS:
        W, group = draw(seed)
        for bits in (2, 4):
            s = host(LearnedStep(W, bits, group).s)
            for b, part in enumerate(group_parts(W.shape[1], group)):
                wanted = 2 * abs(W[:, part]).mean(axis=1) / np.sqrt(2**(bits - 1) - 1)
                np.testing.assert_allclose(s[:, b], np.where(wanted == 0, 1, wanted), rtol=1e-5)


def check_weights_on_the_grid_stay():
    for seed in SEEDS:
        W, group = draw(seed)
        W = W.astype(np.float64)
        e = learned(W, 4, group, seed)
        first, _ = value_and_gradients(e, W, W)
        again, _ = value_and_gradients(e, first, W)
        np.testing.assert_array_equal(first, again)
        symmetric = FakeQuantize("absmax", 8, group)
        first, _ = value_and_gradients(symmetric, W, W)
        again, _ = value_and_gradients(symmetric, first, W)
        np.testing.assert_allclose(again, first, rtol=2e-3, atol=1e-12)      # the float16 scale is rounded up again


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS)
def test_qat(check):
    check()


# ── the contract of methods ──────────────────────────────────────────────────────────────────────────────────────────
def is_block_matrix(name: str) -> bool:
    return name.startswith("blocks.") and name.endswith("weight") and "norm" not in name


def count_matrices(s: contract.Sizes) -> int:
    """The weights of all linear maps in the blocks."""
    attention = 2 * s.queries * s.C + 2 * s.keys * s.C
    return s.L * (attention + (3 if s.llama else 2) * s.C * s.F)


def count_with_steps(s: contract.Sizes) -> int:
    """The same with a step for each row of each map."""
    rows = s.queries + 2 * s.keys + s.C + s.F * (2 if s.llama else 1) + s.C
    return count_matrices(s) + s.L * rows


ROWS = {
    "qat-8": Row(ft.QAT(bits=8, group=4), "near", merges=True, count=count_matrices, base=is_block_matrix),
    "qat-3": Row(ft.QAT(bits=3), "other", merges=True, count=count_matrices, base=is_block_matrix, lr=0.05),
    "lsq-4": Row(ft.LSQ(bits=4, group=None), "other", merges=True, count=count_with_steps, base=is_block_matrix,
                 lr=0.05),
}
KINDS_OF_MODELS = ("gpt", "llama", "bert-classes")
# The derivative of a rounded weight is 0 or infinite, so differences do not give the straight-through gradient.
CONTRACT = [name for name in contract.CHECKS if name not in ("gradients", "start")]


@pytest.mark.parametrize("name", CONTRACT)
@pytest.mark.parametrize("row", ROWS)
def test_the_contract_of_methods(row, name):
    kinds = KINDS_OF_MODELS if name in ("moves", "count", "merge") else KINDS_OF_MODELS[:1]
    for kind in kinds:
        contract.CHECKS[name](ROWS[row], kind)


@pytest.mark.parametrize("row", ROWS)
def test_the_start_of_the_contract(row):
    if row == "qat-8":
        base = contract.run(build("gpt"))
        away = abs(contract.run(contract.put_on(ROWS[row], "gpt")[0]) - base).max()
        assert 0 < away < 0.05 * abs(base).max()
    else:
        contract.check_start(ROWS[row], "gpt")


# ── training and packing ─────────────────────────────────────────────────────────────────────────────────────────────
def sequences(seed: int, count: int = 4) -> list:
    """Tokens that follow a rule: each is 3 times the one before, plus 1, modulo 29."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 29, (8, 1))]
    for _ in range(11):
        ids.append((ids[-1] * 3 + 1) % 29)
    return [np.roll(np.concatenate(ids, axis=1), shift, axis=0) for shift in range(count)]


def trained_base(steps: int = 150) -> ft.GPT:
    model = ft.GPT(ft.GPTConfig(vocab=29, positions=16, width=16, layers=1, heads=2), seed=1)
    ft.fit(model, sequences(0), steps=steps, optimizer=ft.AdamW(lr=0.01), progress=False)
    return model


def loss_of(model: ft.GPT) -> float:
    return ft.evaluate(model.eval(), sequences(0))["loss"]


def test_training_through_the_grid_beats_rounding_afterwards():
    """The same number of further steps: without the grid and rounded afterwards, or through the grid.

    One bit, and the two bits of a symmetric grid whose steps LSQ learns."""
    base = trained_base()
    start = base.state_dict()
    pairs = [(ft.QAT(bits=1, group=None, grid="sign"), ft.RTN(bits=1, group=None, grid="sign"), 0.1),
             (ft.LSQ(bits=2, group=None), ft.RTN(bits=2, group=None, grid="symmetric"), 0.75)]
    for method, rule, part in pairs:
        losses = []
        for trained_with in (method, ft.Full()):
            model = ft.GPT(base.config, seed=1)
            model.load_state_dict(start)
            ft.attach(model, trained_with)
            ft.fit(model, sequences(0), steps=60, optimizer=ft.AdamW(lr=0.01), progress=False)
            if trained_with is method:
                ft.pack(model)
            else:
                ft.merge(model)
                ft.compress(model, rule)
            assert isinstance(model.blocks[0].attn.q.weight, Uniform)
            losses.append(loss_of(model))
        assert losses[0] < part * losses[1], (method, losses)


@pytest.mark.parametrize("method", [ft.QAT(bits=3, group=5), ft.QAT(bits=4, group=None, grid="symmetric"),
                                    ft.QAT(bits=2, grid="ternary"), ft.QAT(bits=1, grid="sign"),
                                    ft.LSQ(bits=3, group=5), ft.LSQ(bits=2, group=None)], ids=str)
def test_packed_weights_are_those_of_training(method):
    model = ft.GPT(ft.GPTConfig(vocab=29, positions=16, width=16, layers=1, heads=2), seed=1)
    a = ft.attach(model, method)
    ft.fit(model, sequences(0), steps=5, optimizer=ft.AdamW(lr=0.05), progress=False)
    model.eval()
    ids = sequences(1)[0]
    before = host(model(ids))
    maps = {path: m for path, m in edit.base_modules(model).items() if path in a.edits}
    rounded = {path: host(m.read("weight")) for path, m in maps.items()}
    latent = {path: host(m.weight).copy() for path, m in maps.items()}
    assert ft.pack(model) is model
    assert not edit.attached(model) and len(maps) == 6
    for path, m in maps.items():
        np.testing.assert_array_equal(host(m.weight.dequantize()), rounded[path])
    np.testing.assert_allclose(host(model(ids)), before, atol=1e-5)
    if isinstance(method, ft.QAT):
        other = ft.GPT(model.config, seed=1)
        for path, m in edit.base_modules(other).items():
            if path in latent:
                m.weight.copy_(latent[path])
        ft.compress(other, ft.RTN(method.bits, method.group, method.grid))
        np.testing.assert_array_equal(host(other(ids)), host(model(ids)))


def test_pack_merges_what_trains_the_same_weights_and_nothing_else():
    """Full trains them too, and is merged. BitFit trains biases, and stays."""
    for method, left in ((ft.BitFit(), ["bitfit"]), (ft.Full(), [])):
        model = ft.GPT(ft.GPTConfig(vocab=29, positions=16, width=16, layers=1, heads=2), seed=1)
        ft.attach(model, method)
        ft.attach(model, ft.QAT(bits=3, group=4))
        ft.pack(model, "qat")
        assert [a.name for a in edit.attached(model)] == left


def test_with_many_bits_training_is_that_without_a_grid():
    weights = []
    for method in (ft.QAT(bits=8, group=2), None):
        model = ft.GPT(ft.GPTConfig(vocab=29, positions=16, width=16, layers=1, heads=2), seed=1)
        names = ft.QAT().trains(model)
        if method is not None:
            ft.attach(model, method)
        else:
            for name, p in model.named_parameters().items():
                p.requires_grad = name in names
        ft.fit(model, sequences(0), steps=20, optimizer=ft.SGD(lr=0.5), progress=False)
        parameters = model.named_parameters()
        weights.append(np.concatenate([host(parameters[name]).ravel() for name in sorted(names)]))
    moved = np.linalg.norm(weights[1] - trained_start())
    assert np.linalg.norm(weights[0] - weights[1]) < 0.02 * moved


def trained_start() -> np.ndarray:
    model = ft.GPT(ft.GPTConfig(vocab=29, positions=16, width=16, layers=1, heads=2), seed=1)
    parameters = model.named_parameters()
    return np.concatenate([host(parameters[name]).ravel() for name in sorted(ft.QAT().trains(model))])


def test_a_step_that_crosses_zero_counts_by_its_size():
    W = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    e = LearnedStep(W, 3, 4)
    y, _ = value_and_gradients(e, W, W)
    e.s.copy_(-host(e.s))
    again, _ = value_and_gradients(e, W, W)
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(host(e.pack(W).dequantize()), y)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_rounded_weight_has_the_dtype_of_the_weight(dtype, rng):
    """The grid is fitted in float32 or float64; the product of the weight with 16-bit inputs stays in 16 bits."""
    w = Tensor(dev(rng.standard_normal((3, 8)), np.dtype(dtype) if dtype != "bfloat16" else array.bfloat16))
    for e in (FakeQuantize("affine", 4, 4), FakeQuantize("sign", 1, None)):
        assert e.tensor("weight", w).dtype == w.dtype


def test_other_tensors_pass_and_packed_weights_are_refused():
    bias = Tensor(dev(np.ones(3)))
    for e in (FakeQuantize("affine", 4, None), LearnedStep(np.ones((3, 4)), 4, None)):
        assert e.tensor("bias", bias) is bias
    model = build("gpt")
    ft.compress(model, ft.RTN(4))
    with pytest.raises(ValueError, match="packed already"):
        ft.attach(model, ft.QAT())
    with pytest.raises(TypeError, match="QAT or LSQ"):
        attached = build("gpt")
        ft.attach(attached, ft.LoRA())
        ft.pack(attached)
    with pytest.raises(LookupError, match="no method"):
        ft.pack(build("gpt"))


@pytest.mark.parametrize("make, message", [
    (lambda: ft.QAT(bits=0), "bits"), (lambda: ft.QAT(grid="ternary", bits=3), "2 bits"),
    (lambda: ft.QAT(group=0), "group"), (lambda: ft.QAT(targets=3), "targets"), (lambda: ft.LSQ(bits=1), "bits"),
    (lambda: ft.LSQ(group=0.5), "group"), (lambda: ft.LSQ(targets=[]), "targets"),
])
def test_settings_without_sense_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_the_grids_of_the_tests_are_all_kinds():
    assert {kind for kind, _ in GRIDS} == set(KINDS)


# ── wrong answers ────────────────────────────────────────────────────────────────────────────────────────────────────
right_round, right_through, right_grid = qat.round_weights, qat.straight_through, qat.weight_grid
right_steps = LearnedStep.steps


def clipping_ignored(W, grid, kind):
    """w + (ŵ − w): the gradient passes everywhere."""
    rounded, inside = right_round(W, grid, kind)
    return rounded, inside | True


def inside_by_the_clipped_code(W, grid, kind):
    """The code is asked after it was clipped: it always is inside."""
    rounded, _ = right_round(W, grid, kind)
    codes = rounded / grid.scale + grid.zero
    return rounded, (codes >= -0.5) & (codes <= grid.top + 0.5)


def no_gradient(x, value, factor):
    """rint has the derivative 0."""
    return Tensor(value) + (x * 0)


def factor_ignored(x, value, factor):
    return Tensor(value) + (x - x.detach())


def zero_point_after_rounding(W, grid, kind):
    """rint(w/s + z) in place of rint(w/s) + z, and half a step of it."""
    rounded, inside = right_round(W + grid.scale / 2, grid, kind)
    return rounded, inside


def grid_of_the_row(W, kind, bits, group):
    return right_grid(W, kind, bits, None)


def steps_without_a_factor(self, p):
    """The gradient of s is not divided by √(n Q)."""
    return self.s[:, dev(np.arange(p.shape[1]) // self.group)]


def steps_divided_by_n(self, p):
    size = self.s
    factor = dev(1 / (self._sizes * self.most), size.dtype)
    return right_through(size, size.data, factor)[:, dev(np.arange(p.shape[1]) // self.group)]


def steps_without_a_gradient(self, p):
    return right_steps(self, p).detach()


def whole_row_counts(self, p):
    """n is the width of the row, not the size of the group."""
    size = self.s
    factor = 1 / np.sqrt(p.shape[1] * self.most)
    return right_through(size, size.data, factor)[:, dev(np.arange(p.shape[1]) // self.group)]


WRONG = [
    ("round_weights", clipping_ignored), ("round_weights", inside_by_the_clipped_code),
    ("straight_through", no_gradient), ("straight_through", factor_ignored),
    ("round_weights", zero_point_after_rounding), ("weight_grid", grid_of_the_row),
    ("LearnedStep.steps", steps_without_a_factor), ("LearnedStep.steps", steps_divided_by_n),
    ("LearnedStep.steps", steps_without_a_gradient), ("LearnedStep.steps", whole_row_counts),
]


@wrong_answers
@pytest.mark.parametrize("target, f", WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_answer_is_rejected(target, f, monkeypatch):
    owner, _, name = target.rpartition(".")
    monkeypatch.setattr(getattr(qat, owner) if owner else qat, name, f)
    for check in CHECKS:
        try:
            with np.errstate(all="ignore"):
                check()
        except AssertionError:
            return
    pytest.fail(f"nothing rejects {f.__name__}")
