"""A Switch model into a dense one.  Fedus, Zoph, Shazeer 2021, §4.2 "Distillation".  arXiv:2101.03961

    student = dense_student(teacher)                            all parts of the teacher but its experts
    loss = Hinton(teacher, temperature=1, soft=0.25)            L = 0.75 CE(y, p_s) + 0.25 KL(p_t ‖ p_s)

The student has the teacher's embeddings, attention, norms and dense feed-forwards. The feed-forwards in the place of
the Switch layers start anew. The teacher evaluates with its eval_capacity; each row has its own, so its outputs do not
depend on the batch. With eval_capacity >= E it drops no token.

Departures: the start from the mean of the experts, or from one of them, is ours.
"""
from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np

from ... import array, checks, edit
from ...keywords import checked_keywords
from ...models.moe import SwitchMLP
from ...nn import Module
from .layers import block_lists

STARTS = ("new", "mean")


@checked_keywords
def dense_student(teacher: Module, start: str | Sequence[int] = "new", seed: int = 0) -> Module:
    """The dense model of a Switch model: its parameters, bit by bit, and one MLP in the place of a layer's experts.

    start   "new": MLPs with random values from `seed`, as in the paper; "mean": the mean of a layer's experts; or the
            number of one expert for each Switch layer, bottom to top

    The teacher stays as it is, and all parameters of the student train. With one expert, "mean" gives a student that is
    the teacher. TypeError for another teacher; ValueError for a model without Switch layers, for an attached method,
    and for experts that are not there."""
    edit.check_model("dense_student", teacher)
    checks.whole("dense_student: seed", seed, least=0)
    if edit.attached(teacher):
        raise ValueError(f"dense_student wants a teacher without methods, got {edit.attached(teacher)[-1].name!r} "
                         "attached: merge it, or detach it")
    counts = [len(block.mlp.experts) for block in switch_blocks(teacher)]
    if not counts:
        raise ValueError(f"dense_student wants a model with Switch layers, got a {type(teacher).__name__} without")
    start = check_start(start, counts)
    config = dataclasses.replace(teacher.config, switch=None)
    student = copy.deepcopy(teacher)
    if start == "new":
        like = next(iter(teacher.named_parameters().values()))
        new = type(teacher)(config, seed).to(backend=array.name_of(like.data), dtype=like.dtype)
        for name, blocks in block_lists(student).items():
            for block, new_block in zip(blocks, block_lists(new)[name]):
                if isinstance(block.mlp, SwitchMLP):
                    block.mlp = new_block.mlp
    for n, block in enumerate(switch_blocks(student)):   # none is left after "new"
        experts = block.mlp.experts
        block.mlp = mean_of(experts) if start == "mean" else experts[start[n]]
    student._config = config
    for p in student.parameters():
        p.train(on=True)
        p.grad = None
    return student


def switch_blocks(model: Module) -> list[Module]:
    """The blocks with a Switch layer, stack by stack, bottom to top."""
    found = []
    for blocks in block_lists(model).values():
        found += [block for block in blocks if isinstance(block.mlp, SwitchMLP)]
    return found


def check_start(start: str | Sequence[int], counts: list[int]) -> str | list[int]:
    """`start` of dense_student, for Switch layers with these numbers of experts. ValueError if it makes no sense."""
    if not isinstance(start, (list, tuple)):
        return checks.one_of("dense_student: start", start, STARTS)
    if len(start) != len(counts):
        raise ValueError(f"dense_student wants one expert for each of the {len(counts)} Switch layers, "
                         f"got {len(start)}")
    return [checks.whole("dense_student: an expert", i, 0, count - 1) for i, count in zip(start, counts)]


def mean_of(experts: list[Module]) -> Module:
    """The first expert, with the mean of all experts' values in each of its tensors; means in float64."""
    mlp = experts[0]
    for name, p in mlp.named_parameters().items():
        values = [array.asnumpy(expert.named_parameters()[name].data).astype(np.float64) for expert in experts]
        p.copy_(np.mean(values, axis=0))
    return mlp
