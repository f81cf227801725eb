"""The README: its code runs as printed, its transcript is what a command prints, its table of lessons is whole."""
from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

from helpers import host_only

from tinyft import cli
from tinyft.learn.exercise import exercises, of_lesson
from tinyft.learn.folders import lessons

pytestmark = host_only

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


def test_every_command_is_understood():
    """Each line `$ tinyft ...` of the README parses: its command and all its options are there."""
    text = README.read_text(encoding="utf-8")
    lines = re.findall(r"^\$ tinyft (.*)$", text, re.MULTILINE)
    assert any(line.startswith("distill ") for line in lines) and len(lines) > 10
    for line in lines:
        words = shlex.split(line, comments=True)
        assert cli.parser().parse_args(words).command == words[0]


def test_the_table_of_lessons_is_complete():
    """Every lesson with its folder and the number of its exercises."""
    text = README.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d\d) \| \[(\w+)\]\(lessons/(\w+)/lesson\.py\) \| .* \| (\d+) \|$", text, re.MULTILINE)
    expected = []
    for lesson in lessons().values():
        expected.append((lesson.folder[:2], lesson.name, lesson.folder, str(len(of_lesson(lesson.name)))))
    assert rows == expected


def test_the_transcript_of_a_check_is_what_the_command_prints(tmp_path, monkeypatch, capsys):
    """The README's check of `sum_to` after a first try, but for the seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    cli.main(["start", "sum_to"])
    path = Path("work/autograd.sum_to.py")
    written = path.read_text(encoding="utf-8").split("    raise NotImplementedError")[0]
    path.write_text(f"{written}    return g.sum(axis=tuple(range(g.ndim - len(shape))))\n", encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["check"]) == 1
    printed = without_seconds(capsys.readouterr().out)
    text = README.read_text(encoding="utf-8")
    shown = text.split("$ tinyft check\n")[1].split("```")[0]
    assert without_seconds(shown).strip() == printed.strip()


def without_seconds(text: str) -> str:
    return re.sub(r"  \(\d+\.\d+s\)", "", text)


def test_no_solution_of_an_exercise_is_shown():
    """No two lines in a row of a solution stand in the README."""
    text = " ".join(README.read_text(encoding="utf-8").split())
    for e in exercises().values():
        lines = [" ".join(line.split()) for line in e.source().splitlines()]
        for first, second in zip(lines, lines[1:]):
            assert len(first) + len(second) < 50 or f"{first} {second}" not in text, e.name
