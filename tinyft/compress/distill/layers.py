"""A student that starts as layers of its teacher: shallower, and with the teacher's embeddings, norms and head.

    layer_map("spread", 12, 6) = [0, 2, 4, 7, 9, 11]           round(i (L − 1) / (m − 1)): DistilBERT's
    layer_map("every_other", 12, 6) = [0, 2, 4, 6, 8, 10]

Sanh et al. 2019, arXiv:1910.01108, and the code of its authors.
"""
from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ... import checks, edit
from ...keywords import checked_keywords
from ...nn import Module

MAPS = ("spread", "every_other")


def layer_map(kind: str | Sequence[int], L: int, m: int) -> list[int]:
    """The layers of a teacher with L layers from which the m layers of a student start, bottom to top.

    kind: "spread", evenly from the first to the last, round(i (L − 1) / (m − 1)) for i = 0 ... m − 1, and layer 0 for
    m = 1; "every_other", the first m of 0, 2, 4 ...; or a list or tuple of the m layers themselves. `round` is
    Python's: a half goes to the even number.

    ValueError unless 1 <= m <= L; if every other layer gives fewer than m; for another word; and for a list without m
    different layers of 0 ... L − 1 in rising order."""
    checks.whole("layer_map: L", L, least=1)
    checks.whole("layer_map: m", m, least=1, most=L)
    if isinstance(kind, (list, tuple)):
        layers = [checks.whole("layer_map: a layer", layer, least=0, most=L - 1) for layer in kind]
        if len(layers) != m or sorted(set(layers)) != layers:
            raise ValueError(f"layer_map wants {m} different layers, bottom to top, got {checks.brief(kind)}")
        return layers
    checks.one_of("layer_map: kind", kind, MAPS)
    if kind == "spread":
        return [int(layer) for layer in np.rint(np.linspace(0, L - 1, m))]
    if 2 * (m - 1) >= L:
        raise ValueError(f"layer_map: every other layer of {L} gives at most {(L + 1) // 2} layers, wanted {m}")
    return list(range(0, 2 * m, 2))


@checked_keywords
def student(
    teacher: Module, layers: int, kind: str | Sequence[int] = "spread", *, decoder_layers: int | None = None,
    token_types: bool = True,
) -> Module:
    """A model with the teacher's parameters, bit by bit, and `layers` of its blocks. The teacher stays as it is.

    kind            which blocks: see layer_map
    decoder_layers  of an encoder-decoder, the number of its decoder's blocks; None: `layers`, as in the encoder
    token_types     False: without the teacher's token types and pooler, as DistilBERT is (of a BERT)

    The student shares no memory with its teacher, and all its parameters train.
    TypeError for another teacher; ValueError for an attached method, for more layers than the teacher has, and for
    Switch layers that the student's blocks would not have at the same places."""
    edit.check_model("student", teacher)
    checks.flag("student: token_types", token_types)
    if edit.attached(teacher):
        raise ValueError(f"student wants a teacher without methods, got {edit.attached(teacher)[-1].name!r} attached: "
                         "merge it, or detach it")
    counts = {stack: layers for stack in teacher.stacks}
    sizes = {"layers": layers}
    if len(counts) > 1:
        counts["decoder"] = layers if decoder_layers is None else decoder_layers
        sizes["decoder_layers"] = counts["decoder"]
    elif decoder_layers is not None:
        raise ValueError("student: decoder_layers wants an encoder-decoder, got a "
                         f"{type(teacher).__name__}, which has one stack")
    chosen = {stack: layer_map(kind, len(paths), counts[stack]) for stack, paths in teacher.stacks.items()}
    config = dataclasses.replace(teacher.config, **sizes)
    for stack, picked in chosen.items():
        check_switch_places(teacher.config, len(teacher.stacks[stack]), picked)
    if not token_types and getattr(teacher, "type", None) is None:
        raise ValueError("student: token_types=False wants a teacher with token types, got one without")
    result = copy.deepcopy(teacher)
    for stack, blocks in block_lists(result).items():
        blocks[:] = [blocks[i] for i in chosen[stack]]
    if not token_types:
        config = dataclasses.replace(config, token_types=0, pooler_activation="relu")
        result.type = None
        result.pooler = None
    result._config = config
    for p in result.parameters():
        p.train(on=True)
        p.grad = None
    return result


def block_lists(model: Module) -> dict[str, list]:
    """{stack: the model's own list of its blocks, bottom to top}."""
    found = {}
    for stack, paths in model.stacks.items():
        name = paths[0].rpartition(".")[0]               # "blocks.0" -> "blocks"
        found[stack] = getattr(model, name)
    return found


def check_switch_places(teacher: Any, depth: int, chosen: list[int]) -> None:
    """ValueError unless block i of the student is a Switch layer where its configuration says so.

    teacher: its configuration.  depth: the blocks of a stack of the teacher; chosen: those that the student takes."""
    switch = getattr(teacher, "switch", None)
    if switch is None:
        return
    theirs = switch.layers(depth)
    ours = switch.layers(len(chosen))
    if [i for i, layer in enumerate(chosen) if layer in theirs] != ours:
        raise ValueError(f"student wants Switch layers at the blocks {ours} of a student with {len(chosen)} layers; "
                         f"the teacher's blocks {chosen} have them elsewhere")


def check_tokenizers(student: Tokenizer, teacher: Tokenizer) -> None:
    """ValueError, with a token that differs, unless two tokenizers give every token the same id.

    A teacher's logits are of its own tokens: with another vocabulary they teach nothing. TypeError for another kind."""
    for name, tokenizer in (("student", student), ("teacher", teacher)):
        checks.instance(f"check_tokenizers: {name}", tokenizer, Tokenizer, "a Tokenizer of the library tokenizers")
    ours = student.get_vocab()
    theirs = teacher.get_vocab()
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            raise ValueError("distillation wants a teacher with the student's tokenizer, got another one: the token "
                             f"{token[:40]!r} has the id {ours.get(token)} for the student and {theirs.get(token)} "
                             "for the teacher")
