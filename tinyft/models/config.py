"""The configurations of the models: the names of their fields, and checks of their values."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import checks
from ..keywords import checked_keywords

__all__ = ["Config", "check_config"]


@checked_keywords
class Config:
    """The base of all configurations, frozen dataclasses: it refuses unknown keywords."""


def check_config(config: Any, sizes: Sequence[str], head_width: int | None = None) -> None:
    """Raise TypeError or ValueError, naming the field, unless a configuration describes a model that can be built.

    sizes: the names of the fields that are whole numbers of at least 1, width and heads among them.
    head_width: of a model whose heads have a width of their own; None: the heads divide the width."""
    name = type(config).__name__
    for size in sizes:
        checks.whole(f"{name}: {size}", getattr(config, size), least=1)
    if config.hidden is not None:
        checks.whole(f"{name}: hidden", config.hidden, least=1)
    if head_width is None and config.width % config.heads:
        raise ValueError(f"{name}: {config.heads} heads do not divide a width of {config.width}")
    checks.number(f"{name}: dropout", config.dropout, low=0, below=1)
    checks.number(f"{name}: eps", config.eps, low=0)
    checks.number(f"{name}: std", config.std, low=0)
