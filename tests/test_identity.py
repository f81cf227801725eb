"""The identity of methods and losses: equal for equal content, different for any other, and unchanged by reading."""
from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from contract import build
from helpers import dev, host, wrong_answers

from tinyft import GNMTPenalty, LoRA, PrefixTuning
from tinyft.data import Batches
from tinyft.identity import (
    complete,
    default_fields,
    describe,
    describe_changed,
    earlier_fingerprints,
    fingerprint,
    qualified_name,
    rows_as_arrays,
)
from tinyft.tensor import Tensor


@dataclass(frozen=True)
class Keep:
    """A retention method or a distillation loss: plain fields, and fields that hold data or a model."""

    old: Any = None
    beta: float = 1.0
    inner: Any = None
    ranks: dict[str, int] = field(default_factory=dict)


def stream(n: int = 7, seed: int = 3, scale: int = 1) -> Batches:
    return Batches(list(np.arange(n * 4).reshape(n, 4) * scale), 2, seed=seed)


def test_a_method_is_described_by_its_class_and_its_fields():
    facts = describe(LoRA(r=3, targets=("attn.q", "embed")))
    assert facts["class"] == "tinyft.methods.reparameterized.lora.LoRA"
    assert facts["fields"] == {"r": 3, "alpha": 16.0, "dropout": 0.0, "targets": ["attn.q", "embed"]}
    assert describe(PrefixTuning())["fields"]["mlp"] is None


def test_a_description_survives_json():
    for obj in (LoRA(), Keep(old=[np.ones(2)], inner=Keep(beta=2.0), ranks={"blocks.0.attn.q": 4})):
        assert json.loads(json.dumps(describe(obj))) == describe(obj)


def test_a_nested_dataclass_is_described_in_the_same_way():
    inner = describe(Keep(inner=Keep(beta=2.0)))["fields"]["inner"]
    assert inner["class"] == qualified_name(Keep) and inner["fields"]["beta"] == 2.0


def test_an_object_that_is_no_dataclass_is_identified_by_its_class_alone():
    class Plain:
        def __init__(self):
            self.t = 0
    plain = Plain()
    before = describe(plain)
    plain.t = 5                                          # a counter that training moves
    assert describe(plain) == before == {"class": qualified_name(Plain), "fields": {}}


@pytest.mark.parametrize("make", [
    lambda: np.arange(6.0).reshape(2, 3),
    lambda: Tensor(dev(np.arange(6.0))),
    lambda: [{"ids": np.arange(4).reshape(1, 4), "mask": np.ones((1, 4), bool)}],
    lambda: build("gpt"),
    lambda: stream(),
    lambda: functools.partial(np.add, 3),
    lambda: list(range(1000)),
], ids=["array", "tensor", "batches in a list", "model", "Batches", "partial", "long list"])
def test_content_is_described_by_a_fingerprint_that_equal_content_shares(make):
    one = describe(Keep(old=make()))["fields"]["old"]
    other = describe(Keep(old=make()))["fields"]["old"]
    assert set(one) == {"fingerprint"} and one == other


def moved_weight() -> Any:
    model = build("gpt")
    weight = host(model.blocks[1].mlp.up.weight).copy()
    weight[0, 0] = np.nextafter(weight[0, 0], 9, dtype=np.float32)
    model.blocks[1].mlp.up.weight.copy_(weight)
    return model


def test_any_other_content_has_another_fingerprint():
    a = np.arange(6.0).reshape(2, 3)
    different = [
        a, a.reshape(3, 2), a.astype(np.float32), a + 1e-12, a.tolist() * 60, [a], {"a": a}, {"b": a},
        build("gpt"), moved_weight(), build("bert"),
        stream(), stream(n=8), stream(seed=4), stream(scale=2), list(stream().examples),
    ]
    prints = [fingerprint(v) for v in different]
    assert len(set(prints)) == len(prints)


def test_reading_data_does_not_change_its_identity():
    data = stream()
    before = fingerprint(data)
    for _ in range(9):                                   # past the end of an epoch
        next(data)
    assert fingerprint(data) == before


def test_the_values_that_a_function_closes_over_count():
    def scaled(factor: float) -> Any:
        return lambda x: x * factor
    assert fingerprint(scaled(2.0)) == fingerprint(scaled(2.0)) != fingerprint(scaled(3.0))


def test_a_structure_that_contains_itself_has_a_fingerprint():
    loop: list = [1, 2]
    loop.append(loop)
    assert fingerprint(loop) == fingerprint(loop)


