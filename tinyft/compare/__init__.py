"""The comparison of methods on one task."""

from .run import compare
from .settings import PRESETS, Contender, Settings, contenders, split_names

__all__ = ["PRESETS", "Contender", "Settings", "compare", "contenders", "split_names"]
