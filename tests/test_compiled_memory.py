"""The account of memory where the compiled kernels run: against the allocator, and beside wrong accounts."""

from __future__ import annotations

import pytest
import test_memory as account
from test_memory import BERT, GPT, LLAMA, SEQ2SEQ, SWITCH, T5, check_peak

import tinyft as ft
from tinyft import array, kernels

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(
    array.backend() != "numpy" or kernels.in_use() != "numba", reason="the account is that of the compiled kernels",
)
CASES = [
    *[(GPT, name, 6, {}) for name in ("full", "lora", "bitfit", "houlsby", "prefix")],
    (BERT, "full", 6, {}), (LLAMA, "full", 6, {}), (LLAMA, "lora", 6, {}), (T5, "full", 6, {}),
    (SEQ2SEQ, "lora", 6, {}),
    (SWITCH, "full", 6, {}), (GPT, "full", 4, {"recompute": True}), (GPT, "full", 4, {"autocast": "bfloat16"}),
    (ft.GPTConfig(vocab=512, positions=128, width=160, layers=2, heads=5, dropout=0.1), "full", 6, {}),
]


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The first step of a process compiles, builds caches and imports modules."""
    account.measured_peak(ft.GPTConfig(vocab=9, positions=8, width=8, layers=1, heads=1), ft.Houlsby(m=1), 1, 4)


@pytest.mark.parametrize("config, name, B, options", CASES, ids=lambda value: str(value)[:24])
def test_the_peak_is_that_of_the_allocator(config, name, B, options):
    check_peak(ft.memory, config, name, B, **options)


def numpy_account(*arguments, **options):
    """The account of the NumPy kernels."""
    with kernels.numpy_only():
        return ft.memory(*arguments, **options)


def test_the_account_of_the_numpy_kernels_is_rejected():
    with pytest.raises(AssertionError):
        for config, name, B, options in CASES:
            check_peak(numpy_account, config, name, B, **options)
