"""Real CuPy where something is missing: each situation is made, in a process of its own, and answered by one sentence
with the command that helps.
"""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulate
import pytest

HERE = Path(__file__).parent
# name: (code that makes the situation, the beginning of the library's message)
SITUATIONS = {
    "no driver": ("", "there is no NVIDIA driver: sudo ubuntu-drivers install (on Ubuntu), or docker run --gpus all"),
    "an old driver": ("from cupy.cuda import runtime; runtime.driverGetVersion = lambda: 12040",
                      "the NVIDIA driver knows CUDA 12 and this CuPy wants 13: "
                      'pip uninstall -y cupy-cuda13x && pip install "tinyft[gpu12]"'),
    "no device": ("emulate.install(); from cupy.cuda import runtime; "
                  "runtime.getDeviceCount = failing(runtime.CUDARuntimeError(100))",
                  "the NVIDIA driver shows no device: nvidia-smi -L lists"),
    "no NVRTC": ("from cuda import pathfinder; "
                 "pathfinder.load_nvidia_dynamic_lib = without('nvrtc'); emulate.install()",
                 'NVRTC, which compiles kernels, is not installed: pip install "tinyft[gpu13]"'),
    "no cuBLAS": ("emulate.install(); pathfinder.load_nvidia_dynamic_lib = without('cublas')",
                  'cuBLAS, which multiplies matrices, is not installed: pip install "tinyft[gpu13]"'),
    "nothing missing": ("emulate.install()", "None"),
    "kernels that do nothing": ("emulate.install(); fake_gpu.execute = lambda *a: None",
                                "the GPU computed a wrong product"),
}
START = """
import fake_gpu, emulate
from cuda import pathfinder
real = pathfinder.load_nvidia_dynamic_lib
def failing(e):
    def f(*a):
        raise e
    return f
def without(name):
    missing = failing(pathfinder.DynamicLibNotFoundError(f'Failure finding "lib{name}.so.13"'))
    return lambda wanted: missing() if wanted == name else real(wanted)
"""
END = """
from tinyft import array, cli
print(array.why_no_cupy())
array.use('auto')
print(array.backend())
print(cli.main(['doctor']))
try:
    array.use('cupy')
    print('used')
except array.BackendError as e:
    print(e)
"""


@pytest.mark.parametrize("what", SITUATIONS)
def test_what_is_missing_is_named_with_the_command_that_helps(what):
    if "driver" in what and Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a driver")
    first, sentence = SITUATIONS[what]
    env = {k: v for k, v in os.environ.items() if k not in ("TINYFT_BACKEND", "CUDA_VISIBLE_DEVICES")}
    env |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
            "TINYFT_EMULATED_CACHE": str(emulate.FOLDER)}
    run = subprocess.run([sys.executable, "-c", START + first + END], env=env, capture_output=True, text=True,
                         timeout=300)
    assert run.returncode == 0, run.stderr
    said, auto, *report, status, used = run.stdout.strip().splitlines()
    assert said.startswith(sentence) and "\n" not in said
    if sentence == "None":
        assert (auto, status, used) == ("cupy", "0", "used")
        assert any("fake GPU" in line for line in report)
    else:
        assert (auto, status) == ("numpy", "1")
        assert f"ERROR    {said}" in report
        assert used == f"cannot use the backend 'cupy': {said}"
