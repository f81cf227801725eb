"""The contenders of a comparison, its settings and its presets. Learning rates are data: rates.json."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from .. import data, edit
from ..methods import BitFit, Full, Houlsby, LoRA, Partial, PrefixTuning, PromptTuning

__all__ = ["Contender", "Settings", "PRESETS", "PROMPT_ROWS", "contenders"]

PROMPT_ROWS = 16  # of prompt tuning's soft prompt: they take positions from the text
ALL_LINEAR = ("attn.[qkvo]", "mlp.up", "mlp.down")
METHODS: dict[str, edit.Method | None] = {
    "from scratch": None,
    "head only": Partial(k=0),
    "BitFit": BitFit(),
    "prompt (p=16)": PromptTuning(p=PROMPT_ROWS),
    "prefix (p=16)": PrefixTuning(p=16),
    "prefix, MLP": PrefixTuning(p=16, mlp=64),
    "LoRA (r=8; q, v)": LoRA(r=8, alpha=16),
    "LoRA (r=8; all)": LoRA(r=8, alpha=16, targets=ALL_LINEAR),
    "Houlsby (m=16)": Houlsby(m=16),
    "top block": Partial(k=1),
    "full": Full(),
}
CLASSES = {"intact": 2, "package": len(data.PACKAGES), "domain": 0}


@dataclass(frozen=True)
class Contender:
    """One row of the table: a method and its learning rate. Method None trains all parameters from random weights."""

    name: str
    method: edit.Method | None
    lr: float

    def is_called(self, name: str) -> bool:
        """True for the full name or its first word, such as "lora", in any case."""
        short = self.name.split(" (")[0].split(",")[0]
        return name.lower() in (self.name.lower(), short.lower())


@functools.cache
def learning_rates() -> dict[str, dict[str, float]]:
    """{task: {contender: learning rate}}."""
    return json.loads((Path(__file__).parent / "rates.json").read_text(encoding="utf-8"))


def contenders(task: str) -> list[Contender]:
    """Every method that applies to a task, with its learning rate."""
    rates = learning_rates()[task]
    return [Contender(name, method, rates[name]) for name, method in METHODS.items() if name in rates]


@dataclass(frozen=True)
class Settings:
    """The settings of a comparison.

    task    intact | package | domain
    model   a directory or a shipped base; "": base-bert, or base-gpt for domain
    train   training examples (tokens for domain)
    test    largest number of held-out examples (windows for domain), from the split `split`
    T       longest text in tokens
    names   contenders by full or short name; () means all
    """

    task: str = "intact"
    model: str = ""
    steps: int = 200
    seeds: int = 3
    train: int = 3000
    test: int = 1000
    batch: int = 32
    T: int = 64
    split: str = "test"
    names: tuple[str, ...] = ()

    @property
    def lm(self) -> bool:
        """True for language modelling, False for classification."""
        return self.task == "domain"

    @property
    def classes(self) -> int:
        """Number of classes; 0 for language modelling."""
        return CLASSES[self.task]

    @property
    def quality(self) -> str:
        """The metric by which contenders are compared."""
        return "perplexity" if self.lm else "accuracy"

    def chosen(self) -> list[Contender]:
        """The contenders to compare: those in `names`, or all, in METHODS' order. ValueError for an unknown name."""
        rows = contenders(self.task)
        if not self.names:
            return rows
        chosen = set()
        for name in self.names:
            found = [c.name for c in rows if c.is_called(name)]
            if not found:
                known = ", ".join(c.name for c in rows)
                raise ValueError(f"there is no method {name.lower()!r} to compare; there are {known}")
            chosen.update(found)
        return [c for c in rows if c.name in chosen]


PRESETS = {
    ("quick", "intact"): Settings("intact"),
    ("quick", "package"): Settings("package", train=1000),
    ("quick", "domain"): Settings("domain", steps=120, seeds=3, train=200_000, test=64, batch=16, T=112),
    ("full", "intact"): Settings("intact", steps=600, seeds=5, train=6000, test=3000),
    ("full", "package"): Settings("package", steps=600, seeds=5, train=3000, test=3000, T=96),
    ("full", "domain"): Settings("domain", steps=400, seeds=5, train=900_000, test=256, batch=16, T=112),
}
