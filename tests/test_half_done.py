"""Every public function either does all or changes nothing; and the object that a user holds stays usable.

`snapshot` holds all that may change: values, dtypes, what trains, edits, methods, heads, modes.
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import contract
import numpy as np
import pytest
from contract import build, noise, run, same
from helpers import dev, host
from test_protocol import Int8

import tinyft as ft
from tinyft import array, edit
from tinyft.edit import Attached, CannotMerge, Edit, Method, attach, detach, eject, merge, without
from tinyft.methods import BitFit, Full, Houlsby, LoRA, Partial, PrefixTuning, PromptTuning
from tinyft.nn import Linear, Module, Parameter

METHODS = [Full(), Partial(), BitFit(), Houlsby(m=2), PromptTuning(p=2), PrefixTuning(p=2), LoRA(r=2)]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def snapshot(model: Module) -> dict[str, Any]:
    """All that a call could change, as values that can be compared."""
    state: dict[str, Any] = {"methods": [(a.name, a.is_attached) for a in edit.attached(model)]}
    for path, module in model.named_modules():
        kinds = {name: type(value).__name__ for name, value in vars(module).items()}
        state[f"{path}:"] = (type(module).__name__, module.training, module.tied, list(module.edits), kinds)
    for name, p in model.named_parameters().items():
        state[name] = (host(p).tobytes(), str(p.dtype), p.device, p.requires_grad, p.version[0])
    for name, buffer in model.named_buffers().items():
        state[name] = (host(buffer).tobytes(), str(buffer.dtype))
    for a in edit.attached(model):
        state[f"base of {a.name}"] = {name: host(values).tobytes() for name, values in a.base_values.items()}
    return state


def content(a: Attached) -> dict[str, Any]:
    """All that belongs to an adapter: name, tensors of its edits, base values."""
    values = {}
    for path, e in a.edits.items():
        tensors = e.named_parameters() | e.named_buffers()
        values |= {f"{path}.{name}": host(v).tobytes() for name, v in tensors.items()}
    base = {name: host(v).tobytes() for name, v in a.base_values.items()}
    return {"name": a.name, "edits": values, "base": base}


def check_unchanged(model: Module, call: Callable[[], Any], error: Any, words: str | None = None) -> None:
    """The call raises, in one sentence, and the model is what it was."""
    before = snapshot(model)
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before


# ── attach ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def gpt(**sizes: int) -> ft.GPT:
    return ft.GPT(ft.GPTConfig(**({"vocab": 23, "positions": 24, "width": 12, "layers": 2, "heads": 3} | sizes)))


OTHERS = {
    "deeper": lambda: gpt(layers=3),
    "shallower": lambda: gpt(layers=1),
    "wider": lambda: gpt(width=24),
    "float64": lambda: gpt().to(dtype="float64"),
    "bert": lambda: ft.BERT(ft.BERTConfig(vocab=23, positions=24, width=12, layers=2, heads=3)),
}


@every_method
@pytest.mark.parametrize("other", OTHERS)
def test_an_adapter_of_another_model_is_refused_and_both_stay_what_they_were(method, other):
    """A model with other blocks, another width, dtype or family. The same adapter still fits its own base."""
    model = gpt()
    attach(model, method)
    noise(model)
    y = run(model)
    a = detach(model)
    before = content(a)
    wrong = OTHERS[other]()
    check_unchanged(wrong, lambda: attach(wrong, a, name="new"), ValueError, "was attached to another model")
    assert content(a) == before and not a.is_attached
    attach(model, a)
    assert same(run(model), y)


def test_an_adapter_that_is_attached_is_not_attached_to_a_second_model():
    """Both models would share its tensors, and the values of one base would go into the other."""
    first, second = gpt(), gpt()
    a = attach(first, Full())
    noise(first)
    check_unchanged(second, lambda: attach(second, a), ValueError, "is attached to a model already")
    detach(first)
    attach(second, a)
    assert same(run(second), run(second))


def test_an_adapter_goes_on_again_after_a_new_head():
    model = gpt()
    attach(model, LoRA(r=2))
    a = detach(model)
    ft.classifier(model, 3)
    assert attach(model, a) is a


@dataclass(frozen=True)
class Misplaced(Method):
    """Its second edit is of a module that is not there."""

    targets: Any = "attn.q"

    def edits(self, found: dict[str, Module], rng: np.random.Generator) -> dict[str, Edit]:
        return {path: Edit() for path in (*found, "blocks.9.attn.q")}


@dataclass(frozen=True)
class NoEdits(Misplaced):
    """Its edits are no Edits."""

    def edits(self, found: dict[str, Module], rng: np.random.Generator) -> dict[str, Edit]:
        return dict.fromkeys(found, Linear)


def test_a_method_with_an_edit_in_the_wrong_place_leaves_no_other_edit():
    model = gpt()
    check_unchanged(model, lambda: attach(model, Misplaced()), ValueError, "wants to edit blocks.9.attn.q")
    check_unchanged(model, lambda: attach(model, NoEdits()), TypeError, "wants an Edit, got the class Linear")


# ── eject, merge, combine: the object that the user holds ────────────────────────────────────────────────────────────
@every_method
def test_ejecting_leaves_the_trained_adapter_that_the_user_holds(method):
    """Training the ejected form does not reach the old one, which is what `detach` would have given."""
    model = gpt()
    base = run(model)
    a = attach(model, method)
    noise(model)
    y = run(model)
    ejected = eject(model)
    assert ejected is not a and same(run(model), y)
    for p in ft.trained(model).values():
        p.copy_(host(p) * 0)
    assert detach(model) is ejected
    assert same(run(model), base)
    attach(model, a)
    assert same(run(model), y)
    assert detach(model) is a
    assert same(run(model), base)


def test_the_copies_of_edits_share_what_they_shared_and_refer_to_the_same_base():
    """Planted: a plain deepcopy would copy the base's part that an edit refers to."""
    model = gpt()
    a = attach(model, PrefixTuning(p=2, mlp=3))
    for e in a.edits.values():
        e._other = model.embed
    copies = edit.copy_edits(a.edits)
    hidden = {id(e.hidden) for e in copies.values()}
    assert len(hidden) == 1 and not hidden & {id(e.hidden) for e in a.edits.values()}
    assert all(e._other is model.embed for e in copies.values())
    assert next(iter(copy.deepcopy(a.edits).values()))._other is not model.embed
    own = {id(p) for e in a.edits.values() for p in e.parameters()}
    assert not own & {id(p) for e in copies.values() for p in e.parameters()}


