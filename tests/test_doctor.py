"""`tinyft doctor`, the choice of a backend, and the sentences about missing parts.

The sentences that need a real CuPy are tested in tests/emulated/test_missing.py.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import tinyft
from tinyft import array, cli, doctor
from tinyft.tensor import OPS

NO_CUPY = r'CuPy is not installed: pip install "tinyft\[gpu13\]" for a driver of CUDA 13, "tinyft\[gpu12\]" for CUDA 12'


@pytest.fixture
def fresh(monkeypatch):
    """The state of a new process: no backend is chosen in this thread, and only NumPy's is open."""
    monkeypatch.setattr(array, "_local", SimpleNamespace())
    monkeypatch.setattr(array, "_names", {np.ndarray: "numpy"})
    monkeypatch.setattr(array, "_modules", {np.ndarray: np})
    monkeypatch.delenv("TINYFT_BACKEND", raising=False)
    return monkeypatch


def installed(monkeypatch, **packages):
    """Pretend that exactly these distributions are installed."""
    found = []
    for name, version in packages.items():
        found.append(SimpleNamespace(metadata={"Name": name.replace("_", "-")}, version=version))
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)


def run_doctor(capsys) -> tuple[int, str]:
    """The exit status and the output of `tinyft doctor`."""
    return cli.main(["doctor"]), capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- choosing
@pytest.mark.parametrize(
    "requested, name", [(None, "numpy"), ("numpy", "numpy"), ("strict", "strict"), ("auto", "numpy")]
)
def test_the_environment_chooses_the_backend(fresh, requested, name):
    fresh.setitem(sys.modules, "cupy", None)  # its import fails, as if it were not installed
    if requested:
        fresh.setenv("TINYFT_BACKEND", requested)
    assert tinyft.backend() == name and array.name_of(array.asarray([1.0])) == name


def test_asking_for_cupy_where_there_is_none_says_what_to_install(fresh):
    fresh.setitem(sys.modules, "cupy", None)
    with pytest.raises(tinyft.BackendError, match=f"cannot use the backend 'cupy': {NO_CUPY}"):
        tinyft.use("cupy")
    fresh.setenv("TINYFT_BACKEND", "cupy")
    with pytest.raises(tinyft.BackendError, match=NO_CUPY):
        array.asarray([1.0])
    fresh.setenv("TINYFT_BACKEND", "gpu")
    with pytest.raises(tinyft.BackendError, match="unknown backend 'gpu'; wanted one of numpy, cupy, strict or auto"):
        tinyft.backend()


def pretended(product=89.0, devices=1):
    """A CuPy in which every element of every matrix product is this number."""

    class Array:
        T = property(lambda self: self)

        def reshape(self, *shape):
            return self

        def __mul__(self, other):
            return self

        def __add__(self, other):
            return self

        def __matmul__(self, other):
            return np.full((2, 2), product)

    runtime = SimpleNamespace(getDeviceCount=lambda: devices, runtimeGetVersion=lambda: 13000)
    return SimpleNamespace(arange=lambda n, dtype: Array(), cuda=SimpleNamespace(runtime=runtime))


def test_auto_takes_cupy_only_if_its_product_is_right(fresh):
    cases = (
        (pretended(), None),
        (pretended(product=88.0), "wrong product"),
        (pretended(devices=0), "shows no device"),
    )
    for module, reason in cases:
        fresh.setitem(sys.modules, "cupy", module)
        why = array.why_no_cupy()
        assert why is None if reason is None else reason in why
    with pytest.raises(tinyft.BackendError, match="shows no device"):
        tinyft.use("cupy")
    tinyft.use("auto")
    assert tinyft.backend() == "numpy"


@pytest.mark.parametrize(
    "visible, words",
    [
        (None, "nvidia-smi -L lists"),
        ("", "CUDA_VISIBLE_DEVICES is '', so unset CUDA_VISIBLE_DEVICES"),
        ("7", "CUDA_VISIBLE_DEVICES is '7'"),
    ],
)
def test_a_hidden_device_and_a_missing_device_have_different_sentences(fresh, visible, words):
    if visible is None:
        fresh.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        fresh.setenv("CUDA_VISIBLE_DEVICES", visible)
    fresh.setitem(sys.modules, "cupy", pretended(devices=0))
    assert words in array.why_no_cupy()


# ---------------------------------------------------------------------------------------------------- the doctor
def test_a_machine_without_a_gpu_is_healthy(fresh, capsys):
    fresh.setitem(sys.modules, "cupy", None)
    installed(fresh, numpy="2.0")
    status, text = run_doctor(capsys)
    assert status == 0 and "ERROR" not in text
    assert "backend  numpy, the default" in text and "CuPy is not installed: pip install" in text
    assert f"tinyft   {tinyft.__version__}" in text and "Python   3." in text
    assert f"NumPy    {np.__version__}, BLAS " in text and "thread" in text
    assert re.search("^kernels  of NumPy: .*attention, ", text, re.MULTILINE)


