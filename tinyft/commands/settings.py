"""The options --method, --loss and --set: a method, a rule or a loss by its name, its hyper-parameters from texts.

    make_method("lora", ["r=8", "targets=attn.[qv]"])      ->  LoRA(r=8, targets="attn.[qv]")
    make_rule("gptq", ["bits=4", "group=none"])            ->  GPTQ(bits=4, group=None)
    make_loss("hinton", ["temperature=4"], teacher)        ->  Hinton(teacher, temperature=4.0)

A text is read as the type of its field: whole number, number, true or false, text; a comma separates the parts of a
tuple. Errors are UsageErrors: the command line is wrong.
"""
from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .arguments import UsageError

if TYPE_CHECKING:
    from ..compress import Rule
    from ..compress.distill.sequence import NewTargets
    from ..edit import Method
    from ..nn import Module
    from ..train import Loss

__all__ = ["loss_class", "make_fields", "make_loss", "make_method", "make_rule", "method_class", "read_fields",
           "read_value", "rule_class"]


def make_method(name: str, settings: list[str]) -> Method:
    """The method of this name with the fields that the settings "field=value" give; its defaults for all others.

    UsageError, with a near name, for an unknown method or field, and for a value that the field cannot have."""
    return _make(method_class(name), settings)


def make_rule(name: str, settings: list[str]) -> Rule:
    """The compression rule of this name; otherwise as make_method."""
    return _make(rule_class(name), settings)


def make_loss(name: str, settings: list[str], teacher: Module, **others: Any) -> Loss:
    """The distillation loss of this name, with its teacher and other fields; otherwise as make_method."""
    return _make(loss_class(name), settings, teacher=teacher, **others)


def make_fields(cls: Any, settings: list[str]) -> Any:
    """An instance of a dataclass, with the fields that --set gives; otherwise as make_method."""
    return _make(cls, settings)


def _make(cls: Any, settings: list[str], **others: Any) -> Any:
    """An instance of a dataclass with the fields that the settings give, and with others, which these cannot give."""
    known = [field.name for field in dataclasses.fields(cls) if field.init and field.name not in others]
    given = read_fields("--set", cls, settings, known)
    try:
        return cls(**others, **given)
    except (TypeError, ValueError) as e:
        raise UsageError(str(e)) from e


def read_fields(option: str, cls: Any, settings: Iterable[str], known: Sequence[str]) -> dict[str, Any]:
    """{field of a dataclass: value} of settings "field=value".

    option  that gives them, for the messages
    known   the fields that they may name

    UsageError, with a near name, for another field, for one that stands twice, and for a value of another kind."""
    from ..keywords import refuse_keywords

    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"{option} wants FIELD=VALUE, such as {next(iter(known), 'r')}=8, got {setting!r}")
        if key in given:
            raise UsageError(f"{option} gives {key} twice")
        try:
            refuse_keywords(f"{option} with {cls.__name__}", {key} - set(known), known)
        except TypeError as e:
            raise UsageError(str(e)) from e
        given[key] = read_value(f"{option} {key}", text.strip(), hints[key])
    return given


def method_class(name: str) -> type[Method]:
    """The method class of this name: of the class, LoRA, or of its file, lora. Case, - and _ do not matter.

    UsageError, with a near name or with all names, if there is none."""
    from ..methods import ALL

    return _class_of_name("--method", name, ALL, "a method")


def rule_class(name: str) -> type[Rule]:
    """The compression rule of this name, GPTQ or gptq; otherwise as method_class."""
    from ..compress import Rule, quantize

    classes = [getattr(quantize, found) for found in quantize.__all__]
    rules = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, Rule)]
    return _class_of_name("--method", name, rules, "a compression rule")


