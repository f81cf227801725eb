"""A check in a process of its own: an endless loop, a crash or a flood of memory ends that process and nothing else.

Where the system can fork safely the child has tinyft in memory already, so that a check takes well under a second.
"""
from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .exercise import find
from .show import Outcome, Problem

SILENCE = 12.0                                                                   # seconds without a word, after which the child is ended


def check(name: str, path: Path, backend: str) -> Iterator[Any]:
    "The outcomes of a check of the file, one by one as they come."
    context = multiprocessing.get_context("fork" if sys.platform == "linux" and backend != "cupy" else "spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_serve, args=(there, name, str(path), backend), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)                      # Python warns that threads are not forked: none is needed
        child.start()
    there.close()
    try:
        while True:
            if not here.poll(SILENCE):
                yield Outcome("", Problem("refused", message=f"nothing came back for {SILENCE:g} seconds, so it was ended: an endless loop?"))
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


def _serve(there: Any, name: str, path: str, backend: str) -> None:
    "The child: send every outcome as JSON, then null."
    from .checker import check_file, use_backend
    use_backend(backend)
    for outcome in check_file(find(name), Path(path)):
        there.send_bytes(json.dumps(dataclasses.asdict(outcome)).encode())
    there.send_bytes(b"null")