def test_a_requested_backend_that_cannot_be_used_is_an_error(fresh, capsys):
    fresh.setitem(sys.modules, "cupy", None)
    installed(fresh)
    fresh.setenv("TINYFT_BACKEND", "cupy")
    status, text = run_doctor(capsys)
    assert status == 1 and "backend  none: TINYFT_BACKEND=cupy cannot be used" in text
    assert "ERROR    cannot use the backend 'cupy': CuPy is not installed: pip install" in text
    fresh.setenv("TINYFT_BACKEND", "auto")
    status, text = run_doctor(capsys)
    assert status == 0 and "backend  numpy, by TINYFT_BACKEND=auto: CuPy does not work here" in text
    tinyft.use("strict")
    assert "backend  strict, chosen by tinyft.use (TINYFT_BACKEND is auto)" in run_doctor(capsys)[1]


def test_two_packages_of_cupy_are_an_error_with_the_commands_that_help(fresh, capsys):
    fresh.setitem(sys.modules, "cupy", pretended(devices=0))
    installed(fresh, cupy_cuda12x="14.1.0", cupy_cuda13x="14.2.0", cupydemo="1")
    status, text = run_doctor(capsys)
    assert status == 1 and "cupy-cuda12x 14.1.0, cupy-cuda13x 14.2.0, does not work" in text and "cupydemo" not in text
    assert "ERROR    2 packages of CuPy write into one folder: pip uninstall -y cupy-cuda12x cupy-cuda13x" in text
    assert 'cupy-cuda12x cupy-cuda13x, then pip install "tinyft[gpu13]"' in text
    assert text.count("ERROR") == 2  # the other error is the missing device
    installed(fresh, cupy="13.0", cupy_cuda12x="14.1.0")
    assert 'pip uninstall -y cupy cupy-cuda12x, then pip install "tinyft[gpu12]"' in run_doctor(capsys)[1]
    installed(fresh, cupy_cuda12x="14.1.0")
    assert run_doctor(capsys)[1].count("ERROR") == 1


def test_an_error_is_printed_once(fresh, capsys):
    fresh.setitem(sys.modules, "cupy", pretended(product=1.0))
    fresh.setenv("TINYFT_BACKEND", "cupy")
    installed(fresh, cupy_cuda13x="14.2.0")
    status, text = run_doctor(capsys)
    assert status == 1 and text.count("wrong product") == 1


def test_a_device_is_described(fresh, capsys):
    fake = pretended()
    runtime = fake.cuda.runtime
    runtime.getDevice = lambda: 0
    runtime.driverGetVersion = lambda: 13010
    runtime.memGetInfo = lambda: (3 * 2**30, 2**32)
    runtime.getDeviceProperties = lambda i: {"name": b"A GPU", "major": 9, "minor": 0, "multiProcessorCount": 132}
    fake.ndarray = type("ndarray", (), {})
    fresh.setitem(sys.modules, "cupy", fake)
    fresh.setattr(array, "_when_opened", {})
    installed(fresh, cupy_cuda13x="14.2.0")
    fresh.setenv("TINYFT_BACKEND", "auto")
    status, text = run_doctor(capsys)
    assert status == 0 and "cupy-cuda13x 14.2.0, works" in text
    assert "backend  cupy, by TINYFT_BACKEND=auto: CuPy works" in text
    assert "CUDA 13.1" in text and "A GPU, compute capability 9.0, 132 multiprocessors; 3.0 of 4.0 GiB free" in text


COMPILED = [
    ("numba", True, {OPS["gelu"]: None, OPS["linear"]: None}, "by Numba 9.8: gelu, linear; machine code in a_folder"),
    ("numba", True, {}, "none: Numba 9.8 does not run here"),
    ("numpy", True, None, "none, by TINYFT_KERNELS=numpy; Numba 9.8 is there"),
    ("numpy", False, None, 'none: pip install "tinyft[fast]" adds compiled kernels'),
]


@pytest.mark.parametrize("in_use, has_numba, compiled, text", COMPILED, ids=["used", "fails", "not used", "missing"])
def test_the_kernels_in_use(monkeypatch, in_use, has_numba, compiled, text):
    for name, value in {"in_use": in_use, "has_numba": has_numba, "compiled_kernels": compiled,
                        "cache_folder": "a_folder"}.items():
        monkeypatch.setattr(doctor.kernels, name, lambda value=value: value)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.8")
    assert dict(doctor.examine()[0])["compiled"] == text


def test_an_error_of_numba_is_text(monkeypatch):
    def fails() -> None:
        raise RuntimeError("TINYFT_KERNELS=numba wants a Numba that runs here")

    monkeypatch.setattr(doctor.kernels, "compiled_kernels", fails)
    monkeypatch.setattr(doctor.kernels, "has_numba", lambda: True)
    monkeypatch.setattr(doctor.kernels, "in_use", lambda: "numba")
    assert dict(doctor.examine()[0])["compiled"] == "none: TINYFT_KERNELS=numba wants a Numba that runs here"


def test_numpy_without_kernels_or_a_known_blas(monkeypatch):
    monkeypatch.setattr(doctor.system, "libraries", lambda: [])
    with tinyft.kernels.definitions():
        lines = dict(doctor.examine()[0])
    assert "BLAS of the system, whose threads cannot be set" in lines["NumPy"]
    assert lines["kernels"].startswith("off") and "compiled" not in lines
