"""torch.compile's side: the plain model of side_torch.py, with forward and backward compiled.

The loss is compiled with the model. The optimiser is the same fused AdamW. torch.compile has its defaults: Inductor
writes C++ for all but the matrix products and attention. It wants a C++ compiler and the headers of Python, and
compiles in the first step, which is not timed.
"""

from __future__ import annotations

from collections.abc import Callable

import side_torch
import torch
from cases import Case
from side_torch import build, threads  # noqa: F401, of every side
from torch import _inductor, nn

_inductor.config.compile_threads = 1  # compile in this process: a pool of others would outlive it


def start(model: nn.Module, c: Case) -> tuple[Callable[[], float], int]:
    """(a function that takes one step and returns the loss, the number of trained parameters)."""
    return side_torch.start(model, c, torch.compile(side_torch.compute_loss))
