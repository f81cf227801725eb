"""The README's section on one's own data runs as it is printed, with fewer steps."""
from __future__ import annotations

import csv
import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
WORDS = "the list returns an item of this name if it is found and none of them is empty".split()


def code_of(section: str) -> str:
    """The Python code of a section of the README."""
    text = README.read_text(encoding="utf-8")
    part = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", part, re.DOTALL))


def test_your_own_data(tmp_path, monkeypatch, capsys):
    """A CSV file of two classes, and a plain text file."""
    monkeypatch.chdir(tmp_path)
    with open("reviews.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(60):
            writer.writerow([f"It was a {['dull', 'lovely'][i % 2]} film, {i}.", ["bad", "good"][i % 2]])
    Path("notes.txt").write_text(" ".join(WORDS * 60), encoding="utf-8")
    code = code_of("Your own data")
    assert code.count("steps=200") == 2
    names = {}
    exec(compile(code.replace("steps=200", "steps=2, progress=False"), "README.md", "exec"), names)
    assert names["classes"] == ["bad", "good"]
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "probabilities" in printed
    assert printed.splitlines()[-1].startswith("['")       # the list of one continuation