@dataclass(frozen=True)
class BadEject(LoRA):
    """Its ejected form has an edit of a module that is not there."""

    def eject(self, edits: dict[str, Edit]) -> tuple[Method, dict[str, Edit]]:
        return self, {**edits, "blocks.9.attn.q": Edit()}


def test_an_eject_that_fails_changes_nothing():
    model = gpt()
    a = attach(model, BadEject(r=2))
    before = content(a)
    check_unchanged(model, lambda: eject(model), ValueError, "wants to edit blocks.9")
    assert content(a) == before


@pytest.mark.parametrize("method", [Full(), BitFit(), LoRA(r=2)], ids=str)
def test_a_merged_adapter_can_be_attached_to_a_fresh_base(method):
    model, fresh = gpt(), gpt()
    a = attach(model, method)
    noise(model)
    y = run(model)
    merge(model)
    attach(fresh, a)
    assert contract.near(run(fresh), y, 1e-6)
    detach(fresh)
    assert same(run(fresh), run(gpt()))


@dataclass(frozen=True)
class BadFold(LoRA):
    """Its edits fold into a weight of another shape, in the last block only."""

    def edit(self, path: str, module: Module, rng: np.random.Generator) -> Edit:
        e = super().edit(path, module, rng)
        return Unfoldable(e) if path.startswith("blocks.1") else e


class Unfoldable(Edit):
    """An edit whose fold gives a row too few."""

    def __init__(self, inner: Edit):
        self.inner = inner

    def after(self, x: Any, y: Any, ctx: Any) -> Any:
        return self.inner.after(x, y, ctx)

    def fold(self, p: dict[str, Any]) -> dict[str, Any]:
        return {**p, "weight": p["weight"][1:]}


def test_a_merge_that_fails_in_the_last_block_has_not_written_the_first():
    model = gpt()
    attach(model, BadFold(r=2))
    noise(model)
    check_unchanged(model, lambda: merge(model), CannotMerge, "blocks.1.attn.q: an edit gives weight of shape")


class Broken(Int8):
    """A packed weight that cannot be decompressed."""

    def dequantize(self) -> Any:
        raise MemoryError("no memory")


def test_an_unpack_that_fails_has_unpacked_nothing():
    model = gpt()
    model.blocks[0].attn.q.weight = Int8(host(model.blocks[0].attn.q.weight))
    model.blocks[1].attn.q.weight = Broken(host(model.blocks[1].attn.q.weight))
    check_unchanged(model, lambda: ft.unpack(model), MemoryError)


def test_a_combination_has_its_own_tensors_and_refuses_two_bases():
    model = gpt()
    a = attach(model, LoRA(r=2))
    noise(model)
    detach(model)
    before = content(a)
    attach(model, ft.combine([a, a], [0.5, 0.5]))
    for p in ft.trained(model).values():
        p.copy_(host(p) + 1)
    assert content(a) == before
    wide = gpt(width=24)
    attach(wide, LoRA(r=2))
    with pytest.raises(ValueError, match="belongs to another base"):
        ft.combine([a, detach(wide)])


