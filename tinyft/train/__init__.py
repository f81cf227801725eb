"Training and evaluation."
from .batch import Targets, compute_loss, next_tokens, read_batch
from .loop import Diverged, History, evaluate, fit, perplexity

__all__ = [
    "Diverged", "History", "Targets", "compute_loss", "evaluate", "fit", "next_tokens", "perplexity", "read_batch",
]
