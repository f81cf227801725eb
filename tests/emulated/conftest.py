"""These tests want the emulated GPU: `make test-emulated`, or TINYFT_BACKEND=emulated where its CuPy is installed.

On a device (TINYFT_BACKEND=cupy) the one that compares CuPy with NumPy is run there, and the end of the run names the
others.  Elsewhere none is collected.
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# tests/conftest.py has installed it, or not
EMULATED = "emulate" in sys.modules
DEVICE = os.environ.get("TINYFT_BACKEND") == "cupy"
collect_ignore = [] if EMULATED else [p.name for p in Path(__file__).parent.glob("test_*.py")
                                      if not (DEVICE and p.name == "test_on_cupy.py")]


OWN_PROCESS = {"test_a_process_killed_at_random_moments_and_resumed_ends_bitwise_the_same",
               "test_ctrl_c_finishes_the_step_writes_the_state_and_the_run_goes_on_bitwise"}


def pytest_collection_modifyitems(items):
    for item in items:
        if EMULATED and item.name in OWN_PROCESS:
            item.add_marker(pytest.mark.skip(reason="starts a process of its own, which has no emulated GPU"))


def pytest_terminal_summary(terminalreporter):
    """The table of test_cost.py.  On a device: the files left out, which are about the emulated GPU."""
    if DEVICE and not EMULATED:
        left_out = ",".join(sorted(collect_ignore))
        terminalreporter.write_line(f"not run on a device: tests/emulated/{{{left_out}}}, "
                                    "which are about the emulated GPU")
    table = getattr(sys.modules.get("test_cost"), "TABLE", [])
    if table:
        terminalreporter.section("what a training step asks of the device")
        heads = f"{'launches':>9}{'products':>9}{'waits':>7}{'to device':>11}{'to host':>9}{'within':>8}"
        terminalreporter.write_line(f"{'':53}{heads}")
    for model, phase, c in table:
        counts = f"{c.launches:9}{c.products:9}{c.waits:7}{c.h2d:11}{c.d2h:9}{c.d2d:8}"
        terminalreporter.write_line(f"{model:43}{phase:10}{counts}")
