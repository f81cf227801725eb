"""Adapters on disk: every method, both families, with and without a new head; and every way a folder can be wrong."""
from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract import all_same, batch, build, noise, run, same, values
from helpers import host

from tinyft import (
    BERT,
    GPT,
    AdamW,
    BERTConfig,
    BitFit,
    Full,
    GPTConfig,
    Houlsby,
    LoRA,
    Method,
    PrefixTuning,
    attach,
    combine,
    detach,
    edit,
    fit,
    load_adapter,
    save_adapter,
)
from tinyft.adapters.files import find_method
from tinyft.files import read_tensors, write_tensors
from tinyft.identity import describe
from tinyft.methods import ALL

FILES = ["adapter.json", "adapter.safetensors"]
KINDS = ("gpt", "bert", "gpt-classes", "bert-classes")
SMALL: dict[str, Any] = {
    "LoRA": {"r": 2, "alpha": 3.0},
    "Houlsby": {"m": 3},
    "PrefixTuning": {"p": 2, "mlp": 5},
    "PromptTuning": {"p": 2},
}


def small(cls: type[Method]) -> Method:
    return cls(**SMALL.get(cls.__name__, {}))


def trained(kind: str, method: Method, name: str | None = None) -> Any:
    """A model with this method on it, away from where it started."""
    model = build(kind)
    attach(model, method, name=name)
    fit(model, [batch(kind, 0)], 2, AdamW(0.05), progress=False)
    return model


def untouched(model: Any, before: dict[str, np.ndarray], output: np.ndarray, names: list[str]) -> bool:
    """True if the model has the values, the output and the attached methods that it had before."""
    if not all_same(values(model), before) or not same(run(model), output):
        return False
    everything_trains = all(p.requires_grad for p in model.parameters())
    return [a.name for a in edit.attached(model)] == names and everything_trains == (not names)


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_a_loaded_adapter_gives_the_same_output_bitwise(cls, kind, tmp_path):
    model = trained(kind, small(cls))
    y = run(model)
    folder = tmp_path / "a"
    assert save_adapter(model, folder) == folder
    assert sorted(p.name for p in folder.iterdir()) == FILES
    fresh = build(kind)
    before, y0 = values(fresh), run(fresh)
    a = load_adapter(fresh, str(tmp_path / "a"))
    assert same(run(fresh.eval()), y) and not same(y0, y)
    assert a.method == edit.get_attached(model).method and a.name == cls.__name__.lower()
    assert edit.count(fresh) == edit.count(model) and sorted(edit.trained(fresh)) == sorted(edit.trained(model))
    detach(fresh)
    assert untouched(fresh, before, y0, [])


def test_what_is_stored_is_what_trained_and_no_more(tmp_path):
    model = trained("gpt-classes", LoRA(r=2))
    save_adapter(model, tmp_path)
    arrays, _ = read_tensors(tmp_path / "adapter.safetensors")
    factors = [f"blocks.{i}.attn.{p}:{m}" for i in (0, 1) for p in "qv" for m in "AB"]
    assert sorted(arrays) == sorted([*factors, "head.out.weight"])
    assert sum(a.nbytes for a in arrays.values()) == edit.count(model).nbytes
    facts = json.loads((tmp_path / "adapter.json").read_text())
    assert facts["method"]["class"].endswith(".LoRA") and facts["method"]["fields"]["r"] == 2
    assert facts["seed"] == 0 and facts["head"] == ["head.out.weight"] and facts["base"]["family"] == "GPT"


def test_an_adapter_can_come_back_under_another_name_and_beside_others(tmp_path):
    model = trained("gpt", LoRA(r=2), name="first")
    attach(model, Houlsby(m=3, norms=False), name="second")
    noise(model)
    y = run(model)
    save_adapter(model, tmp_path / "a", "first")
    save_adapter(model, tmp_path / "b")                                          # the last one
    fresh = build("gpt")
    assert load_adapter(fresh, tmp_path / "a", name="one", method=LoRA).name == "one"
    load_adapter(fresh, tmp_path / "b")
    assert [a.name for a in edit.attached(fresh)] == ["one", "second"] and same(run(fresh), y)


