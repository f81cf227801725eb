"""The learner's file, read as a module; and the errors that end a check."""
from __future__ import annotations

import importlib.util
import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ..tensor import OPS


class Refused(Exception):
    """The learner's function cannot be checked at all; the message says why in one sentence."""


class Stop(BaseException):
    """Ends a check at once.  Not an Exception, so `except Exception` in the learner's code does not catch it."""


def load_function(path: Path, function: str, module_name: str) -> Callable:
    """The function of this name in the learner's file, which is executed as a module named `module_name`.

    Refused, with the reason, if the file cannot be executed or holds no such function.
    """
    name = f"{path.parent.name}/{path.name}"
    module = _run(path, name, module_name)
    found = getattr(module, function, None)
    if not callable(found):
        defined = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module_name]
        others = f", only {', '.join(defined)}" if defined else ""
        raise Refused(f"{name} has no function {function}{others}: the check calls it by that name")
    return found


def _run(path: Path, name: str, module_name: str) -> ModuleType:
    """The file executed as a module.  Refused, with the reason, if it raises.  name: of the file, for messages.

    Ops that it defines with @op are not left in the library's table.
    """
    try:
        path.read_bytes()
    except OSError as e:
        raise Refused(f"{name} cannot be read: {e.strerror}") from None
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    ops_before = dict(OPS)
    write_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True                       # no __pycache__ in the learner's folder
    linecache.checkcache(str(path))                      # the file may have changed: messages quote its lines
    try:
        spec.loader.exec_module(module)
    except SyntaxError as e:
        number = f", line {e.lineno}" if e.lineno else ""
        line = f"\n  {shortened(e.text.strip())}" if e.text else ""
        raise Refused(f"Python cannot read {name}: {e.msg}{number}{line}") from None
    except Stop:
        raise
    except (Exception, SystemExit) as e:
        raise Refused(f"{name} ends with {in_words(e)} while it is read{quoted_line(e, str(path))}") from None
    finally:
        sys.dont_write_bytecode = write_bytecode
        OPS.clear()
        OPS.update(ops_before)
    return module


MOST_LINES = 6                                           # of an exception's message, which a learner may have written
MOST_CHARACTERS = 300                                    # of one of these lines


def in_words(e: BaseException) -> str:
    """An exception as text: its type, and its message if it has one, of which a long one is shortened."""
    kind = type(e).__name__
    try:
        text = str(e)
    except Exception as failure:
        text = f"(its __str__ raises {type(failure).__name__})"
    return f"{kind}: {shortened(text)}" if text else kind


def shortened(text: str) -> str:
    """The text without the lines after MOST_LINES and the characters of a line after MOST_CHARACTERS."""
    lines = text.split("\n")
    kept = [line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}..." for line in lines[:MOST_LINES]]
    if len(lines) > MOST_LINES:
        kept.append(f"... and {len(lines) - MOST_LINES:,} more lines")
    return "\n".join(kept)


def place(e: BaseException, filename: str) -> tuple[str, int] | None:
    """(filename, line number) of the learner's innermost call from which an exception came; None if there is none.

    filename: the learner's file.  Of an exception with a cause (raise ... from ...), the first cause counts.
    """
    while e.__cause__ is not None:
        e = e.__cause__
    found = None
    step = e.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == filename:
            found = (filename, step.tb_lineno)
        step = step.tb_next
    return found


def quoted_line(e: BaseException, filename: str) -> str:
    """The learner's line from which an exception came, as a line of a message; "" if there is none."""
    found = place(e, filename)
    if not found:
        return ""
    return f"\n  {Path(found[0]).name}:{found[1]}   {shortened(linecache.getline(*found).strip())}"
