"""Unknown keywords: every public function and class refuses them, and names the keyword that is meant."""
from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import pydoc
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from helpers import host_only, rejects

import tinyft as ft
from tinyft import data
from tinyft.compress import Rule
from tinyft.context import ELSEWHERE
from tinyft.decode import FACTS
from tinyft.keywords import FOREIGN_NAMES, checked_keywords

pytestmark = host_only
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# Public functions with **keywords: they pass them on, and refuse the others.
PASS_ON = {"Context", "generate", "beam_search", "predict", "largest_batch"}


def is_checked(thing: Any) -> bool:
    """True for a function or class that takes arguments; exceptions and modules are left out."""
    if not callable(thing) or (isinstance(thing, type) and issubclass(thing, Exception)):
        return False
    return bool(inspect.signature(thing).parameters)


PUBLIC: dict[str, Callable] = {name: getattr(ft, name) for name in ft.__all__ if is_checked(getattr(ft, name))}
PUBLIC |= {name: getattr(data, name) for name in data.__all__ if is_checked(getattr(data, name))}


def keywords_of(call: Callable) -> list[str]:
    """The keywords that a call takes, the facts of a pass that generation hands on included."""
    names = [name for name, p in inspect.signature(call).parameters.items() if p.kind in NAMED]
    return [*names, *FACTS] if call in (ft.generate, ft.beam_search) else names


# ── the property ─────────────────────────────────────────────────────────────────────────────────────────────────────
def hint_for(call: Callable, wrong: str) -> str:
    """What the message of a call with an unknown keyword says after its colon. AssertionError without such a message.

    The arguments that have no default value are None."""
    parameters = inspect.signature(call).parameters.values()
    given = {p.name: None for p in parameters if p.kind in NAMED and p.default is p.empty}
    try:
        call(**given, **{wrong: None})
    except TypeError as e:
        found = re.fullmatch(rf".* got an unknown keyword '{wrong}': (.*)", str(e))
        assert found, f"{wrong}: {e}"
        return found[1]
    raise AssertionError(f"{wrong} was accepted")


def proposed(hint: str) -> str:
    """The keyword that a hint proposes. AssertionError if it proposes none."""
    found = re.fullmatch(r"did you mean '(\w+)'\?", hint)
    assert found, hint
    return found[1]


def one_letter_changed(name: str) -> Iterator[str]:
    """The name with x, or q, in the place of each of its letters."""
    for i, letter in enumerate(name):
        yield name[:i] + ("q" if letter == "x" else "x") + name[i + 1:]


def distance(a: str, b: str) -> int:
    """The number of positions at which two texts of one length differ; for other lengths, a large number."""
    return sum(x != y for x, y in zip(a, b)) if len(a) == len(b) else 99


def check_misspelt(call: Callable) -> None:
    """A keyword with one letter changed is refused, and the hint proposes it, or another one as near.

    Of a name of one or two letters nothing is left to recognise: there the hint may list all names."""
    known = keywords_of(call)
    for name in known:
        for wrong in one_letter_changed(name):
            if wrong in known:
                continue
            hint = hint_for(call, wrong)
            if len(name) <= 2 and hint.startswith("it takes "):
                assert name in re.findall(r"\w+", hint)
            else:
                assert proposed(hint) in known
                assert distance(proposed(hint), wrong) == 1, f"{wrong}: {hint}"


def check_foreign(call: Callable) -> None:
    """A keyword of another library is refused, and the hint proposes one that has this name there."""
    known = keywords_of(call)
    for name in known:
        for foreign in FOREIGN_NAMES.get(name, "").split():
            if foreign in known or (call is ft.Context and foreign in ELSEWHERE):
                continue
            near = proposed(hint_for(call, foreign))
            assert near in known
            assert foreign in FOREIGN_NAMES[near].split(), f"{foreign}: {near}"


def check_keywords(call: Callable) -> None:
    check_misspelt(call)
    check_foreign(call)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_keyword_that_is_misspelt_or_of_another_library_is_refused_with_the_right_one(name):
    check_keywords(PUBLIC[name])


