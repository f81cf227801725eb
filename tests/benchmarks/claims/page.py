"""results/claims/*.json, one file for each claim, and results/claims.md, made from these files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from machine import place
from report import table

from .claim import Claim, Numbers

RESULTS = Path(__file__).parents[1] / "results"
LIMIT = 2400  # seconds of one core that a claim may take: 20 minutes on two
HEAD = """# Numbers of the source documents, measured here

Written by `make claims`, which runs for hours; `make claims ARGS="--only C07"` measures one claim again. Each verdict
is computed from the numbers in [claims/](claims). The result that would refute a claim was written down before its
first run. The machine and the versions of a measurement stand below it.
"""


def result_of(claim: Claim, numbers: Numbers, seconds: float, machine: dict[str, Any]) -> dict[str, Any]:
    """A measured claim as JSON can hold it, with its verdict."""
    finding = claim.judge(numbers)
    return {
        "id": claim.id,
        "claim": claim.claim,
        "source": claim.source,
        "refuted_by": claim.refuted_by,
        "setup": claim.setup,
        "verdict": finding.verdict,
        "measured": finding.measured,
        "details": list(finding.details),
        "seconds": round(seconds, 1),
        "machine": machine,
        "numbers": numbers,
    }


def core_seconds(result: dict[str, Any]) -> float:
    """The seconds of a measurement times its cores, of which two count at most."""
    return result["seconds"] * min(result["machine"]["cores"], 2)


def write_result(result: dict[str, Any], out: Path) -> None:
    """Write the JSON file of one claim below the folder `out`."""
    folder = out / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / f"{result['id']}.json").write_text(text + "\n", encoding="utf-8")


def read_results(out: Path) -> list[dict[str, Any]]:
    """The stored results of all claims, by id."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "claims").glob("C*.json"))]


def command(result: dict[str, Any]) -> str:
    """The command that measures a claim again."""
    return f'`make claims ARGS="--only {result["id"]}"`'


def about(result: dict[str, Any]) -> str:
    """The machine and the versions of one measurement."""
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return f"*{m['date']}, commit {m['commit']}, {result['seconds']:.0f} s; {place(m)}; {versions}.*"


def page(results: list[dict[str, Any]]) -> str:
    """claims.md: the table of all claims, then a section for each."""
    rows = []
    for r in results:
        rows.append([r["id"], r["claim"], r["source"], r["measured"], command(r), f"**{r['verdict']}**"])
    lines = [HEAD, *table(["", "claim", "source", "measured here", "command", "verdict"], rows)]
    for r in results:
        lines += [f"## {r['id']}: {r['claim']}", "", f"**It would be refuted by:** {r['refuted_by']}", ""]
        lines += [f"**Measured:** {r['setup']}", "", f"**Result, {r['verdict']}:** {r['measured']}", ""]
        lines += [*r["details"], "", about(r), ""]
    return "\n".join(lines).rstrip() + "\n"


def write_page(out: Path) -> None:
    """Write claims.md into the folder `out`, from the JSON files below it."""
    (out / "claims.md").write_text(page(read_results(out)), encoding="utf-8")
