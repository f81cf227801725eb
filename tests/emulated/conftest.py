"""These tests want the emulated GPU: `make test-emulated`, or TINYFT_BACKEND=emulated where its CuPy is installed.

Elsewhere they are not collected."""
from __future__ import annotations

import sys

import pytest

collect_ignore_glob = [] if "emulate" in sys.modules else ["test_*.py"]          # tests/conftest.py has installed it, or not


OWN_PROCESS = {"test_a_process_killed_at_random_moments_and_resumed_ends_bitwise_the_same",
               "test_ctrl_c_finishes_the_step_writes_the_state_and_the_run_goes_on_bitwise"}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name in OWN_PROCESS:
            item.add_marker(pytest.mark.skip(reason="starts a process of its own, which has no emulated GPU"))


def pytest_terminal_summary(terminalreporter):
    "The table of test_cost.py."
    table = getattr(sys.modules.get("test_cost"), "TABLE", [])
    if table:
        terminalreporter.section("what a training step asks of the device")
        terminalreporter.write_line(f"{'':53}{'launches':>9}{'products':>9}{'waits':>7}{'to device':>11}{'to host':>9}{'within':>8}")
    for model, phase, c in table:
        terminalreporter.write_line(f"{model:43}{phase:10}{c.launches:9}{c.products:9}{c.waits:7}{c.h2d:11}{c.d2h:9}{c.d2d:8}")
