"The comparison of methods on one task."
from .run import PRESETS, Settings, compare, contenders

__all__ = ["PRESETS", "Settings", "compare", "contenders"]
