"""The command line of `tinyft`: a parser that suggests the most similar option or command, and the types of options."""
from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__all__ = ["Parser", "UsageError", "number", "whole"]


class UsageError(ValueError):
    """Raised for options that are missing or do not fit together. The exit status is 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, which suggests the most similar option or command."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """As ArgumentParser. Options cannot be abbreviated: an abbreviation may mean another option later."""
        options.setdefault("allow_abbrev", False)
        super().__init__(*args, **options)
        self.given: list[str] = []                       # the arguments of the last call: `_hint` reads them

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """Parse the arguments. The parser of the command reports an unknown option: it knows the command's options."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._chosen(parsed).error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As ArgumentParser. argparse calls it for the main parser, and again for the parser of the command."""
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message as one line and end the process with the status 2."""
        self.exit(2, f"{self.prog}: {message}{self._hint(message)} ({self.prog} --help)\n")

    def _chosen(self, parsed: argparse.Namespace) -> argparse.ArgumentParser:
        """The parser of the command that the user gave. If there are no commands, this parser itself."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices[getattr(parsed, action.dest)]
        return self

    def _hint(self, message: str) -> str:
        """The known option or choice that is most similar to the wrong one, as ": did you mean ...?". "" if none is."""
        for argument in self.given:
            option = argument.partition("=")[0]
            if option.startswith("--") and len(option) > 2 and option not in self._option_string_actions:
                near = difflib.get_close_matches(option, self._option_string_actions, 1, 0.6)
                if near:
                    return f": did you mean {near[0]} instead of {option}?"
        invalid = re.search(r"invalid choice: '(.*?)'", message)
        choices = [choice for action in self._actions for choice in action.choices or () if isinstance(choice, str)]
        near = difflib.get_close_matches(invalid[1], choices, 1, 0.5) if invalid else []
        return f": did you mean {near[0]!r}?" if near else ""


def whole(least: int) -> Callable[[str], int]:
    """A value for argparse's type=: it reads a whole number of at least `least`."""
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"wants a whole number >= {least}, got {text!r}")
        return value
    return read


def number(low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf) -> Callable[[str], float]:
    """A value for argparse's type=: it reads a finite number x with low <= x <= high and x > above."""
    bounds = {">=": low, ">": above, "<=": high}
    limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if math.isfinite(bound))

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and value > above):
            raise argparse.ArgumentTypeError(f"wants a finite number {limits}".rstrip() + f", got {text!r}")
        return value
    return read