def test_an_iterator_that_is_used_up_has_no_content_to_identify():
    with pytest.raises(TypeError, match="cannot be identified by its content"):
        describe(Keep(old=iter([np.ones(2)])))


def test_a_class_that_was_run_as_a_script_has_the_name_of_its_file(monkeypatch):
    cls = type("Mine", (), {"__module__": "__main__"})
    main = ModuleType("__main__")
    main.__file__ = "/somewhere/train.py"
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert qualified_name(cls) == "train.Mine"
    main.__spec__ = ModuleSpec("package.module", None)
    assert qualified_name(cls) == "package.module.Mine"


@dataclass(frozen=True)
class Outer:
    """A method with a required field, and with other dataclasses in its fields."""

    r: int
    keep: Keep = Keep()
    several: tuple = ()
    named: dict[str, Any] = field(default_factory=dict)


def drop_fields(facts: Any, rng: np.random.Generator) -> Any:
    """The description without some of the fields that have their default value, at any depth."""
    if isinstance(facts, list):
        return [drop_fields(one, rng) for one in facts]
    if not isinstance(facts, dict):
        return facts
    kept = {}
    for name, value in facts.items():
        is_default = (name, value) in [("old", None), ("beta", 1.0), ("inner", None), ("ranks", {}), ("several", []),
                                       ("named", {}), ("keep", describe(Keep()))]
        if not is_default or rng.random() < 0.5:
            kept[name] = drop_fields(value, rng)
    return kept


def check_complete() -> None:
    """Fields with their default value may be missing in a description; a field with another value is told apart."""
    rng = np.random.default_rng(0)
    cases = [Outer(2), Outer(2, Keep(beta=3.0)), Outer(2, Keep(inner=Keep(ranks={"x": 1}))),
             Outer(2, several=(Keep(), 3)), Outer(2, named={"a": Keep(beta=2.0), "b": [Keep()]}),
             Outer(3, Keep(old=np.ones(2))), Keep(), Keep(beta=0.0)]
    for obj in cases:
        facts = describe(obj)
        for _ in range(20):
            shorter = json.loads(json.dumps(drop_fields(facts, rng)))
            assert complete(shorter, obj) == facts
            for other in cases:
                assert other is obj or complete(shorter, other) != describe(other)


def test_a_description_is_completed_by_the_defaults_of_its_class():
    check_complete()
    assert complete(describe(Keep()), LoRA()) == describe(Keep()), "another class"
    for junk in (None, 3, "x", [], [1], {}, {"class": 3}, {"class": qualified_name(Keep), "fields": [1]}):
        assert complete(junk, Keep()) == junk


def from_the_object(description: Any, obj: Any) -> Any:
    """A missing field has the value that the object has today."""
    if isinstance(description, dict) and description.get("class") == qualified_name(type(obj)):
        return {**description, "fields": describe(obj)["fields"] | description["fields"]}
    return description


def top_level_alone(description: Any, obj: Any) -> Any:
    """Only the fields of the outermost object can be missing."""
    if isinstance(description, dict) and description.get("class") == qualified_name(type(obj)):
        return {**description, "fields": default_fields(type(obj)) | description["fields"]}
    return description


@wrong_answers
@pytest.mark.parametrize("wrong", [from_the_object, top_level_alone, lambda description, obj: description])
def test_a_wrong_completion_is_caught(wrong, monkeypatch):
    monkeypatch.setitem(globals(), "complete", wrong)
    with pytest.raises(AssertionError):
        check_complete()


def test_what_is_hashed_leaves_out_the_fields_with_their_default_value():
    assert describe_changed(Keep())["fields"] == {}
    assert describe_changed(Keep(beta=2.0, ranks={"x": 1}))["fields"] == {"beta": 2.0, "ranks": {"x": 1}}


# ── planted mistakes ─────────────────────────────────────────────────────────────────────────────────────────────────
def by_repr(obj: Any) -> Any:
    """The identity that version 0.1 used: NumPy's repr leaves out the middle of a long array."""
    return repr(obj)


def by_position(obj: Any) -> Any:
    """Counts the position of a stream as well."""
    return repr(sorted((k, str(v)) for k, v in vars(obj).items() if not callable(v)))


def test_the_checks_reject_an_identity_that_shortens_arrays_or_counts_the_position():
    long = np.zeros(5000)
    other = long.copy()
    other[2500] = 1
    assert by_repr(Keep(old=long)) == by_repr(Keep(old=other))
    assert fingerprint(long) != fingerprint(other)
    data = stream()
    before = by_position(data)
    next(data)
    assert by_position(data) != before


