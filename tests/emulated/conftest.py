"""These tests want the emulated GPU: `make test-emulated`, or TINYFT_BACKEND=emulated where its CuPy is installed.

Elsewhere they are not collected."""
from __future__ import annotations

import sys

collect_ignore_glob = [] if "emulate" in sys.modules else ["test_*.py"]          # tests/conftest.py has installed it, or not


def pytest_terminal_summary(terminalreporter):
    "The table of test_cost.py, and how many kernels were compiled."
    table = getattr(sys.modules.get("test_cost"), "TABLE", [])
    if table:
        terminalreporter.section("what a training step asks of the device")
        terminalreporter.write_line(f"{'':38}{'launches':>9}{'products':>9}{'waits':>7}{'to device':>11}{'to host':>9}{'within':>8}")
    for model, phase, c in table:
        terminalreporter.write_line(f"{model:28}{phase:10}{c.launches:9}{c.products:9}{c.waits:7}{c.h2d:11}{c.d2h:9}{c.d2d:8}")
