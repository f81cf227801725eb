"""Accounting: the bytes and the operations of training and of generation, for models that may have no weights yet.

    memory         the bytes of fit, by running it on arrays without numbers (training.py)
    largest_batch  the largest batch whose training fits a budget
    inference      weights, cache and operations of generation (inference.py)
    formulas.py    closed forms: of this library, and of Korthikanti et al. 2022
    configs.py     the sizes of well-known models
"""
from .configs import CONFIGS
from .inference import Inference, inference
from .training import Memory, largest_batch, memory

__all__ = ["CONFIGS", "Inference", "Memory", "inference", "largest_batch", "memory"]
