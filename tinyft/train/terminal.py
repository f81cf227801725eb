"""A run and the terminal: Ctrl-C and SIGTERM, the progress bar, and the last line."""
from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

SECONDS = 5.0                                                           # between two lines of progress


# ── signals ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class Stop:
    """A request to stop: `signal_number` is SIGINT (Ctrl-C) or SIGTERM, or 0 if there is none."""

    def __init__(self) -> None:
        self.signal_number = 0
        self.previous: dict[int, Any] = {}                              # the handlers that were there before

    def handle(self, number: int, frame: Any) -> None:
        """The handler: remember the signal, so that the step can finish. A second signal stops at once."""
        if self.signal_number:
            raise SystemExit(128 + number) if number == signal.SIGTERM else KeyboardInterrupt
        self.signal_number = number

    def carry_out(self, message: str) -> None:
        """Raise KeyboardInterrupt(message) after Ctrl-C, and SystemExit(143) after SIGTERM.

        If the program has its own handler of SIGTERM, that is called instead; if it returns, the run goes on."""
        if self.signal_number == signal.SIGINT:
            raise KeyboardInterrupt(message)
        previous = self.previous.get(signal.SIGTERM)
        if not callable(previous):
            raise SystemExit(128 + signal.SIGTERM)
        self.signal_number = 0
        previous(signal.SIGTERM, None)


@contextlib.contextmanager
def stop_requests(on_sigterm: bool) -> Iterator[Stop]:
    """Gives the Stop of a run, and puts the earlier handlers back at the end.

    on_sigterm: False leaves SIGTERM as it is. A signal that the program ignores stays ignored (`nohup` ignores
    Ctrl-C). In another thread than the main one Python allows no handlers: there, no signal is noticed.
    """
    stop = Stop()
    numbers = [signal.SIGINT, signal.SIGTERM] if on_sigterm else [signal.SIGINT]
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            # None: a handler that Python cannot put back
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                stop.previous[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in stop.previous.items():
            signal.signal(number, handler)


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class Progress:
    """Progress on stderr: a bar on a terminal and in a notebook; elsewhere a line now and then. Then a last line.

    The tokens per second count padding, and all time since the start.
    """

    def __init__(self, steps: int, done: int, visible: bool):
        """A run of `steps` steps, of which `done` are done before its start."""
        self.steps = steps
        self.done_before = done
        self.stream = sys.stderr if visible else None
        self.bar = make_bar(steps, done, self.stream)
        self.start_time = time.perf_counter()
        self.last_time = self.start_time                                # of the last line

    def show(self, done: int, loss: float, tokens: int) -> None:
        """Show that `done` steps are done. loss: of the last one. tokens: read since the start."""
        if self.stream is None:
            return
        now = time.perf_counter()
        if self.bar is None and now - self.last_time < SECONDS:
            return
        speed = tokens / max(now - self.start_time, 1e-9)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            self.bar.update(done - self.bar.n)                          # draws the text too
            return
        self.last_time = now
        self.write(f"step {done} of {self.steps}, loss {loss:.3f}, {speed:,.0f} tokens/s")

    def finish(self, done: int, losses: Sequence[float], stopped: str) -> None:
        """Write the last line: the steps of this call, its time, the last loss, and the reason of an early stop."""
        self.close()
        if not losses:                                                  # a run of no steps
            return
        seconds = time.perf_counter() - self.start_time
        reason = f"; stopped: {stopped}" if stopped else ""
        self.write(f"{done - self.done_before} steps in {seconds:.1f} s, loss {losses[-1]:.3f}{reason}")

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def write(self, text: str) -> None:
        """Write a line. A stream that is closed, such as a pipe that nobody reads, must not end the training."""
        if self.stream is None:
            return
        try:
            print(text, file=self.stream, flush=True)
        except (OSError, ValueError):
            self.stream = None


def make_bar(steps: int, done: int, stream: Any) -> Any:
    """A progress bar on a terminal or in a notebook, else None."""
    if stream is None:
        return None
    if in_notebook():
        from tqdm.auto import tqdm
    elif stream.isatty():
        from tqdm import tqdm
    else:
        return None
    return tqdm(total=steps, initial=done, unit="step", leave=False, file=stream)


def in_notebook() -> bool:
    """True in a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
