"""The option --student of `tinyft distill`: the student of a teacher.

    layers=2                         a copy of the teacher with two of its layers; --layers-from says which
    layers=4,decoder_layers=1        of an encoder-decoder, with one layer in the decoder
    layers=2,token_types=false       of a BERT, without token types and pooler, as DistilBERT is
    new,layers=2,width=64            random values, with the teacher's configuration but for these fields
    dense, dense,start=mean          a dense model of a teacher with Switch layers
    path/to/config.json              random values, with the sizes of this file
    path/to/folder                   a model that was trained before
"""
from __future__ import annotations

import dataclasses
import os

from tokenizers import Tokenizer

from ..compress.distill import check_tokenizers, dense_student, student
from ..compress.distill.layers import MAPS
from ..compress.distill.switch import STARTS
from ..formats.huggingface import classifier, new_model
from ..models import EncoderDecoder
from ..models.blocks import Classifier
from ..nn import Module, Packed
from ..predict import class_names
from .arguments import UsageError
from .opening import is_language_model, open_model
from .settings import read_fields, read_value

__all__ = ["check_student", "kind_of", "make_student"]


def make_student(spec: str, layers_from: str | None, teacher: Module, tokenizer: Tokenizer, seed: int) -> Module:
    """The student that --student and --layers-from describe. All its parameters train; the teacher stays as it is.

    UsageError for a description without sense; ValueError for a student that the teacher cannot teach."""
    first, *rest = [part.strip() for part in spec.split(",")]
    is_copy = "=" in first and not os.path.exists(spec)
    if layers_from is not None and not is_copy:
        raise UsageError(f"--layers-from wants a student of the teacher's layers, --student layers=2, got {spec}")
    if is_copy:
        made = _copy([first, *rest], layers_from, teacher)
    elif first == "new":
        made = _new(rest, teacher, seed)
    elif first == "dense":
        made = _dense(rest, teacher, seed)
    elif spec.endswith(".json"):
        made = _like(new_model(spec, seed), teacher, seed)
    else:
        made, own = open_model(spec, command="distill")
        check_tokenizers(own, tokenizer)
    check_student(made, teacher)
    return made


# ── the kinds of students ────────────────────────────────────────────────────────────────────────────────────────────
@dataclasses.dataclass(frozen=True)
class CopyFields:
    """The arguments of `student` that --student gives."""

    layers: int
    decoder_layers: int | None = None
    token_types: bool = True


def _copy(settings: list[str], layers_from: str | None, teacher: Module) -> Module:
    """A copy of the teacher with some of its layers."""
    known = [field.name for field in dataclasses.fields(CopyFields)]
    given = read_fields("--student", CopyFields, settings, known)
    if "layers" not in given:
        raise UsageError("--student wants the number of layers, such as layers=2; a student with other sizes begins "
                         "with new, such as new,width=64")
    for name, depth in zip(("layers", "decoder_layers"), map(len, teacher.stacks.values())):
        if (given.get(name) or 1) > depth:
            raise UsageError(f"--student wants at most {depth} {name}, as many as the teacher has, got {given[name]}")
    return student(teacher, kind=_read_map(layers_from), **given)


def _read_map(layers_from: str | None) -> str | tuple[int, ...]:
    """The layers that a student copies: the name of a map, or their numbers."""
    if layers_from is None:
        return MAPS[0]
    if layers_from in MAPS:
        return layers_from
    try:
        return read_value("--layers-from", layers_from, tuple[int, ...])
    except UsageError as e:
        raise UsageError(f"--layers-from wants {', '.join(MAPS)}, or layers such as 0,2,5, got {layers_from!r}") from e


def _new(settings: list[str], teacher: Module, seed: int) -> Module:
    """A model of the teacher's class with random values: its configuration with some other fields."""
    cls = type(teacher.config)
    known = [field.name for field in dataclasses.fields(cls) if field.name not in ("vocab", "switch")]
    given = read_fields("--student", cls, settings, known)
    try:
        config = dataclasses.replace(teacher.config, **given)
    except (TypeError, ValueError) as e:
        raise UsageError(f"--student: {e}") from e
    return _like(type(teacher)(config, seed), teacher, seed)


def _dense(settings: list[str], teacher: Module, seed: int) -> Module:
    """The dense model of a teacher with Switch layers."""
    start = STARTS[0]
    for setting in settings:
        key, _, start = setting.partition("=")
        if key != "start" or start not in STARTS:
            raise UsageError(f"--student dense wants start={' or start='.join(STARTS)}, got {setting!r}")
    return dense_student(teacher, start, seed)


def _like(made: Module, teacher: Module, seed: int) -> Module:
    """A new model with a head of the teacher's classes, if it is a classifier, and with their names."""
    if isinstance(teacher.head, Classifier):
        classifier(made, teacher.head.out_features, seed)
    made._kept_config = dict(getattr(teacher, "_kept_config", {}))
    return made


# ── checks ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def kind_of(model: Module) -> str:
    """The kind of a model in words. ValueError for one without a head, which has no outputs to learn."""
    if getattr(model, "head", None) is None:
        raise ValueError(f"distill wants models with a head, got a {type(model).__name__} without")
    if isinstance(model.head, Classifier):
        return f"a classifier of {', '.join(map(str, class_names(model, None)))}"
    if isinstance(model, EncoderDecoder):
        return "an encoder-decoder"
    return "a causal language model" if is_language_model(model) else "a masked language model"


def check_student(made: Module, teacher: Module) -> None:
    """ValueError unless student and teacher are of one kind and have one vocabulary, and the student can train."""
    ours, theirs = kind_of(made), kind_of(teacher)
    if ours != theirs:
        raise ValueError(f"distill wants a student of the teacher's kind, {theirs}, got {ours}")
    if made.embed.in_features != teacher.embed.in_features:
        raise ValueError(f"distill wants a student with the teacher's vocabulary of {teacher.embed.in_features} "
                         f"tokens, got {made.embed.in_features}")
    if any(isinstance(module, Packed) for module in made.modules()):
        raise ValueError("distill wants a student that trains, got one with packed weights: --student new,layers=2 "
                         "has values of its own")