def test_describing_is_unaffected_by_replace():
    assert describe(replace(Keep(), beta=2.0)) != describe(Keep()) == describe(replace(Keep()))


def test_rows_of_numbers_become_arrays_for_a_fast_fingerprint():
    rows = [([1, 2, 3], 0), ({"ids": [4, 5]}, "text", []), (0, [1, 2])]
    fast = rows_as_arrays(rows)
    assert np.array_equal(fast[0][0], [1, 2, 3])
    assert np.array_equal(fast[1][0]["ids"], [4, 5])
    assert fast[1][1:] == ["text", []]
    assert fast[2][0] == 0
    others = [[([1, 2, 4], 0), *rows[1:]], rows[:2], [([1, 2, 3, 0], 0), *rows[1:]]]
    texts = {fingerprint(rows_as_arrays(some)) for some in [rows, *others]}
    assert len(texts) == 4


# ── a class that has got further fields since a digest was written ───────────────────────────────────────────────────
GNMT = {0.6: "dec748aee271558f4f3245366ccaccfd", 1.0: "93d72a4685ac035fafc8e3bf601b1d84"}      # written with one field


def later_penalty(alpha: float, **more: float) -> Any:
    """GNMTPenalty of a later version, which has got the fields beta and gamma."""
    fields = [("alpha", float, 0.6), ("beta", float, 0.0), ("gamma", float, 2.0)]
    cls = make_dataclass("GNMTPenalty", fields, frozen=True)
    cls.__module__, cls.__qualname__ = GNMTPenalty.__module__, GNMTPenalty.__qualname__
    return cls(alpha, **more)


def check_earlier(earlier: Callable[[Any], list[str]]) -> None:
    """A new field with its default value keeps the digests from before it; with another value it gives new ones."""
    for alpha, digest in GNMT.items():
        assert fingerprint(GNMTPenalty(alpha)) == digest == earlier(GNMTPenalty(alpha))[0]
        assert digest in earlier(later_penalty(alpha))
        with_beta = fingerprint(later_penalty(alpha, beta=0.5))
        assert earlier(later_penalty(alpha, beta=0.5))[0] == with_beta
        for more in ({"beta": 0.5}, {"gamma": 1.0}, {"beta": 0.5, "gamma": 1.0}):
            assert digest not in earlier(later_penalty(alpha, **more))
        assert with_beta not in earlier(later_penalty(alpha, beta=0.5, gamma=1.0))
        assert GNMT[0.6 if alpha == 1.0 else 1.0] not in earlier(later_penalty(alpha))
    assert earlier(by_repr) == [fingerprint(by_repr)] and earlier(GNMTPenalty) == [fingerprint(GNMTPenalty)]


def today_alone(obj: Any) -> list[str]:
    return [fingerprint(obj)]


def with_any_value(obj: Any) -> list[str]:
    """Leaves out the last fields, whatever their values are."""
    if not is_dataclass(obj) or isinstance(obj, type):
        return [fingerprint(obj)]
    values = [(f.name, getattr(obj, f.name)) for f in fields(obj)]
    return [fingerprint(_with_fields(obj, dict(values[:n]))) for n in range(len(values), -1, -1)]


def _with_fields(obj: Any, values: dict[str, Any]) -> Any:
    """An object of the same class that has these attributes alone."""
    made = object.__new__(type(obj))
    vars(made).update(values)
    return made


def of_the_class(obj: Any) -> list[str]:
    """Today's digest, and those of the object with the defaults of all its fields."""
    is_object = is_dataclass(obj) and not isinstance(obj, type)
    return [fingerprint(obj), *(earlier_fingerprints(type(obj)()) if is_object else [])]


def test_a_new_field_with_its_default_keeps_the_older_digests():
    check_earlier(earlier_fingerprints)


@pytest.mark.parametrize("wrong", [today_alone, with_any_value, of_the_class])
def test_other_lists_of_digests_are_rejected(wrong):
    with pytest.raises(AssertionError):
        check_earlier(wrong)


def test_fields_that_do_not_compare_are_left_out():
    """As the limits of padding in data.sources."""
    cls = make_dataclass("Pad", [("limit", int, field(compare=False)), ("pad_id", int)])
    assert describe_changed(cls(3, 4))["fields"] == {"pad_id": 4} != describe_changed(cls(3, 5))["fields"]