def test_an_adapter_goes_onto_a_base_that_trains_something_else_by_now(tmp_path):
    """The base is known by what it was before anything was attached."""
    save_adapter(trained("gpt", LoRA(r=2)), tmp_path)
    model = trained("gpt", BitFit())
    load_adapter(model, tmp_path)
    assert [a.name for a in edit.attached(model)] == ["bitfit", "lora"]


def test_saving_again_replaces_what_was_there(tmp_path):
    save_adapter(trained("gpt", LoRA(r=2)), tmp_path)
    model = trained("gpt", PrefixTuning(p=2))
    save_adapter(model, tmp_path)
    fresh = build("gpt")
    load_adapter(fresh, tmp_path)
    assert same(run(fresh), run(model)) and sorted(p.name for p in tmp_path.iterdir()) == FILES


# ── folders that are wrong ───────────────────────────────────────────────────────────────────────────────────────────
def other_weights() -> Any:
    model = build("gpt")
    w = host(model.blocks[1].mlp.up.weight).copy()
    w[3, 2] = np.nextafter(w[3, 2], 9, dtype=np.float32)                         # one bit of one number
    model.blocks[1].mlp.up.weight.copy_(w)
    return model


def with_head(classes: int) -> Any:
    model = build("gpt")
    model.new_head(classes, np.random.default_rng(0))
    return model


def rewritten(**change: Any) -> Callable[[Path], None]:
    """The JSON with some entries replaced."""
    def go(path: Path) -> None:
        facts = json.loads((path / "adapter.json").read_text())
        (path / "adapter.json").write_text(json.dumps(facts | change))
    return go


def consistent(**change: Any) -> Callable[[Path], None]:
    """Both files as another program, or another version, might have written them."""
    def go(path: Path) -> None:
        from tinyft.adapters.files import digest
        facts = json.loads((path / "adapter.json").read_text()) | change
        (path / "adapter.json").write_text(json.dumps(facts))
        arrays, _ = read_tensors(path / "adapter.safetensors")
        write_tensors(path / "adapter.safetensors", arrays, {"sum": digest(facts)})
    return go


def cut(file: str, at: float) -> Callable[[Path], None]:
    def go(path: Path) -> None:
        data = (path / file).read_bytes()
        (path / file).write_bytes(data[:int(at * len(data))])
    return go


def flipped(path: Path) -> None:
    data = bytearray((path / "adapter.safetensors").read_bytes())
    data[-2] ^= 1
    (path / "adapter.safetensors").write_bytes(data)


def mixed(file: str) -> Callable[[Path], None]:
    """One of the files from another saving."""
    def go(path: Path) -> None:
        other = path / "other"
        save_adapter(trained("gpt", LoRA(r=2, alpha=5.0)), other)
        shutil.copy(other / file, path / file)
        shutil.rmtree(other)
    return go


def fewer(path: Path) -> None:
    arrays, facts = read_tensors(path / "adapter.safetensors")
    arrays.pop("blocks.0.attn.q:A")
    write_tensors(path / "adapter.safetensors", arrays, facts)


def reshaped(path: Path) -> None:
    arrays, facts = read_tensors(path / "adapter.safetensors")
    write_tensors(path / "adapter.safetensors", arrays | {"blocks.0.attn.q:A": arrays["blocks.0.attn.q:A"].T}, facts)


def unchanged(path: Path) -> None:
    pass


def lora_facts(cls: str = "LoRA", **fields: Any) -> dict[str, Any]:
    """A method's entry in adapter.json."""
    return {"class": f"tinyft.methods.reparameterized.lora.{cls}", "fields": fields}


