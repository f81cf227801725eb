"""One suite for every backend and Hypothesis profile, chosen by two environment variables.

TINYFT_BACKEND:
    numpy       the default
    strict      a NumPy backend that enforces CuPy's rules
    cupy
    emulated    real CuPy on a GPU made of host memory, for the tests alone (tests/emulated)

HYPOTHESIS_PROFILE:
    dev         the default
    ci          more examples
    learner     few examples, short reports
    audit       few examples, no shrinking: tests/audit.py only counts failures
"""
from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

from tinyft import array, kernels

BACKEND = os.environ.get("TINYFT_BACKEND", "numpy")
if BACKEND == "emulated":                                # must run before the first import of CuPy
    sys.path.insert(0, str(Path(__file__).parent / "emulated"))
    import emulate
    emulate.install()
    BACKEND = os.environ["TINYFT_BACKEND"] = "cupy"
QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck))

settings.register_profile("dev", max_examples=25, derandomize=True, database=None, **QUIET)
settings.register_profile("ci", max_examples=150, print_blob=True, **QUIET)
settings.register_profile(
    "learner", max_examples=15, derandomize=True, database=None, report_multiple_bugs=False, **QUIET,
)
settings.register_profile(
    "audit", max_examples=12, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate], **QUIET,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config: pytest.Config) -> None:
    # A process that a script starts in the background ignores Ctrl-C, and so do its children. Some tests send Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        array.use(BACKEND)
    except array.BackendError as e:
        raise pytest.UsageError(f"TINYFT_BACKEND={BACKEND}: {e}") from None
    if BACKEND == "numpy" and kernels.in_use() == "numba":
        kernels.compiled_kernels()  # now, so that no command that a test starts says that it compiles


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes that share the tests name them by id: an id must be the same in both (helpers.case_id)."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"the id of a test wants no address, got {item.nodeid}")


def pytest_collection_finish() -> None:
    """A garbage collection skips what lives until the end: the modules, and thirteen thousand items.

    The `gc.collect()` of the library and of the tests then takes milliseconds, not half a second."""
    gc.collect()
    gc.freeze()


def settings_in_use() -> str:
    """The line that says what the suite runs on."""
    profile = settings.get_current_profile_name()
    names = {"numba": "compiled kernels", "numpy": "NumPy's kernels", "off": "no kernels"}
    found = names[kernels.in_use()] if BACKEND == "numpy" else "its kernels"
    return f"tinyft: backend {BACKEND}, {found}, NumPy {np.__version__}, Hypothesis profile {profile}"


def pytest_report_header(config: pytest.Config) -> str:
    return settings_in_use()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not terminalreporter.showheader:                  # -q has no header
        terminalreporter.write_line(settings_in_use())


@pytest.fixture(autouse=True)
def _backend():
    """Start every test on the suite's backend, also after a test that changed the backend."""
    array.use(BACKEND)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=["kernels", "definitions"])
def with_and_without_kernels(request):
    """Every test twice: with the kernels, and with the plain ops of ops.py."""
    if request.param == "kernels":
        yield
    else:
        with kernels.definitions():
            yield


@pytest.fixture
def definitions():
    """The plain ops of ops.py, without their kernels."""
    with kernels.definitions():
        yield
