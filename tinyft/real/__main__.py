"""The command behind `make real`:   python -m tinyft.real [--task intact] [--packed] [--steps 100] [--out FOLDER]"""

from __future__ import annotations

import argparse
import sys

from .demo import MOST_STEPS, MOST_TEST, run, settings_from
from .tasks import TASKS


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, or 1 with one sentence on standard error if it fails."""
    p = argparse.ArgumentParser(prog="make real", description="a real language model learns a task that it cannot do")
    p.add_argument("--task", choices=TASKS, help="names: summary -> function's name (default); intact: swapped words")
    p.add_argument("--model", help="the file or folder of another instruction-tuned model")
    p.add_argument("--packed", action="store_true", help="train on the weights of 4 bits")
    p.add_argument("--steps", type=int, help=f"training steps, at most {MOST_STEPS} (default: 100)")
    p.add_argument("--test", type=int, help=f"test examples, at most {MOST_TEST} (default: 200)")
    p.add_argument("--shots", type=int, help="solved examples in the few-shot prompt (default: 4; 0: no such row)")
    p.add_argument("--batch", type=int, help="training examples in a step (default: 8)")
    p.add_argument("--lr", type=float, help="learning rate (default: 0.001)")
    p.add_argument("--seed", type=int, help="seed of the training examples and of LoRA's start (default: 0)")
    p.add_argument("--no-memory", action="store_true", help="do not measure the peak memory in further processes")
    p.add_argument("--out", help="folder of the results (default: work/real/<task>)")
    args = p.parse_args(argv)
    try:
        s = settings_from(vars(args))
        run(s, args.out or f"work/real/{s.task}", memory=not args.no_memory)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, TypeError, LookupError, OSError, ArithmeticError, RuntimeError) as e:
        print(f"make real: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
