"""These tests want the emulated GPU: `make test-emulated`, or TINYFT_BACKEND=emulated where its CuPy is installed.

Elsewhere they are not collected."""
from __future__ import annotations

import sys

collect_ignore_glob = [] if "emulate" in sys.modules else ["test_*.py"]          # tests/conftest.py has installed it, or not
