"""A claim of a source document, and how it is measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOLDS = "holds"
IN_PART = "holds in part"
NOT_AT_THIS_SIZE = "not at this size"  # wants a trend over three sizes
WRONG = "wrong as stated"
VERDICTS = (HOLDS, IN_PART, NOT_AT_THIS_SIZE, WRONG)
Numbers = dict[str, Any]  # what JSON can hold


@dataclass(frozen=True)
class Finding:
    """A verdict, one of VERDICTS, and the sentence with the figures that decide it.

    details: lines of Markdown below the table, such as a table of all measurements
    """

    verdict: str
    measured: str
    details: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"a verdict wants one of {', '.join(VERDICTS)}, got {self.verdict!r}")


@dataclass(frozen=True)
class Claim:
    """One claim.

    id          such as C07, the name of its file in capitals
    claim       the sentence of the source document, as short as its meaning allows
    source      the number of the document
    refuted_by  the result that would refute the claim, written down before the first run
    setup       models, data, seeds, and the meaning of an interval
    measure     () -> numbers, which JSON can hold: at most 20 minutes on two cores
    judge       numbers -> Finding
    """

    id: str
    claim: str
    source: str
    refuted_by: str
    setup: str
    measure: Callable[[], Numbers]
    judge: Callable[[Numbers], Finding]


def all_claims() -> dict[str, Claim]:
    """{id: claim} of every file c*.py of this folder, by id."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("c[0-9][0-9].py"))
    modules = [importlib.import_module(f"{__package__}.{name}") for name in names]
    return {module.CLAIM.id: module.CLAIM for module in modules}