def base() -> Any:
    return build("gpt")


def overwritten(content: bytes) -> Callable[[Path], None]:
    """The JSON file with this content."""
    def go(path: Path) -> None:
        (path / "adapter.json").write_bytes(content)
    return go


def removed(file: str) -> Callable[[Path], None]:
    def go(path: Path) -> None:
        (path / file).unlink()
    return go


def refused(words: str, spoil: Callable[[Path], None] = unchanged, model: Callable[[], Any] = base,
            error: Any = ValueError, **arguments: Any) -> tuple:
    """A case: spoil the folder, load it onto a model with these arguments, and expect the error with these words."""
    return words, spoil, model, error, arguments


def other_method(**fields: Any) -> Callable[[Path], None]:
    return consistent(method=lora_facts(**fields))


WRONG = {
    "other weights": refused("a base with other weights", model=other_weights),
    "other sizes": refused(
        r"a base of [\d,]+ parameters; this is a base of", model=lambda: GPT(GPTConfig(23, 24, 12, 3, 3, 20))),
    "as many parameters in other shapes": refused(
        "with other shapes", model=lambda: GPT(GPTConfig(24, 23, 12, 2, 3, 20))),
    "another family": refused(
        "family GPT; this is .* family BERT", model=lambda: BERT(BERTConfig(23, 24, 2, 12, 2, 3, 20))),
    "a head where there was none": refused("new head has shapes", model=lambda: with_head(3)),
    "another method wanted": refused("holds a LoRA, not a Houlsby", method=Houlsby),
    "an unknown method": refused(
        "'Telepathy', which this tinyft does not know", consistent(method=lora_facts("Telepathy", r=2))),
    "a field of a later version": refused("another version of LoRA: .*warp", other_method(r=2, alpha=3.0, warp=9)),
    "another rank": refused(
        r"attn.q.edits.lora.A has shape \(2, 12\), not \(3, 12\)", other_method(r=3, alpha=3.0)),
    "a rank below one": refused(
        "rank r >= 1", other_method(r=0, alpha=3.0), error=(ValueError, ZeroDivisionError)),
    "targets that are not there": refused(
        "'nowhere' names no module", other_method(r=2, targets="nowhere"), error=LookupError),
    "a missing tensor": refused("does not fit: blocks.0.attn.q.edits.lora.A is missing", fewer),
    "a transposed tensor": refused(
        r"blocks.0.attn.q.edits.lora.A has shape \(12, 2\), not \(2, 12\)", reshaped),
    "changed fields": refused("not of one saving", rewritten(method=lora_facts(r=2, alpha=99.0))),
    "a cut json": refused("adapter.json is damaged", cut("adapter.json", 0.5)),
    "an empty json": refused("adapter.json is damaged", cut("adapter.json", 0)),
    "a json that is a list": refused("adapter.json is damaged", overwritten(b"[1, 2]")),
    "a json of bytes": refused("adapter.json is damaged", overwritten(b"\xff\xfe\x00")),
    "a json without its facts": refused("adapter.json is damaged: it has no base", overwritten(b'{"name": "lora"}')),
    "a method that is a number": refused("adapter.json is damaged: it does not name a method", consistent(method=3)),
    "cut tensors": refused("adapter.safetensors is damaged", cut("adapter.safetensors", 0.7)),
    "empty tensors": refused("adapter.safetensors is damaged", cut("adapter.safetensors", 0)),
    "one bit flipped": refused("adapter.safetensors is damaged", flipped),
    "the json of another saving": refused("not of one saving", mixed("adapter.json")),
    "the tensors of another saving": refused("not of one saving", mixed("adapter.safetensors")),
    "no json": refused("it has no adapter.json", removed("adapter.json"), error=FileNotFoundError),
    "no tensors": refused("it has no adapter.safetensors", removed("adapter.safetensors"), error=FileNotFoundError),
    "no folder": refused("is no adapter", shutil.rmtree, error=FileNotFoundError),
    "a taken name": refused(
        "'lora' is attached already", model=lambda: trained("gpt", BitFit(), name="lora")),
}


