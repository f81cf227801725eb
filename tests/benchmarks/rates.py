"""Which rate suits each contender of the comparison: a sweep judged on validation modules, never on test ones.

    python tests/benchmarks/rates.py [--task intact] [--names lora,bitfit] [--seeds 2]

Prints one line per contender and rate; the winners stand in tinyft/compare.py.
"""
from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from tinyft.compare.run import PRESETS, Contender, progress, workers

GRID = (1 / 3, 1, 3)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--task", default="intact")
    p.add_argument("--preset", default="quick")
    p.add_argument("--names")
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--steps", type=int)
    p.add_argument("--jobs", type=int, default=2)
    args = p.parse_args()
    s = replace(PRESETS[args.preset, args.task], seeds=args.seeds, **({"steps": args.steps} if args.steps else {}), split="valid",
                names=tuple(args.names.split(",")) if args.names else ())
    rows = [Contender(f"{c.name} @ {c.lr * k:.1g}", c.method, c.lr * k) for c in s.chosen() for k in GRID]
    scores: dict[str, list[float]] = {}
    with workers(args.jobs) as pool:
        for c, _, metrics in progress(s, rows, pool):
            scores.setdefault(c.name, []).append(metrics[s.quality])
    for c in rows:
        v = np.array(scores[c.name])
        print(f"{c.name:<34} {v.mean():.4f} ± {v.std(ddof=1) if len(v) > 1 else 0:.4f}")


if __name__ == "__main__":
    main()
