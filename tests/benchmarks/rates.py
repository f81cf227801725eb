"""The learning rate that suits each contender of the comparison: a sweep on the validation modules, never on test ones.

    python tests/benchmarks/rates.py [--task domain] [--names lora,bitfit] [--seeds 2]

Prints one line per contender and learning rate; the best ones are in tinyft/compare/rates.json.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from tinyft.compare import PRESETS, Contender, split_names
from tinyft.compare.run import train_all
from tinyft.compare.workers import workers

FACTORS = (1 / 3, 1, 3)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--task", default="domain")
    p.add_argument("--preset", default="quick")
    p.add_argument("--names", default="all")
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--steps", type=int)
    p.add_argument("--jobs", type=int, default=2)
    options = p.parse_args()
    s = replace(PRESETS[options.preset, options.task], seeds=options.seeds, split="valid")
    s = replace(s, names=split_names(options.names, options.task))
    if options.steps is not None:
        s = replace(s, steps=options.steps)
    rows = []
    for c in s.chosen():
        for factor in FACTORS:
            lr = c.lr * factor
            rows.append(Contender(f"{c.name} @ {lr:.1g}", c.method, lr))
    scores: dict[str, list[float]] = {c.name: [] for c in rows}
    with workers(options.jobs) as pool:
        for c, _, metrics in train_all(s, rows, pool):
            scores[c.name].append(metrics.get(s.quality, np.nan))  # NaN: diverged
    for name, values in scores.items():
        deviation = np.std(values, ddof=1) if len(values) > 1 else 0
        print(f"{name:<34} {np.mean(values):.4f} ± {deviation:.4f}")


if __name__ == "__main__":
    main()
