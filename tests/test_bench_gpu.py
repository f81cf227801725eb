"""make bench-gpu without its measurements: separate sections, results written row by row, targets beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tinyft import array

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.append(str(BENCHMARKS))
import gpu  # noqa: E402
import gpu_report  # noqa: E402

DONE = "print('{\"done\": true}', flush=True)\n"
ROW = "print('{\"what\": \"a\", \"ms\": 1.5}', flush=True)\n"
TALK = "print('a library says hello')\nimport sys\nprint('and warns', file=sys.stderr)\n"
CHILD = "import subprocess; subprocess.Popen(['sleep', '1000'])\n"
# name: (program, number of rows, error)
SECTIONS = {
    "good": (ROW + DONE, 1, None),
    "talks": (TALK + ROW + DONE, 1, None),
    "raises": (ROW + "raise ValueError('no such thing')\n", 1, "ended with 1: ValueError: no such thing"),
    "dies": (ROW + "import os; os.abort()\n", 1, "ended with -6: and said nothing"),
    "hangs": (ROW + "import time; time.sleep(1000)\n" + DONE, 1, "stopped after 2 s"),
    "leaves a child behind": (ROW + CHILD + DONE, 1, None),
    "hangs with a child": (
        "import subprocess, time; subprocess.Popen(['sleep', '1000']); time.sleep(1000)\n",
        0,
        "stopped after 2 s",
    ),
    "says nothing": ("", 0, "ended with 0: and said nothing"),
}


def as_command(name: str, smoke: bool) -> list[str]:
    return [sys.executable, "-c", SECTIONS[name][0]]


def test_a_section_that_fails_is_written_down_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "LIMITS", {name: 2 if "hangs" in name else 300 for name in SECTIONS})
    failed = gpu.measure(list(SECTIONS), tmp_path, smoke=False, minutes=5, command=as_command)
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    for name, (_, rows, error) in SECTIONS.items():
        assert len(found[name]["rows"]) == rows and found[name]["error"] == error, name
    assert failed == [f"{name}: {error}" for name, (_, _, error) in SECTIONS.items() if error]
    page = (tmp_path / "gpu.md").read_text()
    assert "- **failed**, ended with 1: ValueError: no such thing" in page and page.count("| a | 1.5 |") == 6
    assert "and warns" in (tmp_path / "gpu-talks.log").read_text() and not list(tmp_path.glob("*.part"))


def test_a_section_without_time_left_is_reported(tmp_path, capsys):
    failed = gpu.measure(["good"], tmp_path, smoke=False, minutes=0.0, command=as_command)
    assert failed == ["good: not begun: no time was left"]


def test_rows_are_on_disk_before_the_section_ends(tmp_path, monkeypatch, capsys):
    counts = []
    original = gpu.Results.write

    def write(self):
        original(self)
        written = json.loads((tmp_path / "gpu.json").read_text())
        counts.append(len(written["sections"]["good"]["rows"]))

    monkeypatch.setattr(gpu.Results, "write", write)
    gpu.measure(["good"], tmp_path, smoke=False, minutes=1, command=as_command)
    assert counts == [1, 1]


def test_without_a_device_nothing_is_written_and_the_sentence_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(array, "why_no_cupy", lambda: "there is no NVIDIA driver: ...")
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert "no benchmark without a device: there is no NVIDIA driver" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "kernles"], "no section 'kernles'; there are environment"),
        (["--smoke", "--out", str(gpu.RESULTS)], "measures nothing"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert words in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the page
def section(*rows: dict, error: str | None = None) -> dict:
    return {"rows": list(rows), "error": error, "seconds": 1.0}


def test_targets_are_beside_what_was_measured_and_the_worst_row_counts():
    rows = [{"what": n, "reaches": {"lesson": r}} for n, r in (("tiny", 4.0), ("small", 2.9), ("mid", 3.5))]
    int4 = {"what": "8192", "reaches": {"int4": 0.61}}
    page = gpu_report.report({"sections": {"lesson": section(*rows), "int4": section(int4)}})
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    of_target = {t.key: lines[t.says] for t in gpu_report.TARGETS}
    assert "≥ 3× | 2.9× (the worst of 3) | **missed** |" in of_target["lesson"]
    assert "≥ 0.6 | 0.61 | reached |" in of_target["int4"]
    assert "not measured |  |" in of_target["gpt2 bf16"]
    wanted = {"lesson": 3, "gpt2 fp32": 1, "gpt2 tf32": 1, "gpt2 bf16": 0.8, "int4": 0.6}
    assert {t.key: t.least for t in gpu_report.TARGETS} == wanted


def test_a_table_has_a_column_for_every_name_of_its_rows():
    ratio = {"ratio": 1.5, "low": 1.25, "high": 2.0, "rounds": 9}
    rows = [
        {"what": "fp32", "ms": 12.345, "right": True, "ratio": ratio},
        {"what": "bf16", "note": "not available: x"},
        {"what": "tf32", "error": "ValueError: x\ny"},
    ]
    sections = {
        "environment": section({"what": "device", "value": "A | GPU"}),
        "gpt2": section(*rows, error="stopped after 9 s"),
    }
    page = gpu_report.report({"date": "2026-01-01", "sections": sections})
    wanted = (
        "2026-01-01: A | GPU.",
        "| device | A / GPU |",
        "|  | ms | right | ratio | note |",
        "| fp32 | 12.3 | yes | 1.5 [1.25, 2] |  |",
        "| bf16 |  |  |  | not available: x |",
        "- **failed**, tf32: ValueError: x y",
        "- **failed**, stopped after 9 s",
    )
    for line in wanted:
        assert line in page


def test_values_have_three_digits():
    values = {False: "**no**", None: "", 12345.6: "12,346", 1e-7: "1.0e-07", float("nan"): "nan", 50257: "50,257"}
    assert [gpu_report.value(x) for x in values] == list(values.values()) and gpu_report.value(0.0) == "0"


def test_the_page_in_the_results_says_what_was_measured_and_no_more():
    measured = BENCHMARKS / "results" / "gpu.json"
    page = (BENCHMARKS / "results" / "gpu.md").read_text(encoding="utf-8")
    assert page == gpu_report.report(json.loads(measured.read_text()) if measured.exists() else {})
    assert ("Not yet run on a device" in page) == (not measured.exists()) and "fake GPU" not in page
