"""Exercises in CUDA C: the learner writes the body of a kernel of the library.  The check runs it on the CPU.

The laws of an exercise (see exercise.py) call a kernel as CuPy does, f(grid, block, (arguments)), on NumPy arrays.
Every call launches the kernel three times: once normally, once with other bytes in uninitialised memory, and once with
the threads in reverse order.  A correct kernel gives the same bits each time.
"""
from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.cuda.cpu_kernel import CpuKernel, KernelError, compiler, emulating
from ..kernels.cuda.launch import preamble
from .diagnose import Unusable
from .exercise import Exercise, WrongAnswer
from .loading import Refused

# A kernel is compiled once for each of these dtypes of its type T.  A launch takes the dtype of its first array.
DTYPES = (np.dtype(np.float32), np.dtype(np.float16))
ROOT = Path(__file__).parents[2]


class Kernel(Exercise):
    """An exercise in CUDA C.

    target: "kernels.cuda.bias:sum_rows" is the kernel sum_rows of kernels/cuda/bias.cu.  The comment above it is its
    docstring.
    """
    suffix = ".cu"
    is_op = False
    forbidden = ()

    @property
    def missing(self) -> str:
        """The reason why kernels cannot run on this machine, "" if they can."""
        try:
            compiler()
        except KernelError as e:
            return str(e)
        return ""

    # ── the library's kernel ─────────────────────────────────────────────────────────────────────────────────────────
    def text(self) -> str:
        """Comment, signature and body of the library's kernel."""
        return "".join(self._parts())

    def _parts(self) -> tuple[str, str, str]:
        return parts((ROOT / self.file).read_text(encoding="utf-8"), self.function)

    def reference(self) -> Callable:
        """The library's kernel, compiled."""
        return compiled(self.text(), self.function)

    def signature(self) -> inspect.Signature:
        """The parameters of a launch: (grid, block, args)."""
        with_self = inspect.signature(CheckedKernel.__call__)
        return with_self.replace(parameters=list(with_self.parameters.values())[1:])

    def source(self) -> str:
        return self.text().rstrip()

    def head(self) -> str:
        """The part of the kernel that the learner is given: comment and signature."""
        comment, signature, _ = self._parts()
        return comment + signature.rstrip()

    def statement(self) -> tuple[str, str]:
        """(signature, comment without its slashes)."""
        comment, signature, _ = self._parts()
        return signature.strip(), re.sub(r"^// ?", "", comment, flags=re.MULTILINE).strip()

    def answer_lines(self) -> int:
        body = without_comments(self._parts()[2])
        return self.lines or body.strip("{} \n").count("\n") + 1

    def skeleton(self) -> str:
        """The learner's file as `tinyft start` writes it: the kernel's comment and signature, with an empty body."""
        n = self.answer_lines()
        guide = self.guide()
        top = f"{self.first_line()}\n\n{guide}" if guide else self.first_line()
        comment = "\n".join(f"// {line}".rstrip() for line in top.splitlines())
        return f"""{comment}
//
// T stands for float or half.  The check launches it on the CPU, as a GPU would run it.

{self.head()} {{
  // yours to write, in about {n} line{"s" * (n > 1)}
}}
"""

    # ── the learner's answer ─────────────────────────────────────────────────────────────────────────────────────────
    def load(self, path: Path) -> str:
        """The text of the learner's file."""
        try:
            return path.read_text(encoding="utf-8-sig")      # Notepad writes a byte order mark
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else e
            raise Refused(f"{path.parent.name}/{path.name} cannot be read: {reason}") from None

    def usable(self, answer: Any) -> Callable:
        """The kernel of the learner's text, compiled.  If its body is empty, the function `unwritten`, which raises.

        Refused, with the reason, if the text has no kernel of this name, does not compile or has other parameters.
        """
        if not isinstance(answer, str):
            raise Refused(f"{self.name} is written in CUDA C: what is checked is the text of the kernel")
        if self.missing:
            raise Refused(self.missing)
        if not re.search(rf"\b{self.function}\s*\(", answer):
            raise Refused(f"it has no kernel {self.function}: the check launches it by that name")
        found = parts(answer, self.function)
        if found and not without_comments(found[2]).strip("{} \n"):
            return unwritten
        try:
            kernel = compiled(answer, self.function)
        except KernelError as e:
            raise Refused(str(e)) from None
        if kernel.parameters != self.reference().parameters:
            raise Refused(f"keep the parameters as they are:\n  {self._parts()[1].strip()}")
        return kernel

    def instead(self, belief: str, right: str, wrong: str, says: str, subtle: bool = False, size: int = 2) -> None:
        """Add a wrong answer: the library's kernel in which the text `wrong` replaces the text `right`.

        ValueError unless the kernel contains `right` exactly once.  belief, says, subtle, size: see WrongAnswer.
        """
        count = self.text().count(right)
        if count != 1:
            raise ValueError(f"{self.file} has {right!r} {count} times in {self.function}, not once")
        self.wrong_answers.append(WrongAnswer(belief, self.text().replace(right, wrong), says, subtle, size))


