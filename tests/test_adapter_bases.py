"""Adapter files and the base they belong to: its dtype may be another, its weights not; a missing head is named."""
from __future__ import annotations

import numpy as np
import pytest
from contract import all_same, build, noise, run, same, tokens, values
from helpers import host

import tinyft as ft
from tinyft import BitFit, LoRA, PromptTuning, attach
from tinyft.adapters.files import check_base, identify_base
from tinyft.identity import describe

# ── one base in several dtypes ───────────────────────────────────────────────────────────────────────────────────────
DTYPES = ("float64", "float32", "bfloat16", "float16")


@pytest.mark.parametrize("method", [LoRA(r=2), BitFit(), PromptTuning(p=2)], ids=str)
@pytest.mark.parametrize("loaded", DTYPES)
@pytest.mark.parametrize("saved", DTYPES)
def test_an_adapter_loads_on_its_base_in_any_dtype(saved, loaded, method, tmp_path):
    """A base of 32 bits and the same base loaded in 16 bits are one base; the outputs agree as far as 16 bits go."""
    one, other = build("gpt").to(dtype=saved), build("gpt").to(dtype=loaded)
    attach(one, method)
    noise(one)
    ft.save_adapter(one, tmp_path)
    ft.load_adapter(other, tmp_path)
    tolerance = 1e-12 if saved == loaded else 1e-4 if {saved, loaded} == {"float32", "float64"} else 0.2
    ids = tokens()
    difference = host(one(ids)).astype(np.float64) - host(other(ids)).astype(np.float64)
    assert np.abs(difference).max() < tolerance


@pytest.mark.parametrize("loaded", DTYPES)
@pytest.mark.parametrize("saved", DTYPES)
def test_other_weights_are_refused_in_every_dtype(saved, loaded, tmp_path):
    """A twentieth more in one entry is another base, where the two dtypes can be compared."""
    one, other = build("gpt").to(dtype=saved), build("gpt")
    attach(one, LoRA(r=2))
    ft.save_adapter(one, tmp_path)
    weight = host(other.blocks[0].attn.q.weight).copy()
    weight[0, 0] *= 1.05
    other.blocks[0].attn.q.weight.copy_(weight)
    other.to(dtype=loaded)
    if {saved, loaded} == {"float16", "bfloat16"}:       # each rounds away what the other keeps
        ft.load_adapter(other, tmp_path)
        return
    before = values(other)
    with pytest.raises(ValueError, match="a base with other weights"):
        ft.load_adapter(other, tmp_path)
    assert all_same(values(other), before)


def test_a_file_without_digests_of_rounded_weights_still_loads_on_its_own_base(tmp_path):
    """Files written before the library compared dtypes."""
    model = build("gpt")
    attach(model, LoRA(r=2))
    ft.save_adapter(model, tmp_path)
    facts = identify_base(model)
    for new in ("dtype", "rounded"):
        del facts[new]
    check_base(facts, identify_base(build("gpt")))
    with pytest.raises(ValueError, match="other weights"):
        check_base(facts, identify_base(build("gpt").to(dtype="bfloat16")))


# ── the head of a classifier ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_an_adapter_of_a_classifier_names_the_call_that_a_bare_base_lacks(kind, tmp_path):
    model = ft.classifier(build(kind), 5)
    attach(model, LoRA(r=2))
    noise(model)
    ft.save_adapter(model, tmp_path)
    bare = build(kind)
    before = values(bare)
    with pytest.raises(ValueError, match=r"a new head of 5 classes.*call tinyft.classifier\(model, 5\) first"):
        ft.load_adapter(bare, tmp_path)
    assert all_same(values(bare), before)
    ft.load_adapter(ft.classifier(bare, 5, seed=9), tmp_path)
    assert same(run(bare.eval()), run(model.eval()))
    with pytest.raises(ValueError, match="whose new head has shapes"):
        ft.load_adapter(ft.classifier(build(kind), 4), tmp_path)


# ── fields and seeds from NumPy ──────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("method", [
    LoRA(r=np.int64(2), alpha=np.float32(3)), LoRA(r=2, targets={"attn.q", "attn.v"}), LoRA(r=2, targets=["attn.q"]),
], ids=["NumPy", "set", "list"])
def test_fields_and_seeds_that_are_numpy_numbers_or_sets_are_saved_as_values(method, tmp_path):
    model = build("gpt")
    attach(model, method, seed=np.int64(7))
    noise(model)
    assert run(model).dtype == np.float32
    ft.save_adapter(model, tmp_path)
    again = build("gpt")
    a = ft.load_adapter(again, tmp_path)
    assert same(run(again), run(model)) and a.seed == 7 and type(a.seed) is int
    assert describe(a.method) == describe(method)
