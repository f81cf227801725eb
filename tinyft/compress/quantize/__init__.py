"""Rules that give every weight fewer bits: one file per paper."""
from .gptq import GPTQ
from .obq import OBQ
from .rtn import RTN

__all__ = ["GPTQ", "OBQ", "RTN"]
