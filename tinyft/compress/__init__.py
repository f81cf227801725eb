"""Compression: packed weights in the place of dense ones.

    compress        every linear map of a model, layer by layer (layerwise.py, calibrate.py)
    distill/        losses with a teacher, and students that start from it
    quantize/       the rules, (W, H) -> Packed, one file per paper
    grids.py        the values that a weight of few bits may take
    packing.py      codes of 1 to 8 bits in a stream of bytes
    coded.py        packed weights of codes and scales
    grouped.py      those with a scale for each group
    codebooks.py    NF4 and other data types of few values, double quantization
    ggml.py         the block formats of GGUF files
"""
from .codebooks import Codebook
from .distill import (
    DistilBERTLoss,
    Hinton,
    Interpolation,
    SequenceLevel,
    TeacherBeams,
    TeacherCache,
    TinyBERTLoss,
    WordLevel,
    dense_student,
    sentence_bleu,
    student,
)
from .ggml import FORMATS, Q4_0, Q4_1, Q8_0
from .grouped import Uniform
from .layerwise import LayerReport, compress
from .quantize import AWQ, E2M1, FP4, GPTQ, LSQ, NF4, OBQ, QAT, RTN, Dynamic8, Int8, LLMInt8, pack, smooth
from .rule import Rule

__all__ = [
    "AWQ", "E2M1", "FORMATS", "FP4", "GPTQ", "LSQ", "NF4", "OBQ", "Q4_0", "Q4_1", "Q8_0", "QAT", "RTN", "Codebook",
    "DistilBERTLoss", "Dynamic8", "Hinton", "Int8", "Interpolation", "LLMInt8", "LayerReport", "Rule", "SequenceLevel",
    "TeacherBeams", "TeacherCache", "TinyBERTLoss", "Uniform", "WordLevel", "compress", "dense_student", "pack",
    "sentence_bleu", "smooth", "student",
]
