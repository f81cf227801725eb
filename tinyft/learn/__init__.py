"""The exercises: functions of the library to write again, checked by their laws.

    tinyft start · check · watch · hint · solution · ...     on the command line
    tinyft.check("autograd.sum_to", sum_to)                  in a notebook

An exercise is a function of the library (exercise.py), or a kernel in CUDA C (cuda.py).
Its skeleton is cut from the library's own source (sources.py).
Its laws are checked on the learner's function (checker.py) with inputs that grow (sizes.py).
A failure is explained (diagnose.py, show.py).
The exercises themselves stand beside their lessons (folders.py).  They need Hypothesis:  pip install "tinyft[lessons]".
"""
from __future__ import annotations

from collections.abc import Callable

from ..checks import brief
from ..keywords import checked_keywords

__all__ = ["check"]


@checked_keywords
def check(name: str, function: Callable | str) -> bool:
    """Check your own function (the text of a kernel) as the exercise `name`, and say what is wrong.

        tinyft.check("autograd.sum_to", sum_to)

    True if every law holds.  ValueError if there is no such exercise; TypeError if the name is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"check wants the name of an exercise, such as 'autograd.sum_to', got {brief(name)}")
    from .checker import check_here
    from .exercise import find
    from .show import Page
    return Page().report(find(name), check_here(find(name), function))