def test_the_methods_of_a_model_do_not_change_inside_without():
    model = gpt()
    a = attach(model, LoRA(r=2))
    with without(model):
        for call in (lambda: attach(model, LoRA(r=2), name="b"), lambda: detach(model), lambda: merge(model),
                     lambda: eject(model)):
            check_unchanged(model, call, RuntimeError, "inside `with without")
        with without(model):
            pass
    assert detach(model) is a


# ── state, moves, heads ──────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("values, error", [
    ("text", TypeError), (None, TypeError), ([[1.0], [1.0, 2.0]], TypeError), (np.array(["a"] * 12), TypeError),
    (np.ones(12, complex), TypeError), (np.ones(11), ValueError),
], ids=str)
def test_a_state_with_one_wrong_value_at_the_end_changes_nothing(values, error):
    model = gpt()
    state = {name: host(v) + 1 for name, v in model.state_dict().items()}
    last = list(state)[-1]
    assert state[last].shape == (12,)
    check_unchanged(model, lambda: model.load_state_dict({**state, last: values}), error, last)
    a = attach(model, BitFit())
    ours = edit.state_dict(model, a)
    last = [name for name, v in ours.items() if v.shape == (12,)][-1]
    wrong_state = {**ours, last: values}
    check_unchanged(model, lambda: edit.load_state_dict(model, a, wrong_state), (ValueError, TypeError), last)
    for wrong in (None, 5, [1]):
        check_unchanged(model, lambda: model.load_state_dict(wrong), TypeError, "wants a dict")
        check_unchanged(model, lambda: edit.load_state_dict(model, a, wrong), TypeError, "wants a dict")
    model.load_state_dict({**model.state_dict(), last: [1.0] * 12})              # a list of numbers is an array
    assert host(model.named_parameters()[last]).tolist() == [1.0] * 12


def test_a_move_that_fails_half_way_moved_nothing(monkeypatch):
    model = gpt()
    calls = []
    to = array.to

    def full(a: Any, name: str) -> Any:
        calls.append(1)
        if len(calls) > 5:
            raise MemoryError("the device is full")
        return to(a, name)

    monkeypatch.setattr(array, "to", full)
    check_unchanged(model, lambda: model.to("strict"), MemoryError)


@pytest.mark.parametrize("dtype", [int, bool, object, complex, "int8", "nonsense", "cuda", 3, "float128", np.int64, []])
def test_a_dtype_that_no_model_has_is_refused(dtype):
    model = gpt()
    check_unchanged(model, lambda: model.to(dtype=dtype), TypeError, "wants one of the dtypes float64, float32")


def test_a_backend_that_does_not_exist_is_refused_with_a_hint():
    model = gpt()
    for name, words in {"cuda": "'cupy'", "cuda:0": "'cupy'", "cpu": "'numpy'", "nonsense": "one of numpy"}.items():
        check_unchanged(model, lambda: model.to(name), ft.BackendError, words)
    for name in (5, np.float32, "float16", True):
        check_unchanged(model, lambda: model.to(name), TypeError, "to wants a backend")


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_a_head_that_is_too_large_leaves_the_old_one(kind):
    model = build(kind)
    check_unchanged(model, lambda: ft.classifier(model, 10**13), MemoryError)
    for classes in (0, -1, 2.0, True, "3", None):
        check_unchanged(model, lambda: ft.classifier(model, classes), ValueError, "at least one class")
    check_unchanged(model, lambda: ft.classifier(model, 3, seed=-1), ValueError, "seed wants a whole number")


def test_a_head_that_cannot_be_moved_leaves_the_old_one(monkeypatch):
    model = build("bert").to(dtype=np.float64)

    def fails(a: Any, name: str) -> Any:
        raise MemoryError("the device is full")

    before = snapshot(model)
    monkeypatch.setattr(array, "to", fails)
    with pytest.raises(MemoryError):
        ft.classifier(model, 3)
    monkeypatch.undo()
    assert snapshot(model) == before and model.embed.tied


def test_the_snapshot_sees_a_change():
    """Planted: each of these would be half a change."""
    def edits_one(model: Any) -> None:
        model.blocks[0].attn.q.edits = {"lora": Edit()}

    def freezes(model: Any) -> None:
        model.embed.weight.requires_grad = False

    def unties(model: Any) -> None:
        model.embed.tied = False

    def writes(model: Any) -> None:
        model.norm.weight.copy_(host(model.norm.weight))

    def adds(model: Any) -> None:
        model.pos.bias = Parameter(dev(np.zeros(2, np.float32)))

    for change in (edits_one, freezes, unties, writes, adds):
        model = gpt()
        before = snapshot(model)
        change(model)
        assert snapshot(model) != before, change.__name__
