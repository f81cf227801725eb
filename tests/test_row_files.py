"""Files of rows: the entries of each key, and the refusal of files whose arrays do not fit each other."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import host_only, wrong_answers
from test_loss import BATCHES, make_gpt
from test_sequence import make_batch, make_beams

from tinyft import TeacherCache
from tinyft.compress.distill import beams, cache
from tinyft.compress.distill.row_files import find_rows
from tinyft.files import read_tensors, write_tensors

pytestmark = host_only
Arrays = dict[str, np.ndarray]
FILE = Path("rows-000000.safetensors")


def make_arrays(seed: int) -> Arrays:
    """Rows with 0 to 3 entries, each with a number and two columns."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, 5)
    N = int(counts.sum())
    return {"keys": rng.integers(0, 256, (5, 16)).astype(np.uint8), "counts": counts, "number": np.arange(N),
            "columns": rng.standard_normal((N, 2)), "text": np.zeros(99)}


def test_each_row_has_its_entries():
    for seed in range(20):
        arrays = make_arrays(seed)
        rows = find_rows(FILE, arrays, ["number", "columns"], ["text"])
        assert [key for key, _ in rows] == [key.tobytes() for key in arrays["keys"]]
        numbers = [arrays["number"][own].tolist() for _, own in rows]
        assert [len(own) for own in numbers] == arrays["counts"].tolist()
        assert sum(numbers, []) == arrays["number"].tolist()


DAMAGE: dict[str, Callable[[Arrays], Arrays]] = {
    "an array is missing": lambda arrays: {name: a for name, a in arrays.items() if name != "counts"},
    "another array": lambda arrays: {**arrays, "other": np.ones(3)},
    "keys in one row": lambda arrays: {**arrays, "keys": arrays["keys"].reshape(-1)},
    "a key too few": lambda arrays: {**arrays, "keys": arrays["keys"][1:]},
    "a count too many": lambda arrays: {**arrays, "counts": np.append(arrays["counts"], 0)},
    "a count too high": lambda arrays: {**arrays, "counts": arrays["counts"] + 1},
}


def cut_each(arrays: Arrays, names: list[str]) -> list[Arrays]:
    """The arrays with one entry too few in one of them, and with a number in its place."""
    return [{**arrays, name: value} for name in names for value in (arrays[name][1:], np.array(3))]


def check_damage() -> None:
    arrays = make_arrays(3)
    damaged = [damage(arrays) for damage in DAMAGE.values()] + cut_each(arrays, ["number", "columns"])
    for some in damaged:
        with pytest.raises(ValueError, match=f"{FILE} is damaged"):
            find_rows(FILE, some, ["number", "columns"], ["text"])


def test_a_file_whose_arrays_do_not_fit_is_refused():
    check_damage()


right = find_rows


def one_array_decides(file: Path, arrays: Arrays, per_entry: list[str], others: list[str]) -> None:
    """If the first array has as many entries as the counts say, so have the others."""
    right(file, arrays, per_entry[:1], [*per_entry[1:], *others])


def any_array_may_be_there(file: Path, arrays: Arrays, per_entry: list[str], others: list[str]) -> None:
    """What is not read does no harm."""
    right(file, arrays, per_entry, arrays.keys() - {"keys", "counts", *per_entry})


@wrong_answers
@pytest.mark.parametrize("wrong", [one_array_decides, any_array_may_be_there])
def test_a_check_that_is_too_weak_is_caught(wrong, monkeypatch):
    monkeypatch.setitem(globals(), "find_rows", wrong)
    with pytest.raises(pytest.fail.Exception):
        check_damage()


# ── the two kinds of file ────────────────────────────────────────────────────────────────────────────────────────────
def test_damaged_files_of_a_teachers_outputs_are_refused(tmp_path):
    """The checksum finds damaged bytes; here the content is wrong and the checksum right."""
    TeacherCache(tmp_path / "cache", make_gpt(3), k=4).fill(BATCHES[:1])
    make_beams(tmp_path / "beams").fill([make_batch(1)])
    readers = {"cache": (lambda: TeacherCache(tmp_path / "cache"), ["values", "columns", "tails"]),
               "beams": (lambda: make_beams(tmp_path / "beams"), ["tokens", *beams.PER_HYPOTHESIS])}
    for name, (read, columns) in readers.items():
        file = tmp_path / name / FILE
        arrays, facts = read_tensors(file)
        assert len(read()) == len(arrays["keys"])
        damaged = [damage(arrays) for damage in DAMAGE.values()] + cut_each(arrays, columns)
        if name == "cache":
            damaged.append({**arrays, "tails": arrays["tails"][:, :1]})
            damaged.append({**arrays, "columns": arrays["columns"][:, :1]})
        for some in damaged:
            write_tensors(file, some, facts)
            with pytest.raises(ValueError, match="is damaged"):
                read()
    assert cache.find_rows is beams.find_rows is right
