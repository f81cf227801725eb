"""SmoothQuant: the function of the model stays, the scales are the paper's, every reader of a norm takes part."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import host, wrong_answers

import tinyft as ft
from tinyft import edit
from tinyft.compress.quantize import smoothquant

ALPHAS = (0.0, 0.3, 0.5, 1.0)


def gpt(seed: int = 1, **more: Any) -> ft.GPT:
    return ft.GPT(ft.GPTConfig(vocab=30, positions=16, width=16, layers=2, heads=2, **more), seed=seed)


def llama(seed: int = 1) -> ft.Llama:
    sizes = {"vocab": 30, "positions": 16, "width": 16, "layers": 2, "hidden": 24}
    return ft.Llama(ft.LlamaConfig(**sizes, heads=4, key_value_heads=2, qkv_bias=True), seed=seed)


def prepared(model: Any) -> Any:
    """The model in float64, its norms with a few large channels, and no zero anywhere."""
    rng = np.random.default_rng(7)
    for p in model.parameters():
        p.copy_(host(p) + 0.1 * rng.standard_normal(p.shape))
    for path, norm in edit.base_modules(model).items():
        if "norm" in path:
            gamma = host(norm.weight).copy()
            gamma[[3, 11]] *= 30
            norm.weight.copy_(gamma)
    return model.to(dtype=np.float64).eval()


MODELS = {"gpt": lambda: prepared(gpt()), "llama": lambda: prepared(llama())}
READERS = {
    "gpt": {"norm1": ["attn.q", "attn.k", "attn.v"], "norm2": ["mlp.up"]},
    "llama": {"norm1": ["attn.q", "attn.k", "attn.v"], "norm2": ["mlp.gate", "mlp.up"]},
}


def batches(count: int = 3) -> list:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 30, (4, 12)) for _ in range(count)]


def outputs(model: Any) -> np.ndarray:
    with ft.no_grad():
        return np.stack([host(model(ids)) for ids in batches(2)])


def norm_outputs(model: Any, data: list) -> dict[str, np.ndarray]:
    """{path of a norm: its outputs (tokens, C)}, from norms whose forward is replaced."""
    found: dict[str, list] = {}

    def keeping(path, forward):
        def keep(x, ctx):
            y = forward(x, ctx)
            found.setdefault(path, []).append(host(y).reshape(-1, y.shape[-1]))
            return y
        return keep
    modules = edit.base_modules(model)
    norms = {path: modules[path] for path in edit.sublayers(model).values()}
    for path, norm in norms.items():
        norm.forward = keeping(path, norm.forward)
    with ft.no_grad():
        for ids in data:
            model(ids[:, :-1])                               # the last token predicts nothing
    for norm in norms.values():
        del norm.forward                                     # the class's own again
    return {path: np.concatenate(rows) for path, rows in found.items()}


def joined_columns(model: Any, block: str, names: list[str]) -> np.ndarray:
    """max |W[o, j]| over the rows of several maps."""
    modules = edit.base_modules(model)
    weights = [host(modules[f"{block}.{name}"].weight) for name in names]
    return abs(np.concatenate(weights)).max(axis=0)


# ── the properties ───────────────────────────────────────────────────────────────────────────────────────────────────
def check_the_function_stays(kind: str):
    for alpha in ALPHAS:
        model = MODELS[kind]()
        before = outputs(model)
        ft.smooth(model, batches(), alpha)
        np.testing.assert_allclose(outputs(model), before, rtol=1e-9, atol=1e-9 * abs(before).max())


def check_the_scales_are_those_of_the_paper(kind: str):
    model = MODELS[kind]()
    data = batches()
    seen = {path: abs(rows).max(axis=0) for path, rows in norm_outputs(model, data).items()}
    weights = {f"blocks.{i}.{norm}": joined_columns(model, f"blocks.{i}", names)
               for i in range(2) for norm, names in READERS[kind].items()}
    for alpha in ALPHAS:
        s = ft.smooth(MODELS[kind](), data, alpha)
        assert s.keys() == seen.keys() == weights.keys()
        for path in s:
            np.testing.assert_allclose(s[path], seen[path]**alpha / weights[path]**(1 - alpha), rtol=1e-12)


def check_alpha_0_makes_the_columns_of_weights_1(kind: str):
    model = MODELS[kind]()
    ft.smooth(model, batches(), 0)
    for i in range(2):
        for names in READERS[kind].values():
            np.testing.assert_allclose(joined_columns(model, f"blocks.{i}", names), 1, rtol=1e-12)


def check_alpha_1_makes_the_inputs_1(kind: str):
    model = MODELS[kind]()
    ft.smooth(model, batches(), 1)
    for rows in norm_outputs(model, batches()).values():
        np.testing.assert_allclose(abs(rows).max(axis=0), 1, rtol=1e-9)


def check_other_weights_stay(kind: str):
    model, other = MODELS[kind](), MODELS[kind]()
    ft.smooth(model, batches())
    touched = {f"blocks.{i}.{name}.weight" for i in range(2) for names in READERS[kind].values() for name in names}
    touched |= {f"blocks.{i}.{norm}.{leaf}" for i in range(2) for norm in READERS[kind] for leaf in ("weight", "bias")}
    before = other.named_parameters()
    for name, p in model.named_parameters().items():
        assert np.array_equal(host(p), host(before[name])) != (name in touched), name


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("check", CHECKS)
def test_smooth(check, kind):
    check(kind)


# ── single facts ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_scales_of_1_change_nothing(monkeypatch):
    monkeypatch.setattr(smoothquant, "smoothing_scales", lambda largest, columns, alpha: np.ones_like(columns))
    model = MODELS["gpt"]()
    before = {name: host(p).copy() for name, p in model.named_parameters().items()}
    ft.smooth(model, batches())
    for name, p in model.named_parameters().items():
        np.testing.assert_array_equal(host(p), before[name])


def test_a_channel_that_is_always_zero_stays():
    model = MODELS["gpt"]()
    norm, q = model.blocks[0].norm1, model.blocks[0].attn.q
    for p in (norm.weight, norm.bias):
        values = host(p).copy()
        values[5] = 0                                        # the input 5 is always 0
        p.copy_(values)
    for name in "qkv":
        weight = getattr(model.blocks[0].attn, name).weight
        values = host(weight).copy()
        values[:, 6] = 0                                     # the input 6 is never used
        weight.copy_(values)
    column = host(q.weight)[:, 5].copy()
    before = outputs(model)
    s = ft.smooth(model, batches())["blocks.0.norm1"]
    assert s[5] == s[6] == 1
    np.testing.assert_array_equal(host(q.weight)[:, 5], column)
    np.testing.assert_allclose(outputs(model), before, rtol=1e-9, atol=1e-9)


def test_padding_does_not_count():
    data = batches()
    longer = [{"ids": np.concatenate([ids[:, :-1], np.full((4, 4), 17)], axis=1),
               "mask": np.tile(np.arange(15) < 11, (4, 1))} for ids in data]
    one, other = (ft.smooth(MODELS["gpt"](), d) for d in (data, longer))
    for path in one:
        np.testing.assert_allclose(one[path], other[path], rtol=1e-9)


def test_int8_of_a_smooth_model_is_better():
    """Channels of 30 times the size: the error of W8A8 falls to less than half."""
    ratios = []
    for seed in range(4):
        errors = []
        for is_smooth in (False, True):
            model = prepared(gpt(seed))
            wanted = outputs(model)
            if is_smooth:
                ft.smooth(model, batches())
            ft.compress(model, ft.Int8())
            errors.append(np.linalg.norm(outputs(model) - wanted))
        ratios.append(errors[1] / errors[0])
    assert np.median(ratios) < 0.5, ratios


def test_a_post_norm_model_is_refused():
    model = ft.BERT(ft.BERTConfig(vocab=30, positions=16, width=8, layers=1, heads=2, token_types=2), seed=1)
    before = {name: host(p).copy() for name, p in model.named_parameters().items()}
    ids = np.ones((2, 6), int)
    with pytest.raises(ValueError, match=r"pre-norm.*blocks\.0\.attn reads blocks\.0\.norm1"):
        ft.smooth(model, [{"ids": ids, "labels": ids}])
    for name, p in model.named_parameters().items():
        np.testing.assert_array_equal(host(p), before[name])


def packed_model() -> ft.GPT:
    model = gpt()
    ft.compress(model, ft.Int8())
    return model


def attached_model() -> ft.GPT:
    model = gpt()
    ft.attach(model, ft.LoRA(r=2))
    return model


def broken_model() -> ft.GPT:
    model = gpt()
    model.blocks[1].norm2.weight.copy_(np.full(16, np.nan))
    return model


@pytest.mark.parametrize("make, arguments, message", [
    (packed_model, {}, "smooth first"),
    (attached_model, {}, "attached"),
    (broken_model, {}, "finite"),
    (gpt, {"batches": []}, "calibration batches"),
    (gpt, {"batches": [{"ids": np.ones((1, 5), int), "mask": np.zeros((1, 5), bool)}]}, "nothing to predict"),
    (gpt, {"alpha": 1.5}, "alpha"),
])
def test_what_cannot_be_smoothed_is_refused_and_nothing_changes(make, arguments, message):
    model = make()
    before = {name: host(p).copy() for name, p in model.named_parameters().items()}
    with pytest.raises((TypeError, ValueError), match=message), np.errstate(all="ignore"):
        ft.smooth(model, **{"batches": batches(), **arguments})
    for name, p in model.named_parameters().items():
        np.testing.assert_array_equal(host(p), before[name])


# ── wrong answers ────────────────────────────────────────────────────────────────────────────────────────────────────
right_scales, right_readers = smoothquant.smoothing_scales, smoothquant._readers
right_largest, right_fold = smoothquant._largest_inputs, smoothquant._fold


def alpha_upside_down(largest, columns, alpha):
    return right_scales(largest, columns, 1 - alpha)


def scales_upside_down(largest, columns, alpha):
    return 1 / right_scales(largest, columns, alpha)


def without_the_weights(largest, columns, alpha):
    return largest**alpha


def only_the_first_reader(model, norms, targets):
    """q is multiplied by s, k and v are not; or `gate` and not `up`."""
    return {path: maps[:1] for path, maps in right_readers(model, norms, targets).items()}


def the_wrong_readers(model, norms, targets):
    """s goes into the maps of the other sublayer."""
    found = right_readers(model, norms, targets)
    return dict(zip(found, [*list(found.values())[1:], *list(found.values())[:1]]))


def largest_of_the_last_batch(model, norms, passes):
    return right_largest(model, norms, passes[-1:])


def largest_without_sign(model, norms, passes):
    """max x_j in place of max |x_j|."""
    found = {path: np.full(norm.out_features, -np.inf) for path, norm in norms.items()}

    def see(path, y, ctx):
        found[path] = np.maximum(found[path], host(y).reshape(-1, y.shape[-1]).max(axis=0))
    with smoothquant.recording(norms, see, recorder=smoothquant.OutputRecorder):
        for targets in passes:
            smoothquant.run_pass(model, targets)
    return {path: abs(x) for path, x in found.items()}


def beta_stays(norm, maps, s):
    bias = norm.own().get("bias")
    before = None if bias is None else host(bias).copy()
    right_fold(norm, maps, s)
    if bias is not None:
        bias.copy_(before)


def gamma_multiplied(norm, maps, s):
    right_fold(norm, maps, s)
    norm.weight.copy_(host(norm.weight) * s * s)


def rows_in_place_of_columns(norm, maps, s):
    """s goes into the outputs of the maps."""
    right_fold(norm, [], s)
    for linear in maps:
        w = host(linear.weight)
        linear.weight.copy_(w * np.resize(s, len(w))[:, None])


@wrong_answers
@pytest.mark.parametrize("name, f", [
    ("_fold", beta_stays), ("_fold", gamma_multiplied), ("_fold", rows_in_place_of_columns),
    ("smoothing_scales", alpha_upside_down), ("smoothing_scales", scales_upside_down),
    ("smoothing_scales", without_the_weights), ("_readers", only_the_first_reader), ("_readers", the_wrong_readers),
    ("_largest_inputs", largest_of_the_last_batch), ("_largest_inputs", largest_without_sign),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_answer_is_rejected(name, f, monkeypatch):
    monkeypatch.setattr(smoothquant, name, f)
    for kind in MODELS:
        for check in CHECKS:
            try:
                check(kind)
            except AssertionError:
                return
    pytest.fail(f"nothing rejects {f.__name__}")