# ── wrong answers ────────────────────────────────────────────────────────────────────────────────────────────────────
def refusing(hint: Callable[[str, list[str]], str] | None) -> Callable:
    """A function of four keywords whose refusal has this hint. hint(keyword, known); None: unknown ones are dropped."""
    def target(lr: float, weight_decay: float = 0.0, smoothing: float = 0.0, group: int = 1) -> None:
        pass

    known = keywords_of(target)

    @functools.wraps(target)
    def call(**keywords: Any) -> None:
        for keyword in keywords.keys() - set(known):
            if hint is not None:
                raise TypeError(f"target got an unknown keyword '{keyword}': {hint(keyword, known)}")
    return call


def by_spelling(keyword: str, known: list[str]) -> str:
    return f"did you mean {difflib.get_close_matches(keyword, known, 1, 0.0)[0]!r}?"


def by_foreign_name(keyword: str, known: list[str]) -> str:
    near = [name for name, foreign in FOREIGN_NAMES.items() if keyword in foreign.split()]
    return f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"


WRONG = {
    "an unknown keyword is accepted and ignored": refusing(None),
    "the message lists all keywords": refusing(lambda keyword, known: f"it takes {', '.join(known)}"),
    "the hint is the first keyword": refusing(lambda keyword, known: f"did you mean {known[0]!r}?"),
    "the hint is the unknown keyword itself": refusing(lambda keyword, known: f"did you mean {keyword!r}?"),
    "names of other libraries are not known": refusing(by_spelling),
    "only names of other libraries are known": refusing(by_foreign_name),
    "the hint is a keyword of another function": refusing(lambda keyword, known: "did you mean 'label'?"),
}


@pytest.mark.parametrize("belief", WRONG)
def test_a_wrong_refusal_is_caught(belief):
    assert rejects(lambda: check_keywords(WRONG[belief]))


def test_the_message_of_python_is_caught_and_the_decorator_is_right():
    def target(lr: float, weight_decay: float = 0.0) -> None:
        pass

    assert rejects(lambda: check_keywords(target))
    check_keywords(checked_keywords(target))


# ── examples ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("call, keyword, near", [
    (ft.GPTQ, "damp_percent", "damp"),
    (ft.GPTQ, "desc_act", "act_order"),
    (ft.AWQ, "group_size", "group"),
    (ft.NF4, "block_size", "block"),
    (ft.GPTConfig, "block_size", "positions"),
    (ft.LoRA, "rank", "r"),
    (ft.Partial, "num_layers", "k"),
    (ft.GPTConfig, "num_layers", "layers"),
    (ft.AdamW, "beta", "betas"),
    (ft.AdamW, "learning_rate", "lr"),
    (ft.SGD, "beta", "momentum"),
    (ft.fit, "learning_rate", "optimizer"),
    (ft.fit, "learning_rat", "optimizer"),
    (ft.fit, "max_steps", "steps"),
    (ft.fit, "batch_size", "batches"),
    (ft.CrossEntropy, "label_smoothing", "smoothing"),
    (ft.Hinton, "alpha", "soft"),
    (ft.WordLevel, "alhpa", "alpha"),
    (ft.TinyBERTLoss, "T", "temperature"),
    (ft.beam_search, "num_beams", "beams"),
    (ft.beam_search, "length_penalty", "lp"),
    (ft.generate, "max_length", "max_new_tokens"),
    (ft.predict, "max_length", "max_len"),
    (ft.predict, "temprature", "temperature"),
    (ft.predict, "bs", "batch_size"),
    (ft.memory, "batch_size", "batch"),
    (ft.largest_batch, "seq_len", "length"),
    (ft.load, "torch_dtype", "dtype"),
    (ft.cosine_schedule, "num_warmup_steps", "warmup"),
    (ft.attach, "adapter_name", "name"),
    (ft.recompute, "enable", "enabled"),
    (ft.Tensor, "require_grad", "requires_grad"),
    (ft.Context, "attention_mas", "mask"),
    (ft.data.text_batches, "max_length", "max_len"),
], ids=lambda value: getattr(value, "__name__", value))
def test_examples(call, keyword, near):
    assert hint_for(call, keyword) == f"did you mean {near!r}?"


