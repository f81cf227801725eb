"""The `tinyft` command."""
from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from .learn.commands import register

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    "Run a command; the exit status is 0, or 1 with one sentence on standard error."
    p = argparse.ArgumentParser(prog="tinyft", description="fine-tuning and compression of transformers, from scratch")
    sub = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    c = sub.add_parser("compare", help="fine-tune the base on a real task with every method: one table, one figure")
    c.add_argument("--task", choices=("intact", "package", "domain"), default="intact")
    c.add_argument("--preset", choices=("quick", "full"), default="quick", help="quick: about 5 minutes on two cores (default)")
    c.add_argument("--methods", help="some only, separated by commas, such as lora,bitfit,full")
    c.add_argument("--steps", type=int)
    c.add_argument("--seeds", type=int)
    c.add_argument("--train", type=int, help="training examples (tokens for domain)")
    c.add_argument("--model", default="", help="a shipped base or a Hugging Face style directory (default: base-bert, base-gpt for domain)")
    c.add_argument("--out", type=Path, default=Path("work"), help="where compare.json and compare.png go (default: work)")
    c.add_argument("--jobs", type=int, help="runs at a time (default: 2)")
    c.set_defaults(run=_compare)
    sub.add_parser("methods", help="every method, its paper and one line").set_defaults(run=_methods)
    sub.add_parser("doctor", help="what this machine has for tinyft, what is wrong, and the command that helps").set_defaults(run=_doctor)
    register(sub)
    args = p.parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:                                                      # `tinyft status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as e:
        print(f"\nstopped{': ' + str(e) if str(e) else ''}", file=sys.stderr)
        return 130
    except (ValueError, LookupError, OSError, ArithmeticError, RuntimeError, TypeError) as e:
        print(f"tinyft: {e.args[0] if isinstance(e, KeyError) and e.args else e}", file=sys.stderr)
        return 1


def _compare(args: argparse.Namespace) -> int:
    from .compare import PRESETS, compare
    given = {k: v for k, v in dict(steps=args.steps, seeds=args.seeds, train=args.train).items() if v is not None}
    if bad := [k for k, v in given.items() if v < 1]:
        raise ValueError(f"--{bad[0]} wants a number of at least 1, got {given[bad[0]]}")
    names = tuple(n.strip() for n in args.methods.split(",")) if args.methods else ()
    compare(replace(PRESETS[args.preset, args.task], model=args.model, names=names, **given), args.out, args.jobs)
    return 0


def _methods(args: argparse.Namespace) -> int:
    from .methods import methods
    family = None
    for m in methods():
        if m.family != family:
            print(f"{'' if family is None else chr(10)}{m.family}")
            family = m.family
        print(f"  {m.cls.__name__:<14} {m.paper}\n{'':<17}{m.line}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine
    lines, errors = examine()
    print("\n".join(f"{name:<9}{text}" for name, text in lines))
    print("\n".join(f"ERROR    {e}" for e in errors), end="\n" * bool(errors))
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
