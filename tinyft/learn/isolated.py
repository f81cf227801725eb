"""A check in a process of its own: an endless loop, a crash or a flood of memory ends that process and nothing else.

Where the system can fork safely the child has tinyft in memory already, so that a check takes well under a second.
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
from .show import Outcome, Problem
from .subject import said_at

SILENCE = 10.0                                                                   # seconds without a word, after which the child is ended


def check(name: str, path: Path, backend: str) -> Iterator[Outcome]:
    "The outcomes of a check of the file, one by one as they come."
    with tempfile.TemporaryDirectory() as folder:
        yield from _watched(name, path.resolve(), backend, Path(folder) / "where")


def _watched(name: str, path: Path, backend: str, where: Path) -> Iterator[Outcome]:
    "The child's outcomes; a last one in its stead if it hangs or dies.  where: the file in which a hanging child notes its line."
    context = multiprocessing.get_context("fork" if sys.platform == "linux" and backend != "cupy" else "spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(there, name, str(path), backend, str(where)), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)                      # Python warns that threads are not forked: none is needed
        child.start()
    there.close()
    try:
        while True:
            if not here.poll(SILENCE):
                yield Outcome("", Problem("refused", message=f"nothing came back for {SILENCE:g} seconds, so it was ended: an endless loop?"
                                          + _line(where, path)))
                return
            try:
                said = json.loads(here.recv_bytes())
            except EOFError:
                child.join(1)
                yield Outcome("", Problem("refused", message=f"your code ended the whole process (exit status {child.exitcode}): out of memory, "
                                          "os._exit, or a crash"))
                return
            if said is None:
                return
            problem = said.pop("problem")
            yield Outcome(problem=problem and Problem(**problem), **said)
    finally:
        child.kill()
        child.join()
        here.close()


def _line(where: Path, path: Path) -> str:
    "The learner's line in a hanging child's notes."
    found = re.search(rf'File "{re.escape(str(path))}", line (\d+)', where.read_text(encoding="utf-8", errors="replace")) if where.exists() else None
    return f"\n  {path.name}:{found[1]}   {linecache.getline(str(path), int(found[1])).strip()}" if found else ""


def _serve(there: Any, name: str, path: str, backend: str, where: str) -> None:
    "The child: send every outcome as JSON, then null.  What it writes to standard error is nobody's business."
    from .checker import check_file, use_backend
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    send = lambda outcome: there.send_bytes(json.dumps(outcome and dataclasses.asdict(outcome)).encode())
    with open(where, "w") as notes:
        faulthandler.dump_traceback_later(0.9 * SILENCE, file=notes)             # by a thread of its own: no signal is needed
        try:
            use_backend(backend)
            for outcome in check_file(find(name), Path(path)):
                send(outcome)
                faulthandler.dump_traceback_later(0.9 * SILENCE, file=notes)
            send(None)
        except BaseException as e:                                               # such as KeyboardInterrupt, raised by the learner's code
            send(Outcome("", Problem("refused", message=f"the check ended with {type(e).__name__}{f': {e}' if str(e) else ''}"
                                     + said_at(e, path))))
            send(None)
        finally:
            faulthandler.cancel_dump_traceback_later()