def loss_class(name: str) -> type[Loss | NewTargets]:
    """The distillation of this name, WordLevel or word-level; otherwise as method_class."""
    from ..compress import distill
    from ..compress.distill.sequence import NewTargets
    from ..train import Loss

    classes = [getattr(distill, found) for found in distill.__all__]
    losses = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, (Loss, NewTargets))]
    return _class_of_name("--loss", name, losses, "a distillation loss")


def _class_of_name(option: str, name: str, classes: Iterable[type], kind: str) -> Any:
    """The class of this name, or of the file of this name. UsageError, naming the option, if there is none.

    kind: of the classes, in words."""
    classes = list(classes)
    known = {_plain(cls.__module__.rpartition(".")[2]): cls for cls in classes}
    known |= {_plain(cls.__name__).removesuffix("loss"): cls for cls in classes}         # TinyBERTLoss: tinybert
    known |= {_plain(cls.__name__): cls for cls in classes}
    if _plain(name) in known:
        return known[_plain(name)]
    near = difflib.get_close_matches(_plain(name), known, 1, 0.5)
    names = ", ".join(cls.__name__ for cls in classes)
    hint = f"did you mean {known[near[0]].__name__}?" if near else f"there are {names}"
    raise UsageError(f"{option} wants the name of {kind}, got {name!r}: {hint}")


def _plain(name: str) -> str:
    """A name in lower case, without - and _."""
    return re.sub(r"[-_ ]", "", name).lower()


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def read_value(name: str, text: str, kind: Any) -> Any:
    """The value of a text for a field with this type hint. UsageError if the text is no such value.

    A hint of several kinds takes the first that fits: "none" is None where None is one of them. Any, the hint of
    patterns, is a text, or a tuple of texts if there are commas."""
    if kind is Any:
        return tuple(part.strip() for part in text.split(",")) if "," in text else text
    kinds = _alternatives(kind)
    for one in kinds:
        found, value = _read(text, one)
        if found:
            return value
    wanted = " or ".join(dict.fromkeys(_describe(one) for one in kinds))
    raise UsageError(f"{name} wants {wanted}, got {text!r}")


def _alternatives(kind: Any) -> list[Any]:
    """The kinds of a hint such as int | None, with text last, since every text is one."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = list(typing.get_args(kind))
    else:
        kinds = [kind]
    return sorted(kinds, key=lambda one: one is str)


def _read(text: str, kind: Any) -> tuple[bool, Any]:
    """(True, value) if the text is a value of this kind, else (False, None)."""
    try:
        if kind is type(None):
            return text.lower() in ("none", "null", ""), None
        if kind is bool:
            return text.lower() in WORDS, WORDS.get(text.lower())
        if kind in (int, float):
            return True, kind(text)
        if kind is str:
            return True, text
        if typing.get_origin(kind) is typing.Literal:
            return text in typing.get_args(kind), text
        if typing.get_origin(kind) in (tuple, list) or kind in (tuple, list):
            return _read_several(text, kind)
    except ValueError:
        pass
    return False, None


def _read_several(text: str, kind: Any) -> tuple[bool, Any]:
    """(True, tuple or list) of the parts between commas, if each is of the kind that the hint names."""
    inner = [part for part in typing.get_args(kind) if part is not Ellipsis] or [str]
    parts = [part.strip() for part in text.split(",") if part.strip()]
    is_long = Ellipsis in typing.get_args(kind) or len(inner) == 1
    if not is_long and len(inner) != len(parts):
        return False, None
    values = []
    for i, part in enumerate(parts):
        found, value = _read(part, inner[0] if is_long else inner[i])
        if not found:
            return False, None
        values.append(value)
    is_list = list in (kind, typing.get_origin(kind))
    return True, values if is_list else tuple(values)


def _describe(kind: Any) -> str:
    """A kind of value in words."""
    if kind is type(None):
        return "none"
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if list in (kind, typing.get_origin(kind)) or tuple in (kind, typing.get_origin(kind)):
        return "values with commas between them"
    return IN_WORDS.get(kind, "a value that a command line cannot give")
