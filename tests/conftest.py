"""One suite for every backend: TINYFT_BACKEND = numpy (the default), strict (the double that keeps CuPy's rules), cupy, or emulated
(real CuPy on a GPU made of host memory, for the tests alone: tests/emulated).

Hypothesis profiles, chosen by HYPOTHESIS_PROFILE: dev (the default), ci (more examples), learner (few, and short reports), audit
(few, no shrinking: tests/audit.py only wants to know whether something fails).
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

from tinyft import array, kernels

BACKEND = os.environ.get("TINYFT_BACKEND", "numpy")
if BACKEND == "emulated":                                # to the library it is CuPy; before anything imports that
    sys.path.insert(0, str(Path(__file__).parent / "emulated"))
    import emulate
    emulate.install()
    BACKEND = os.environ["TINYFT_BACKEND"] = "cupy"
QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck))

settings.register_profile("dev", max_examples=25, derandomize=True, database=None, **QUIET)
settings.register_profile("ci", max_examples=150, print_blob=True, **QUIET)
settings.register_profile("learner", max_examples=15, derandomize=True, database=None, report_multiple_bugs=False, **QUIET)
settings.register_profile("audit", max_examples=12, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate], **QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config: pytest.Config) -> None:
    try:
        array.use(BACKEND)
    except array.BackendError as e:
        raise pytest.UsageError(f"TINYFT_BACKEND={BACKEND}: {e}") from None


def pytest_report_header(config: pytest.Config) -> str:
    return f"tinyft: backend {array.backend()}, NumPy {np.__version__}, Hypothesis profile {settings.get_current_profile_name()}"


@pytest.fixture(autouse=True)
def _backend():
    """Every test starts on the suite's backend, whatever the one before it used."""
    array.use(BACKEND)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def definitions():
    """The plain ops of ops.py, without their kernels."""
    with kernels.definitions():
        yield
