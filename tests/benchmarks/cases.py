"""The cases: models, sizes, batches and methods, in plain numbers from which every side builds its own model."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """One case: vocabulary V, width C, layers L, heads H; batch B, time T.

    model   gpt | bert
    method  full, or a fine-tuning method of METHODS
    """

    name: str
    V: int
    C: int
    L: int
    H: int
    B: int
    T: int
    model: str = "gpt"
    method: str = "full"

    def as_dict(self) -> dict:
        """The fields, for JSON."""
        return asdict(self)


def small_case(name: str, model: str = "tinyft", T: int = 0) -> Case:
    """A case of side_small.py that is not a training step: `name` says what is measured, `model` which library."""
    return Case(name, 0, 0, 0, 0, 0, T, model, method=name)


def layer_case(out: int, width: int, tokens: int, library: str = "tinyft") -> Case:
    """A weight (out, width) with so many calibration tokens, of side_gptq.py: V is out, C the width, T the tokens."""
    return Case(f"{out} × {width}", out, width, 0, 0, 0, tokens, library, method="gptq")


def beam_cases(library: str = "tinyft") -> list[Case]:
    """Random Marians for side_beam.py: B sources of T tokens; the method is the number of beams."""
    sizes = {"small": (2048, 128, 3, 4, 16, 32), "mid": (8192, 256, 6, 8, 8, 48), "wide": (16384, 512, 6, 8, 8, 48)}
    return [Case(name, *size, library, method=beams) for beams in ("4", "1") for name, size in sizes.items()]


GPT = [
    Case("tiny", 65, 64, 2, 4, 8, 64),
    Case("small", 512, 128, 4, 4, 16, 128),
    Case("mid", 2048, 256, 6, 8, 8, 256),
    Case("wide", 5000, 768, 2, 12, 2, 256),
]
BERT = [
    Case("bert-small", 2048, 128, 4, 4, 16, 96, "bert"),
    Case("bert-mid", 2048, 256, 6, 8, 8, 192, "bert"),
]
METHODS = ["lora_qv", "lora_all", "bitfit", "houlsby", "prefix", "head"]
RANK = 8
ALPHA = 16
BOTTLENECK = 64
PREFIX = 10
CLASSES = 20


def batch(case: Case) -> dict[str, np.ndarray]:
    """The batch of a case, the same on every side.

    gpt    ids (B, T), and the next tokens as labels
    bert   rows of 50 to 100 % of T tokens; 15 % of the tokens have a label
    head   one label per row
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(0, case.V, (case.B, case.T + 1))
    if case.method == "head":
        return {"ids": ids[:, 1:], "labels": rng.integers(0, CLASSES, case.B)}
    if case.model == "gpt":
        return {"ids": ids[:, :-1], "labels": ids[:, 1:]}
    lengths = np.linspace(case.T // 2, case.T, case.B).astype(int)
    mask = np.arange(case.T) < lengths[:, None]
    labelled = mask & (rng.random(mask.shape) < 0.15)
    return {"ids": ids[:, 1:], "labels": np.where(labelled, ids[:, :-1], -100), "mask": mask}
