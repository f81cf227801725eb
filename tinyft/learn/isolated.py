"""A check in a process of its own: an endless loop, a crash or a flood of memory ends that process and nothing else.

Where the system can fork safely, the child has tinyft in memory already, so a check takes well under a second.
"""
from __future__ import annotations

import dataclasses
import faulthandler
import json
import linecache
import multiprocessing
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .exercise import find
from .loading import in_words, quoted_line
from .show import Outcome, Problem

STARTUP = 120.0                                          # seconds in which the child must have started, if it is busy
SILENCE = 10.0                                           # seconds without an outcome, after which the child is ended
READY = "ready"                                          # the child's first message: the learner's code runs now


def check(name: str, path: Path, backend: str) -> Iterator[Outcome]:
    """The outcomes of a check of the file, one by one as they come."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _watched(name, path.resolve(), backend, Path(folder) / "stack")


def _watched(name: str, path: Path, backend: str, stack: Path) -> Iterator[Outcome]:
    """Check the file `path` in a child process; yield its outcomes as they come.

    If the child hangs or dies, the last outcome is one of this process, which says so.  name: of the exercise.
    stack: the file to which a hanging child writes its stack.
    """
    can_fork = sys.platform == "linux" and backend != "cupy"             # CUDA does not work in a forked process
    context = multiprocessing.get_context("fork" if can_fork else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(sender, name, str(path), backend, str(stack)), daemon=True)
    with warnings.catch_warnings():
        # Python warns that threads are not forked. The child needs none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    sender.close()                                       # the child has its own: EOFError once that one is closed
    is_ready = False
    try:
        while True:
            if not receiver.poll(SILENCE if is_ready else STARTUP):
                yield _refused(_silent(is_ready) + _line(stack, path))
                return
            try:
                sent = json.loads(receiver.recv_bytes())
            except EOFError:
                child.join(1)
                yield _refused(f"your code ended the whole process (exit status {child.exitcode}): out of memory, "
                               "os._exit, or a crash")
                return
            if sent is None:                             # the end of the check
                return
            if sent == READY:
                is_ready = True
                continue
            problem = sent.pop("problem")
            yield Outcome(problem=problem and Problem(**problem), **sent)
    finally:
        child.kill()
        child.join()
        receiver.close()


def _silent(is_ready: bool) -> str:
    """The reason why a child from which nothing came is ended, in a sentence."""
    if is_ready:
        return f"nothing came back for {SILENCE:g} seconds, so it was ended: an endless loop?"
    return f"the check has not started within {STARTUP:g} seconds: is this machine busy?"


def _refused(message: str) -> Outcome:
    return Outcome("", Problem("refused", message=message))


def _line(stack: Path, path: Path) -> str:
    """The learner's line (path, number, text) in the stack that a hanging child wrote to a file; "" if there is none.

    The stack names the innermost call first, so the first line of the learner's file is the one that hangs.
    """
    if not stack.exists():
        return ""
    text = stack.read_text(encoding="utf-8", errors="replace")
    found = re.search(rf'File "{re.escape(str(path))}", line (\d+)', text)
    if not found:
        return ""
    number = int(found[1])
    return f"\n  {path.name}:{number}   {linecache.getline(str(path), number).strip()}"


def _serve(sender: Any, name: str, path: str, backend: str, stack: str) -> None:
    """The child: send READY, check the file `path`, send every outcome as JSON, then null.  Standard error is thrown
    away.

    name: of the exercise.  stack: the file to which it writes its stack when no outcome has come for 0.9 · SILENCE,
    just before the parent gives up and reads the file.
    """
    from .checker import check_file, use_backend
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def send(outcome: Outcome | None) -> None:
        sender.send_bytes(json.dumps(outcome and dataclasses.asdict(outcome)).encode())

    sender.send_bytes(json.dumps(READY).encode())
    with open(stack, "w") as file:
        def dump_stack_when_silent() -> None:
            # A thread of faulthandler's own writes the stack: no signal is needed.
            faulthandler.dump_traceback_later(0.9 * SILENCE, file=file)

        dump_stack_when_silent()
        try:
            use_backend(backend)
            for outcome in check_file(find(name), Path(path)):
                send(outcome)
                dump_stack_when_silent()
            send(None)
        except BaseException as e:                       # such as a KeyboardInterrupt that the learner's code raises
            send(_refused(f"the check ended with {in_words(e)}{quoted_line(e, path)}"))
            send(None)
        finally:
            faulthandler.cancel_dump_traceback_later()