def test_without_a_near_keyword_all_are_listed():
    assert hint_for(ft.GNMTPenalty, "zzz") == "it takes alpha"
    assert hint_for(ft.Full, "zzz") == "it takes no keywords"


def test_every_row_of_the_table_is_of_use():
    taken = {"backend"}.union(*map(keywords_of, PUBLIC.values()))        # backend is an argument of Module.to
    for name, foreign in FOREIGN_NAMES.items():
        assert name in taken, name
        assert name not in foreign.split()
        assert len(set(foreign.split())) == len(foreign.split()), name


# ── nothing else changes ─────────────────────────────────────────────────────────────────────────────────────────────
def test_signatures_and_docstrings_stay():
    for name, call in PUBLIC.items():
        kinds = {p.kind for p in inspect.signature(call).parameters.values()}
        assert (inspect.Parameter.VAR_KEYWORD in kinds) == (name in PASS_ON)
        if dataclasses.is_dataclass(call):
            assert keywords_of(call) == [field.name for field in dataclasses.fields(call) if field.init]
    for base in (ft.Method, ft.Loss, Rule):
        assert not inspect.signature(base).parameters
    assert "perplexity(model: 'Module', batches: 'Iterable') -> 'float'" in pydoc.plain(pydoc.render_doc(ft.perplexity))
    assert ft.perplexity.__annotations__["return"] == "float"


@pytest.mark.parametrize("base", [ft.Method, ft.Loss, Rule, ft.CrossEntropy, ft.GPTQ], ids=lambda base: base.__name__)
def test_a_class_of_the_users_own_refuses_as_well(base):
    @dataclasses.dataclass(frozen=True)
    class Own(base):
        strength: float = 1.0

    assert Own(strength=2.0).strength == 2.0
    if base in (ft.Method, ft.Loss, Rule):
        with pytest.raises(TypeError, match="Own got an unknown keyword 'strenght': did you mean 'strength'"):
            Own(strenght=2.0)
        with pytest.raises(TypeError, match=f"{base.__name__} takes no arguments, got 1"):
            base(3)


def test_a_class_with_keywords_of_its_own_receives_them():
    class Own(ft.Loss):
        def __init__(self, **keywords: Any):
            self.keywords = keywords

    assert Own(anything=1).keywords == {"anything": 1}


class Plain:
    """A class with an __init__ of its own."""

    def __init__(self, steps: int, *, clip: float = 1.0, accumulate: int = 1) -> None:
        self.settings = (steps, clip, accumulate)


class Pair(NamedTuple):
    """A NamedTuple, which has a __new__ and no __init__."""

    steps: int
    clip: float = 1.0


class Base:
    """A base of dataclasses, which has neither."""


def only_keywords(*, clip: float = 1.0, accumulate: int = 1) -> tuple:
    """A function whose parameters are all keywords."""
    return clip, accumulate


def test_every_kind_of_class_and_function_can_be_decorated():
    plain = checked_keywords(type("Plain", (Plain,), {"__init__": Plain.__init__}))
    assert plain(3, clip=2.0, accumulate=4).settings == (3, 2.0, 4)
    pair = checked_keywords(type("Pair", (Pair,), {"__new__": Pair.__new__}))
    assert tuple(pair(3, clip=2.0)) == (3, 2.0)
    base = checked_keywords(type("Base", (Base,), {}))
    child = dataclasses.make_dataclass("Child", [("steps", int), ("clip", float, 1.0)], bases=(base,))
    assert (child(3, clip=2.0).steps, child(3, clip=2.0).clip) == (3, 2.0)
    function = checked_keywords(only_keywords)
    assert function(clip=2.0, accumulate=4) == (2.0, 4)
    for call in (plain, pair, child, function):
        assert hint_for(call, "clipp") == "did you mean 'clip'?"
