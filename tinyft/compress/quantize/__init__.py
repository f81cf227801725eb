"""Rules that give every weight fewer bits: one file per paper."""
from .awq import AWQ
from .gptq import GPTQ
from .int8 import Int8, LLMInt8
from .nf4 import E2M1, FP4, NF4, Dynamic8
from .obq import OBQ
from .qat import LSQ, QAT, pack
from .rtn import RTN
from .smoothquant import smooth

__all__ = [
    "AWQ", "E2M1", "FP4", "GPTQ", "LSQ", "NF4", "OBQ", "QAT", "RTN", "Dynamic8", "Int8", "LLMInt8", "pack",
    "smooth",
]
