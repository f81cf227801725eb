"""The scores of generated texts: names by their words, targets by text and words, responses by text."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from command_tools import result_of, small_model, write_rows
from helpers import host_only

import tinyft as ft
from tinyft import data
from tinyft.commands import evaluating
from tinyft.commands.scores import score_texts
from tinyft.data.files import Rows
from tinyft.data.scores import exact_match, token_f1

pytestmark = host_only

WANTED = ["get_lines", "close", "open_it", "read"]
WRITTEN = [" get lines", "Close", "it open", "read\n"]   # the same words; another case; another order; the same text
SCORES = {
    ("names", "pairs"): {"exact_match": 0.75, "token_f1": 1.0},
    ("a.jsonl", "sources"): {"exact_match": 0.25, "token_f1": 1.0},
    ("a.jsonl", "pairs"): {"exact_match": 0.25},
    ("a.jsonl", "chat"): {"exact_match": 0.25},
}


def check_scores(score: Callable[[Rows, Sequence[str], Sequence[str]], dict[str, float]]) -> None:
    for (path, kind), scores in SCORES.items():
        assert score(Rows(path, kind, (), ()), WANTED, WRITTEN) == scores


def test_each_kind_of_rows_has_its_scores():
    check_scores(score_texts)
    with pytest.raises(ValueError, match="as many predictions as names and at least one"):
        score_texts(Rows("a.jsonl", "pairs", (), ()), WANTED, WRITTEN[:2])


def names_as_texts(rows, wanted, written):
    equal = sum(a.strip() == b.strip() for a, b in zip(wanted, written)) / len(wanted)
    scores = {"exact_match": equal, "token_f1": float(token_f1(wanted, written).mean())}
    return scores if rows.path == "names" or rows.kind == "sources" else {"exact_match": equal}


def all_by_words(rows, wanted, written):
    scores = {"exact_match": float(exact_match(wanted, written).mean())}
    if rows.path == "names" or rows.kind == "sources":
        scores["token_f1"] = float(token_f1(wanted, written).mean())
    return scores


def unstripped(rows, wanted, written):
    if rows.path == "names":
        return score_texts(rows, wanted, written)
    right = score_texts(rows, wanted, written)
    return right | {"exact_match": sum(map(str.__eq__, wanted, written)) / len(wanted)}


def no_f1_of_targets(rows, wanted, written):
    scores = score_texts(rows, wanted, written)
    return {"exact_match": scores["exact_match"]} if rows.kind == "sources" else scores


@pytest.mark.parametrize("wrong", [names_as_texts, all_by_words, unstripped, no_f1_of_targets])
def test_other_scores_are_noticed(wrong):
    with pytest.raises(AssertionError):
        check_scores(wrong)


def test_eval_compares_names_by_their_words(capsys, tmp_path, monkeypatch):
    """A model that writes the words of each name with spaces is right. A file with the same rows compares texts."""
    sizes = {"vocab": 2048, "positions": 64, "width": 8, "layers": 1, "heads": 1}
    model = str(ft.save(ft.Seq2Seq(ft.Seq2SeqConfig(**sizes), 0), tmp_path / "marian", data.shipped_tokenizer()))
    names = {prompt: name for prompt, name in evaluating.read_data("names", "test").rows}

    def write_words(model, tokenizer, prompts, **options):
        return [names[prompt].replace("_", " ") for prompt in prompts]

    monkeypatch.setattr(evaluating, "predict", write_words)
    result = result_of(capsys, "eval", "--model", model, "--data", "names", "--generate")
    assert result["exact_match"] == result["token_f1"] == 1
    file = write_rows(tmp_path / "a.jsonl", [{"source": prompt, "target": name} for prompt, name in names.items()])
    result = result_of(capsys, "eval", "--model", model, "--data", file, "--generate")
    assert result["token_f1"] == 1 and result["exact_match"] < 0.9


def test_eval_of_pairs_reports_no_f1(capsys, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "Close it:", "response": " close"}])
    result = result_of(capsys, "eval", "--model", small_model(tmp_path), "--data", file, "--generate")
    assert "exact_match" in result and "token_f1" not in result
