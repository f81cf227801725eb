"""Training and evaluation."""
from .batch import CrossEntropy, Loss, Targets, compute_loss, next_tokens, read_batch
from .corpus import CorpusPerplexity, corpus_perplexity
from .evaluate import evaluate, perplexity
from .loop import Diverged, History, fit

__all__ = [
    "CorpusPerplexity", "CrossEntropy", "Diverged", "History", "Loss", "Targets", "compute_loss", "corpus_perplexity",
    "evaluate", "fit", "next_tokens", "perplexity", "read_batch",
]