@pytest.mark.parametrize("why", WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence_and_the_model_is_unchanged(why, tmp_path):
    words, spoil, make, error, arguments = WRONG[why]
    folder = tmp_path / "adapter"
    save_adapter(trained("gpt", LoRA(r=2, alpha=3.0)), folder)
    spoil(folder)
    model = make().eval()
    before = values(model)
    y = run(model)
    names = [a.name for a in edit.attached(model)]
    with pytest.raises(error, match=words) as e:
        load_adapter(model, folder, **arguments)
    assert "\n" not in str(e.value)
    assert untouched(model, before, y, names)


def test_without_any_of_that_the_same_folder_loads(tmp_path):
    """So it was the fault that was refused, above."""
    model = trained("gpt", LoRA(r=2, alpha=3.0))
    save_adapter(model, tmp_path)
    consistent()(tmp_path)
    fresh = build("gpt")
    load_adapter(fresh, tmp_path, method=LoRA)
    assert same(run(fresh), run(model))


# ── saving that cannot be ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("where", ["fsync", "write", "replace"])
def test_a_full_disk_leaves_the_old_adapter_readable_and_no_rubbish(where, call, tmp_path, monkeypatch):
    """Also when it fills up between the two files."""
    if (where, call) == ("replace", 2):
        pytest.skip("a move within a folder takes no space: the disk is full before the first move, or at neither")
    old = trained("gpt", LoRA(r=2))
    save_adapter(old, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    new = trained("gpt", PrefixTuning(p=7))
    if where == "write":                                 # the system itself stops the write half way
        resource = pytest.importorskip("resource", reason="needs POSIX limits")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 * call, hard))
    else:
        real, calls = getattr(os, where), []

        def full(*args: Any) -> Any:
            calls.append(args)
            if len(calls) == call:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)
        monkeypatch.setattr(os, where, full)
    try:
        with pytest.raises(OSError, match="could not write .* what was there before is untouched"):
            save_adapter(new, tmp_path)
    finally:
        monkeypatch.undo()
        if where == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    fresh = build("gpt")
    load_adapter(fresh, tmp_path)
    assert same(run(fresh), run(old))
    save_adapter(new, tmp_path)
    load_adapter(detached(fresh), tmp_path)
    assert same(run(fresh), run(new))


def detached(model: Any) -> Any:
    detach(model)
    return model


@dataclass(frozen=True)
class Homemade(Method):
    """A method of a user's own: it lives in no module of tinyft."""
    targets: Any = "attn.q"

    def edit(self, path: str, module: Any, rng: np.random.Generator) -> edit.Edit:
        return LoRA(r=1).edit(path, module, rng)


class Plain(Method):
    """Not even a dataclass."""
    def trains(self, model: Any) -> set[str]:
        return {name for name in edit.base_parameters(model) if name.endswith(".bias")}


@pytest.mark.parametrize("method", [Homemade(), Plain()], ids=["homemade", "plain"])
def test_a_users_own_method_saves_and_loads_when_its_class_is_given(method, tmp_path):
    """Its class is compared with the name in the file; no code is imported by name."""
    cls = type(method)
    model = trained("gpt", method)
    save_adapter(model, tmp_path)
    fresh = build("gpt")
    with pytest.raises(ValueError, match=f"{cls.__name__!r}, which this tinyft does not know.*method="):
        load_adapter(fresh, tmp_path)
    with pytest.raises(ValueError, match=f"holds a {cls.__name__}, not a LoRA"):
        load_adapter(fresh, tmp_path, method=LoRA)
    assert not edit.attached(fresh)
    load_adapter(fresh, tmp_path, method=cls)
    assert same(run(fresh), run(model))


