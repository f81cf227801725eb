"""The contenders of a comparison, its settings and its presets. Learning rates are data: rates.json."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

from .. import checks, data, edit
from ..data.tasks import HELD_OUT_T, HELD_OUT_WINDOWS
from ..methods import BitFit, Full, Houlsby, LoRA, Partial, PrefixTuning, PromptTuning

__all__ = ["Contender", "Settings", "PRESETS", "PROMPT_ROWS", "contenders", "split_names"]

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
# The contenders of the presets: one or two of each family of methods, by full name. It stays short when METHODS grows,
# so that a preset's time does not grow with the library.
FEW = (
    "from scratch", "BitFit", "top block", "full",  # selective, and what they are compared with
    "prompt (p=16)", "Houlsby (m=16)",  # additive
    "LoRA (r=8; all)",  # reparameterized
)  # fmt: skip
CLASSES = {"intact": 2, "package": len(data.PACKAGES), "domain": 0}


@dataclass(frozen=True)
class Contender:
    """One row of the table: a method and its learning rate. Method None trains all parameters from random weights."""

    name: str
    method: edit.Method | None
    lr: float

    @property
    def family(self) -> str:
        """The family of the method, such as "additive": the folder of its file. "" without a method."""
        if self.method is None:
            return ""
        return type(self.method).__module__.split(".")[-2]

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


def split_names(text: str, task: str) -> tuple[str, ...]:
    """The contenders of a task that are named in a text such as "lora, prefix, MLP, full"; () for "all".

    Names are separated by commas. A full name may hold commas itself, so the longest name that exists is taken first.
    ValueError for an unknown name, with all that exist.
    """
    if text.strip().lower() == "all":
        return ()
    parts = [part.strip() for part in text.split(",")]
    names = []
    start = 0
    while start < len(parts):
        end = len(parts)
        while end > start + 1 and not called(", ".join(parts[start:end]), task):
            end -= 1
        name = ", ".join(parts[start:end])
        if not called(name, task):
            raise unknown_name(name, task)
        names.append(name)
        start = end
    return tuple(names)


def called(name: str, task: str) -> list[str]:
    """The full names of the contenders of a task that a full or short name means; [] if there is none."""
    return [c.name for c in contenders(task) if c.is_called(name)]


def unknown_name(name: str, task: str) -> ValueError:
    """The error for a name that no contender of a task has."""
    known = ", ".join(c.name for c in contenders(task))
    return ValueError(f"there is no method {checks.brief(name)} to compare on {task}; there are {known}")


@dataclass(frozen=True)
class Settings:
    """The settings of a comparison.

    task    domain | intact | package
    model   a directory or a shipped base; "": base-gpt for domain, base-bert for the others
    steps   training steps of each contender
    seeds   number of runs of each contender
    train   training tokens for domain, training examples for the others
    test    largest number of held-out windows for domain, of held-out examples for the others, from the split `split`
    batch   windows or examples in a training batch
    T       tokens of a window for domain; longest text in tokens for the others
    names   contenders by full or short name; () means all
    """

    task: str = "domain"
    model: str = ""
    steps: int = 100
    seeds: int = 3
    train: int = 200_000
    test: int = HELD_OUT_WINDOWS
    batch: int = 16
    T: int = HELD_OUT_T
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

    def check(self) -> None:
        """Raise TypeError or ValueError, in one sentence, for a value that no comparison can have."""
        checks.one_of("task", self.task, tuple(CLASSES))
        checks.one_of("split", self.split, data.SPLITS)
        for name in ("steps", "train", "test", "batch"):
            checks.whole(name, getattr(self, name), least=1)
        checks.whole("seeds", self.seeds, least=1, most=MOST_SEEDS)
        checks.whole("T", self.T, least=2)
        if self.lm and self.train < self.T:
            raise ValueError(f"train wants at least {self.T} tokens for {self.task}, one window, got {self.train}")
        self.chosen()

    def chosen(self) -> list[Contender]:
        """The contenders to compare: those in `names`, or all, in METHODS' order. ValueError for an unknown name."""
        rows = contenders(self.task)
        if not self.names:
            return rows
        chosen = set()
        for name in self.names:
            found = called(name, self.task)
            if not found:
                raise unknown_name(name, self.task)
            chosen.update(found)
        return [c for c in rows if c.name in chosen]


MOST_SEEDS = 100  # more would take days
CLASSIFIERS = ("head only", *FEW)  # a language model has no head to train alone
INTACT = Settings("intact", steps=200, train=3000, test=1000, batch=32, T=64, names=CLASSIFIERS)
PACKAGE = replace(INTACT, task="package", train=1000)
PRESETS = {
    ("quick", "domain"): Settings("domain", names=FEW),
    ("quick", "intact"): INTACT,
    ("quick", "package"): PACKAGE,
    ("full", "domain"): Settings("domain", steps=400, seeds=5, train=900_000, names=FEW),
    ("full", "intact"): replace(INTACT, steps=600, seeds=5, train=6000, test=3000),
    ("full", "package"): replace(PACKAGE, steps=600, seeds=5, train=3000, test=3000, T=96),
}