def parts(text: str, name: str) -> tuple[str, str, str] | tuple[()]:
    """(comment, signature, body) of the kernel `name` in some CUDA C; () if it is not there."""
    comment = r"((?:^//[^\n]*\n)*)"
    signature = rf'(^extern "C" __global__ void {name}\([^{{]*)'
    body = r"(\{.*?^\}\n?)"
    found = re.search(comment + signature + body, text, re.MULTILINE | re.DOTALL)
    return found.groups() if found else ()


def without_comments(text: str) -> str:
    """CUDA C without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def unwritten(grid: Sequence[int], block: Sequence[int], args: Sequence[Any]) -> None:
    """The kernel of a file whose body is still empty."""
    raise NotImplementedError


# ── launching ────────────────────────────────────────────────────────────────────────────────────────────────────────
@lru_cache(None)
def compiled(text: str, name: str) -> CheckedKernel:
    """The kernel `name` of a text, compiled once.  KernelError, with the line, if it does not compile."""
    return CheckedKernel(text, name)


class CheckedKernel:
    """A kernel compiled for each dtype of T, whose launches are repeated to find races and uninitialised reads."""

    def __init__(self, text: str, name: str):
        """Compile the kernel `name` of a text.  KernelError, with the line, if it does not compile."""
        self.kernels = {}
        line = f'#line 1 "{name}.cu"\n'                  # so the compiler's messages count the lines of `text`
        for dtype in DTYPES:
            self.kernels[dtype] = CpuKernel(f'{preamble((("T", dtype),))}{line}{text}', name)
        self.parameters = self.kernels[DTYPES[0]].parameters

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any]) -> None:
        """Launch on the arrays in `args`, which the kernel writes to, and twice more on copies of them.

        Raises Unusable if the launches differ, or if the emulator finds an error.  A GPU would report neither of them.
        """
        kernel = self.kernels[next(a.dtype for a in args if isinstance(a, np.ndarray))]
        # Poison is the value of every byte of memory that nobody wrote.
        other_poison = [_copied(a) for a in args]
        reverse_order = [_copied(a) for a in args]
        try:
            with emulating(reverse=False, poison=255):                   # as a float: NaN
                kernel(grid, block, args)
            with emulating(reverse=False, poison=64):                    # as a float: 3.0
                kernel(grid, block, other_poison)
            with emulating(reverse=True, poison=255):
                kernel(grid, block, reverse_order)
        except KernelError as e:
            raise Unusable(str(e)) from None
        for a, b, c in zip(args, other_poison, reverse_order):
            if isinstance(a, np.ndarray):
                _require_same(a, b, c)


def _copied(a: Any) -> Any:
    return a.copy() if isinstance(a, np.ndarray) else a


def _require_same(result: np.ndarray, other_poison: np.ndarray, reverse_order: np.ndarray) -> None:
    """Unusable unless one array has the same bits after three launches.

    other_poison: after the launch with other bytes in uninitialised memory.
    reverse_order: after the launch with the threads in reverse order.
    """
    if result.tobytes() != other_poison.tobytes():
        raise Unusable("the result depends on memory that nobody wrote: something was read too early "
                       "(is a __syncthreads() missing?), or from outside an array")
    if result.tobytes() != reverse_order.tobytes():
        i = tuple(int(k) for k in np.argwhere(result != reverse_order)[0])
        raise Unusable(f"the result depends on the order of the threads: at {list(i)} it is {result[i]:g}, and "
                       f"{reverse_order[i]:g} when they run in the reverse order: two write to one place, or one reads "
                       "what another has yet to write, a race")
