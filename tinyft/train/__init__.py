"""Training and evaluation."""
from .batch import CrossEntropy, Loss, Targets, compute_loss, next_tokens, read_batch
from .evaluate import evaluate, perplexity
from .loop import Diverged, History, fit

__all__ = [
    "CrossEntropy", "Diverged", "History", "Loss", "Targets", "compute_loss", "evaluate", "fit", "next_tokens",
    "perplexity", "read_batch",
]
