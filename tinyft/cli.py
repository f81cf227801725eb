"""The `tinyft` command."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from . import checks, commands
from .commands.arguments import Parser, UsageError
from .learn.commands import register

__all__ = ["main"]

EXPECTED_ERRORS = (ValueError, LookupError, OSError, ArithmeticError, RuntimeError, TypeError)


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 if it fails or finds a fault, or 2 for a command line without sense.

    An expected error is one sentence on standard error. As in a shell, the status is 130 after Ctrl-C, and 141 if the
    reader of the output has closed it.
    """
    args = parser().parse_args(argv)
    try:
        status = args.run(args)
        if sys.stdout is not None:  # None: the command was started without standard output
            sys.stdout.flush()  # here, so that a full disk or a closed pipe is an error like any other
        return status
    except BrokenPipeError:  # `tinyft status | head`
        _discard_output()
        return 141
    except KeyboardInterrupt as e:
        if argv is None:  # the command of a process: a second Ctrl-C must not print a traceback while it ends
            _ignore_interrupts()
        text = str(e)
        print("\nstopped" + (f": {text}" if text else ""), file=sys.stderr)
        return 130
    except MemoryError:
        print("tinyft: memory ran out", file=sys.stderr)
        return 1
    except EXPECTED_ERRORS as e:
        if isinstance(e, OSError):
            _discard_output()  # standard output may be the file that cannot be written
        text = e.args[0] if isinstance(e, KeyError) and e.args else e  # str of a KeyError has quotes
        print(f"tinyft: {text}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1


def _discard_output() -> None:
    """Print what standard output still holds, if that is possible; else drop it, or Python fails again at its end."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _ignore_interrupts() -> None:
    """Ctrl-C has no effect from now on, if this is the thread that may say so."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments. Those for a user's own models are added by commands.register, the learner's by
    learn.commands.register.

    Each command sets `run`, the function that `main` calls with the arguments.
    """
    p = Parser(prog="tinyft", description="fine-tuning of transformers, from scratch")
    subparsers = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.register(subparsers)
    c = subparsers.add_parser(
        "compare", help="fine-tune the base on a real task with several methods: one table, one figure"
    )
    c.add_argument("--task", choices=("domain", "intact", "package"), default="domain")
    c.add_argument(
        "--preset", choices=("quick", "full"), default="quick", help="quick: under 5 minutes on two cores (default)"
    )
    c.add_argument(
        "--methods", help="all, or some, separated by commas, such as lora,bitfit,full (default: a few of each family)"
    )
    c.add_argument("--steps", help="training steps of each method")
    c.add_argument("--seeds", help="runs of each method")
    c.add_argument("--train", help="training tokens for domain, training examples for the others")
    c.add_argument(
        "--model",
        default="",
        help="a shipped base or a Hugging Face style directory (default: base-bert, base-gpt for domain)",
    )
    c.add_argument("--out", type=Path, default=Path("work"), help="folder of the results (default: work)")
    c.add_argument("--jobs", help="runs at a time (default: 2)")
    c.set_defaults(run=_compare)
    c = subparsers.add_parser("methods", help="every method, its paper and one line")
    c.set_defaults(run=_methods)
    c = subparsers.add_parser("doctor", help="the state of this machine, what is wrong, and the command that helps")
    c.set_defaults(run=_doctor)
    register(subparsers)
    return p


def _compare(args: argparse.Namespace) -> int:
    """Run the comparison with the settings of args.preset, changed by the options given. Returns the exit status."""
    from .compare import PRESETS, compare, split_names

    settings = {}
    for name in ("steps", "seeds", "train"):
        text = getattr(args, name)
        if text is not None:
            settings[name] = _whole(f"--{name}", text)
    jobs = None if args.jobs is None else _whole("--jobs", args.jobs)
    if args.methods is not None:
        settings["names"] = split_names(args.methods, args.task)
    s = replace(PRESETS[args.preset, args.task], model=args.model, **settings)
    compare(s, args.out, jobs)
    return 0


def _whole(option: str, text: str) -> int:
    """The whole number, at least 1, that was given to an option. TypeError or ValueError in one sentence."""
    try:
        value = int(text)
    except ValueError:
        value = text
    return checks.whole(option, value, least=1)


def _methods(args: argparse.Namespace) -> int:
    """Print every method under its family, with its paper and one line. Returns the exit status, 0."""
    from .methods import methods

    family = None
    for method in methods():
        if method.family != family:
            if family is not None:
                print()
            print(method.family)
            family = method.family
        print(f"  {method.cls.__name__:<14} {method.paper}")
        print(f"{'':<17}{method.line}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    """Print the state of this machine, and what is wrong with it. The exit status is 1 if there is an error."""
    from .doctor import examine

    lines, errors = examine()
    for name, text in lines:
        print(f"{name:<9}{text}")
    for error in errors:
        print(f"ERROR    {error}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
