"""make claims: measure claims of the source documents; the results are results/claims/*.json and results/claims.md.

    make claims                         every claim, at most 20 minutes each
    make claims ARGS="--only C07,C08"   these claims; the rows of the others stay
    make claims ARGS=--page             claims.md again, from the stored numbers
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from machine import machine

from .claim import Claim, all_claims
from .page import LIMIT, RESULTS, core_seconds, result_of, write_page, write_result


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options. An unknown claim ends the program."""
    p = argparse.ArgumentParser(prog="make claims", description=__doc__.splitlines()[0])
    p.add_argument("--only", help="some claims, such as C07,C08")
    p.add_argument("--page", action="store_true", help="measure nothing; write claims.md from the stored numbers")
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of claims.md and claims/*.json")
    options = p.parse_args(arguments)
    known = all_claims()
    options.only = options.only.upper().split(",") if options.only else list(known)
    unknown = [name for name in options.only if name not in known]
    if unknown:
        p.error(f"--only wants some of {', '.join(known)}, got {', '.join(unknown)}")
    return options


def run(claim: Claim, out: Path) -> None:
    """Measure one claim, and write its result and the page."""
    print(f"-- {claim.id}: {claim.claim}\n   refuted by: {claim.refuted_by}", flush=True)
    about = machine()
    start = time.perf_counter()
    numbers = claim.measure()
    seconds = time.perf_counter() - start
    result = result_of(claim, numbers, seconds, about)
    write_result(result, out)
    write_page(out)
    print(f"   {result['verdict']}: {result['measured']}  ({seconds:.0f} s)", flush=True)
    if core_seconds(result) > LIMIT:
        print(f"   a claim may take {LIMIT} s of one core, this one took {core_seconds(result):.0f} s", flush=True)


def judge_again(claim: Claim, out: Path) -> None:
    """The verdict, the summary and the details of a stored measurement, computed again from its numbers."""
    path = out / "claims" / f"{claim.id}.json"
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        write_result(result_of(claim, old["numbers"], old["seconds"], old["machine"]), out)


def main(arguments: list[str] | None = None) -> None:
    """The program."""
    options = parse(arguments)
    claims = all_claims()
    for name in options.only:
        if options.page:
            judge_again(claims[name], options.out)
        else:
            run(claims[name], options.out)
    write_page(options.out)


if __name__ == "__main__":
    sys.exit(main())
