"""Real text, four tasks on it, batches, and simple baselines."""

from .batches import (
    IGNORE,
    Batches,
    Examples,
    encode,
    lm_batches,
    mlm,
    mlm_batches,
    pad,
    text_batches,
    windows,
)
from .names import NamePair, Pairs, name_pairs, read_name
from .sources import source_batches
from .tasks import PACKAGES, Task, held_out_batches, mask_names, sentences, stretch, swap_two, task
from .text import SPECIAL, SPLITS, Record, key, pretraining, shipped_tokenizer, snapshot

__all__ = [
    "IGNORE", "PACKAGES", "SPECIAL", "SPLITS", "Batches", "Examples", "NamePair", "Pairs", "Record", "Task", "encode",
    "held_out_batches", "key", "lm_batches", "mask_names", "mlm", "mlm_batches", "name_pairs", "pad", "pretraining",
    "read_name", "sentences", "shipped_tokenizer", "snapshot", "source_batches", "stretch", "swap_two", "task",
    "text_batches", "windows",
]
