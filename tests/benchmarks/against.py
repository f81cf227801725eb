"""This working tree beside an earlier commit, in pairs:  bench.py --against COMMIT

COMMIT is checked out as a second git worktree in a temporary folder. For every case both trees run in worker processes
of their own, in turns, and the order alternates from pair to pair. Each ratio new / old is of one pair. The processes
are started anew every few pairs, because the memory layout of a process changes its speed by some percent.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cases import BERT, GPT, Case, small_case
from paired import ROOT, Side, rounds, summary

PAIRS_PER_PROCESS = 5
TRAINING = [*GPT[:3], BERT[1]]  # tiny, small, mid, bert-mid
SMALL = ("op", "attention", "optimizer", "fit", "generate", "load", "import")


@dataclass(frozen=True)
class Measurement:
    """One case on a number of threads, by the side file `side_<kind>.py`."""

    kind: str  # "tinyft" (a training step) | "small"
    case: Case
    threads: int

    @property
    def name(self) -> str:
        """The name in the table."""
        if self.kind == "small":
            return self.case.name
        return f"{self.case.name}, {self.case.method}, {self.threads} thread{'s' * (self.threads > 1)}"


def measurements(threads: list[int]) -> list[Measurement]:
    """All cases: training steps, full and LoRA, on each number of threads; then the small ones on one thread."""
    cases = []
    for count in threads:
        for case in TRAINING:
            for method in ("full", "lora_qv"):
                cases.append(Measurement("tinyft", replace(case, method=method), count))
    return cases + [Measurement("small", small_case(name), 1) for name in SMALL]


@contextlib.contextmanager
def checkout(commit: str, root: Path = ROOT) -> Iterator[Path]:
    """A second worktree of the repository at a commit, in a temporary folder that is removed at the end.

    ValueError if the commit does not exist.
    """
    git = ["git", "-C", str(root)]
    known = subprocess.run([*git, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"], capture_output=True)
    if known.returncode:
        raise ValueError(f"--against wants a commit of {root}, got {commit!r}")
    with tempfile.TemporaryDirectory(prefix="tinyft-against-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def measure(measurement: Measurement, old_tree: Path, pairs: int, new_tree: Path = ROOT) -> list[float]:
    """`pairs` ratios new / old of the seconds of a step."""
    ratios = []
    while len(ratios) < pairs:
        count = min(PAIRS_PER_PROCESS, pairs - len(ratios))
        sides = [("new", new_tree), ("old", old_tree)]
        if (len(ratios) // PAIRS_PER_PROCESS) % 2:
            sides.reverse()  # the other side starts first
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(start(measurement, label, tree)) for label, tree in sides]
            check_same_work(measurement, opened)
            ratios += [times["new"] / times["old"] for times in rounds(opened, count)]
    return ratios


def start(measurement: Measurement, label: str, tree: Path) -> Side:
    """A worker process with the tinyft of a tree. RuntimeError if it imported another tinyft."""
    side = Side(measurement.kind, measurement.case, measurement.threads, label, tree=tree)
    package = side.about["package"]
    if package is not None and not Path(package).resolve().is_relative_to(tree.resolve()):
        side.__exit__()
        raise RuntimeError(f"the {label} side wants the tinyft of {tree}, got {package}")
    return side


def check_same_work(measurement: Measurement, sides: list[Side]) -> None:
    """RuntimeError if the first losses or the numbers of trained parameters of the sides differ."""
    first, second = (side.about for side in sides)
    equal = all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(first["losses"], second["losses"], strict=True))
    if not equal or first["trained"] != second["trained"]:
        raise RuntimeError(f"{measurement.name}: the sides do different work: {first} and {second}")


def format_row(name: str, ratios: list[float]) -> str:
    """One line of the table: median, quartiles, number of pairs."""
    s = summary(ratios)
    return f"{name:<28} {s['ratio']:.3f}  ({s['low']:.3f}-{s['high']:.3f})  {s['rounds']} pairs"


def conclusion(results: dict[str, list[float]]) -> list[str]:
    """The median of all ratios, and the case with the largest median."""
    medians = {name: statistics.median(ratios) for name, ratios in results.items()}
    worst = max(medians, key=medians.get)
    everything = [ratio for ratios in results.values() for ratio in ratios]
    return [
        f"median of all ratios {statistics.median(everything):.3f}",
        f"worst {medians[worst]:.3f} ({worst})",
    ]


def run(commit: str, pairs: int, threads: list[int], only: list[str] | None = None) -> dict[str, list[float]]:
    """{case: ratios new / old}, printed case by case.  `only`: the cases whose names begin with one of these texts."""
    chosen = measurements(threads)
    if only is not None:
        chosen = [m for m in chosen if m.name.startswith(tuple(only))]
    if not chosen:
        names = ", ".join(m.name for m in measurements(threads))
        raise ValueError(f"--only wants the start of a case's name, got {','.join(only)}; there are {names}")
    results = {}
    with checkout(commit) as old_tree:
        for measurement in chosen:
            results[measurement.name] = measure(measurement, old_tree, pairs)
            print(format_row(measurement.name, results[measurement.name]), flush=True)
    print("\n".join(conclusion(results)), flush=True)
    return results


def page(results: dict[str, list[float]], commit: str, machine: dict) -> str:
    """results/against.md."""
    lines = [
        f"# This tree beside {commit}",
        "",
        "Written by `bench.py --against COMMIT --write`. A ratio is time new / time old of one pair; below 1 the new",
        "tree is faster. Both trees run in turns, in processes of their own. Median and quartiles over the pairs:",
        "",
        "| case | new / old | quartiles | pairs |",
        "|---|---|---|---|",
    ]
    for name, ratios in results.items():
        s = summary(ratios)
        lines.append(f"| {name} | {s['ratio']:.3f} | {s['low']:.3f}-{s['high']:.3f} | {s['rounds']} |")
    lines += ["", *(f"- {line}" for line in conclusion(results)), ""]
    lines.append(
        f"*{machine['date']}, commit {machine['commit']}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['system']}, Python {machine['python']}, NumPy {machine['versions']['numpy']}.*"
    )
    return "\n".join(lines) + "\n"
