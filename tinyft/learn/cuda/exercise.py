"""Exercises in CUDA C: a kernel of the library with its body taken out.  The learner's file is CUDA C as well, and runs on the CPU.

The laws call it as CuPy does, f(grid, block, (arguments)), on NumPy arrays.  Every launch happens three times: once more with the threads
in the reverse order, and once more with another poison in the memory that nobody wrote.  A right kernel gives the same bits.
"""
from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.cuda.launch import preamble
from .. import skeleton, subject
from ..diagnose import Unusable
from ..exercise import Exercise, Wrong
from ..subject import Refused
from .cpu_kernel import CpuKernel, KernelError, compiler

TYPES = (np.dtype(np.float32), np.dtype(np.float16))     # what T may be: the dtype of the first array
PACKAGE = Path(__file__).parents[2]


class Kernel(Exercise):
    'target: "kernels.cuda.bias:sum_rows" is the kernel sum_rows of kernels/cuda/bias.cu, with the comment above it for a docstring.'
    suffix, is_op, shut = ".cu", False, ()

    @property
    def missing(self) -> str:
        try:
            compiler()
        except KernelError as e:
            return str(e)
        return ""

    def text(self) -> str:
        "The library's own: comment, signature and body."
        return "".join(parts((PACKAGE.parent / self.file).read_text(encoding="utf-8"), self.function))

    def reference(self) -> Callable:
        return built(self.text(), self.function)

    def signature(self) -> inspect.Signature:
        return inspect.signature(Built.__call__).replace(parameters=list(inspect.signature(Built.__call__).parameters.values())[1:])

    def usable(self, function: Any) -> Callable:
        if not isinstance(function, str):
            raise Refused(f"{self.name} is written in CUDA C: what is checked is the text of the kernel")
        if self.missing:
            raise Refused(self.missing)
        if not re.search(rf"\b{self.function}\s*\(", function):
            raise Refused(f"it has no kernel {self.function}: the check launches it by that name")
        if parts(function, self.function) and not _bare(parts(function, self.function)[2]).strip("{} \n"):
            return unwritten
        try:
            mine = built(function, self.function)
        except KernelError as e:
            raise Refused(str(e)) from None
        if mine.kernels[TYPES[0]].parameters != self.reference().kernels[TYPES[0]].parameters:
            raise Refused(f"keep the parameters as they are:\n  {parts(self.text(), self.function)[1].strip()}")
        return mine

    def instead(self, belief: str, right: str, wrong: str, says: str, subtle: bool = False) -> None:
        "A wrong answer: the library's text, with something else in the place of `right`."
        if self.text().count(right) != 1:
            raise ValueError(f"{self.file} has {right!r} {self.text().count(right)} times in {self.function}, not once")
        self.wrong.append(Wrong(belief, self.text().replace(right, wrong), says, subtle))


def parts(text: str, name: str) -> tuple[str, str, str]:
    "(comment, signature, body) of a kernel; empty if it is not there."
    found = re.search(rf'((?:^//[^\n]*\n)*)(^extern "C" __global__ void {name}\([^{{]*)(\{{.*?^\}}\n?)', text, re.MULTILINE | re.DOTALL)
    return found.groups() if found else ()


def _bare(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def unwritten(grid: Sequence[int], block: Sequence[int], args: Sequence[Any]) -> None:
    raise NotImplementedError


# ── launching ────────────────────────────────────────────────────────────────────────────────────────────────────────
@lru_cache(None)
def built(text: str, name: str) -> Built:
    return Built(text, name)


class Built:
    "A kernel, compiled for every T.  KernelError, with the line, if it cannot be."

    def __init__(self, text: str, name: str):
        self.kernels = {t: CpuKernel(preamble((("T", t),)) + f'#line 1 "{name}.cu"\n{text}', name) for t in TYPES}

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any]) -> None:
        "Works on the arrays in place.  Unusable, in a sentence, where a device would be wrong in silence."
        kernel = self.kernels[next(a.dtype for a in args if isinstance(a, np.ndarray))]
        copies = [[a.copy() if isinstance(a, np.ndarray) else a for a in args] for _ in range(2)]
        try:
            for (reverse, poison), given in zip(((0, 255), (0, 64), (1, 255)), (args, *copies)):      # as floats: NaN, and 3.0
                with emulating(reverse, poison):
                    kernel(grid, block, given)
        except KernelError as e:
            raise Unusable(str(e)) from None
        for one, other, reversed_ in zip(args, *copies):
            if isinstance(one, np.ndarray):
                if one.tobytes() != other.tobytes():
                    raise Unusable("the result depends on memory that nobody wrote: something was read too early (is a __syncthreads() missing?), "
                                   "or from outside an array")
                if one.tobytes() != reversed_.tobytes():
                    i = tuple(int(k) for k in np.argwhere(one != reversed_)[0])
                    raise Unusable(f"the result depends on the order of the threads: at {list(i)} it is {one[i]:g}, and {reversed_[i]:g} when they "
                                   "run in the reverse order: two write to one place, or one reads what another has yet to write, a race")


@contextlib.contextmanager
def emulating(reverse: int, poison: int) -> Iterator[None]:
    "The order of the threads, and what shared memory is filled with."
    new = {"EMU_REVERSE": str(reverse), "EMU_POISON": str(poison)}
    old = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# ── the learner's file ───────────────────────────────────────────────────────────────────────────────────────────────
@skeleton.statement.register
def _(exercise: Kernel) -> tuple[str, str]:
    comment, signature, _ = parts(exercise.text(), exercise.function)
    return signature.strip(), re.sub(r"^// ?", "", comment, flags=re.MULTILINE).strip()


@skeleton.source.register
def _(exercise: Kernel, target: str = "") -> str:
    return exercise.text().rstrip()


@skeleton.head.register
def _(exercise: Kernel) -> tuple[str, int]:
    comment, signature, body = parts(exercise.text(), exercise.function)
    return comment + signature.rstrip(), exercise.lines or _bare(body).strip("{} \n").count("\n") + 1


@skeleton.skeleton.register
def _(exercise: Kernel) -> str:
    top, lines = skeleton.head(exercise)
    return f"""// {skeleton.title(exercise)}
// T stands for float or half.  The check launches it on the CPU, as a GPU would run it.

{top} {{
  // yours to write, in about {lines} line{'s' * (lines > 1)}
}}
"""


@subject.load.register
def _(exercise: Kernel, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise Refused(f"{path.parent.name}/{path.name} cannot be read: {e}") from None