@dataclass(frozen=True)
class Pulled(Method):
    """A method with data among its fields."""
    old: Any = None
    beta: float = 1.0
    targets: Any = "attn.q"

    def edit(self, path: str, module: Any, rng: np.random.Generator) -> edit.Edit:
        return LoRA(r=1).edit(path, module, rng)


def test_a_method_with_data_is_given_again_to_load_and_must_be_the_same(tmp_path):
    data = [np.arange(12).reshape(3, 4), np.ones((3, 4), int)]
    model = trained("gpt", Pulled(old=data))
    save_adapter(model, tmp_path)
    assert (tmp_path / "adapter.json").stat().st_size < 2000                     # a fingerprint, not the data
    fresh = build("gpt")
    with pytest.raises(ValueError, match="the old of its Pulled is data.*pass the method itself"):
        load_adapter(fresh, tmp_path, method=Pulled)
    for other, field in ((Pulled(old=[data[0], data[0]]), "old"), (Pulled(old=data, beta=2.0), "beta")):
        with pytest.raises(ValueError, match=f"with another {field}"):
            load_adapter(fresh, tmp_path, method=other)
    load_adapter(fresh, tmp_path, method=Pulled(old=[a.copy() for a in data]))
    assert same(run(fresh), run(model))


def test_a_field_that_a_file_lacks_had_its_default(tmp_path, monkeypatch):
    data = [np.ones((3, 4), int)]

    def describe_older(method: Any) -> Any:
        """The description before the class had its field beta."""
        facts = describe(method)
        del facts["fields"]["beta"]
        return facts
    with monkeypatch.context() as m:
        m.setattr("tinyft.adapters.files.describe", describe_older)
        model = trained("gpt", Pulled(old=data))
        save_adapter(model, tmp_path)
    fresh = build("gpt")
    with pytest.raises(ValueError, match="with another beta"):
        load_adapter(fresh, tmp_path, method=Pulled(old=data, beta=2.0))
    load_adapter(fresh, tmp_path, method=Pulled(old=data))
    assert same(run(fresh), run(model))


def test_neither_is_a_weighted_sum_of_adapters_nor_nothing(tmp_path):
    model = trained("gpt", LoRA(r=2))
    one = detach(model)
    with pytest.raises(LookupError, match="nothing"):
        save_adapter(model, tmp_path)
    attach(model, combine([one, one], [0.5, 0.5]))
    with pytest.raises(ValueError, match="Combined is not a method"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_method_is_known_by_its_name():
    assert all(find_method(cls.__name__) is cls for cls in ALL)
    assert find_method("Method") is None and find_method("Homemade") is None
    assert find_method("Full") is Full


# ── files of version 0.1 ─────────────────────────────────────────────────────────────────────────────────────────────
OLD = Path(__file__).parent / "data" / "version_0_1"


def old_base(kind: str) -> Any:
    """The base model whose adapters version 0.1 saved."""
    if kind == "gpt":
        model = GPT(GPTConfig(19, 16, 12, 2, 3, 20))
    else:
        model = BERT(BERTConfig(19, 16, 2, 12, 2, 3, 20))
        model.new_head(3, np.random.default_rng(0))
    model.load_state_dict(read_tensors(OLD / f"{kind}.safetensors")[0])
    return model.eval()


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in OLD.glob("*/adapter.json")))
def test_an_adapter_of_version_0_1_loads_and_gives_the_logits_it_gave(folder):
    model = old_base(folder.split("-")[0])
    expected = read_tensors(OLD / "expected.safetensors")[0]
    before = run(model, expected["ids"][0])
    load_adapter(model, OLD / folder)
    logits = run(model.eval(), expected["ids"][0])
    np.testing.assert_allclose(logits, expected[folder], rtol=1e-4, atol=1e-5)
    assert np.abs(before - expected[folder]).max() > 1e-3                        # the adapter changes them
