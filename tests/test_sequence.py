"""Sequence-level distillation and interpolation: the choice of a text, batches with new targets, and texts on disk.

The checks are called with the library's functions, and again with each wrong one of WRONG, which they must reject.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import host, rejects, wrong_answers
from test_loss import Stop, equal, stop_at, values_of
from wrong import replaced

import tinyft as ft
from tinyft import Hypothesis, Interpolation, SequenceLevel, TeacherBeams, beam_search, sentence_bleu
from tinyft.compress.distill import beams as beams_module
from tinyft.compress.distill import sequence
from tinyft.train.batch import read_batch

V, START, END, N = 11, 2, 1, 5                           # N: the longest text of the teacher


def make_teacher(kind: str = "marian", seed: int = 0, **more: Any) -> ft.Module:
    """A model at a generic point, whose distributions are far from uniform; some of its texts end, others do not."""
    sizes = {"vocab": V, "width": 12, "layers": 1, "heads": 3, "hidden": 16, "start": START, **more}
    if kind == "t5":
        model = ft.T5(ft.T5Config(**sizes, head_width=4, buckets=8, max_distance=6), seed)
    else:
        model = ft.Seq2Seq(ft.Seq2SeqConfig(**sizes, positions=12), seed)
    rng = np.random.default_rng(seed + 9)
    for p in model.parameters():
        p.copy_(host(p) * 2 + rng.standard_normal(p.shape) * 0.4)
    return model.to(dtype=np.float64).eval()


def make_batch(seed: int = 0, rows: int = 6) -> dict[str, np.ndarray]:
    """Sources of 1 to 6 tokens and targets of 1 to 4 and the end, padded on the right."""
    rng = np.random.default_rng(seed)
    mask = np.arange(6) < rng.integers(1, 7, (rows, 1))
    text = rng.integers(3, V, (rows, 6))
    text[:, 0] = START
    lengths = rng.integers(1, 5, rows)
    text[np.arange(rows), lengths + 1] = END
    return {"ids": text, "mask": np.arange(6) < lengths[:, None] + 2, "source_ids": rng.integers(3, V, (rows, 6)),
            "source_mask": mask}


def make_beams(folder: Path | None = None, seed: int = 0, **settings: Any) -> TeacherBeams:
    settings = {"end": END, "max_new_tokens": N, "beams": 4, **settings}
    return TeacherBeams(folder, make_teacher(seed=seed), **settings)


def texts(batch: dict) -> list[tuple[int, ...]]:
    """The real ids of each row."""
    return [tuple(row[real].tolist()) for row, real in zip(batch["ids"], batch["mask"], strict=True)]


def words(tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token not in (START, END)]


# ── the choice ───────────────────────────────────────────────────────────────────────────────────────────────────────
def draw(seed: int, *, ended: bool | None = None) -> tuple[list[Hypothesis], list[int]]:
    """Hypotheses over few tokens, best first, so that many are equally similar to the gold text; some are cut off."""
    rng = np.random.default_rng(seed)
    scores = -np.sort(rng.integers(0, 4, int(rng.integers(1, 9))).astype(float))
    found = []
    for score in scores.tolist():
        is_ended = rng.random() < 0.6 if ended is None else ended
        text = rng.integers(3, 6, int(rng.integers(0, 6))).tolist()
        found.append(Hypothesis((*text, END) if is_ended else (*text, 3), score, 2 * score, is_ended))
    return found, [*rng.integers(3, 6, int(rng.integers(1, 6))).tolist(), END]


def similarity(h: Hypothesis, gold: list[int]) -> float:
    return sentence_bleu(words(h.tokens), words(gold))


def check_choice() -> None:
    """ŷ is the best text that has ended; ỹ the most similar one of these, by a search over all."""
    beams = make_beams()
    for seed in range(150):
        hypotheses, gold = draw(seed)
        ended = [h for h in hypotheses if h.ended] or hypotheses
        assert SequenceLevel(beams).choose(hypotheses, gold) is ended[0]
        chosen = Interpolation(beams).choose(hypotheses, gold)
        best = max(similarity(h, gold) for h in ended)
        ties = [h for h in ended if similarity(h, gold) == best]
        assert chosen is ties[0], "of equal ones, the better score, then the lower rank"
        assert all(similarity(chosen, gold) >= similarity(h, gold) for h in ended)


def check_special_tokens() -> None:
    """Start and end are no words: they make nothing more similar."""
    method = Interpolation(make_beams())
    a = Hypothesis((START, 4, 5, END), -1.0, -1.0, ended=True)
    b = Hypothesis((3, 4, 5, 6, 7, END), -2.0, -2.0, ended=True)
    assert method.choose([a, b], [3, 4, 5, 6, 7, END]) is b
    begins = Hypothesis((START, 3, 4, 5, 6, END), -2.0, -2.0, ended=True)
    other = Hypothesis((3, 4, 5, 6, 9, END), -1.0, -1.0, ended=True)
    assert method.choose([other, begins], [3, 4, 5, 6, 7, END]) is begins
    ends = Hypothesis((END,), -0.5, -0.5, ended=True)
    c = Hypothesis((9, 3, 9, 9, END), -3.0, -3.0, ended=True)
    assert method.choose([ends, c], [3, END]) is c, "an empty text has no word in common"


def check_one_beam() -> None:
    """With one hypothesis both choose it."""
    beams = make_beams()
    for seed in range(40):
        (first, *_), gold = draw(seed)
        assert Interpolation(beams).choose([first], gold) is SequenceLevel(beams).choose([first], gold) is first


def check_gold() -> None:
    """If the gold text is among the hypotheses, it is chosen, at any rank."""
    method = Interpolation(make_beams())
    for seed in range(80):
        hypotheses, gold = draw(seed)
        rank = seed % (len(hypotheses) + 1)
        found = [*hypotheses[:rank], Hypothesis(tuple(gold), -9.0, -9.0, ended=True), *hypotheses[rank:]]
        assert words(method.choose(found, gold).tokens) == words(gold)


def check_more_beams() -> None:
    """The largest similarity does not fall with more hypotheses."""
    method = Interpolation(make_beams())
    for seed in range(80):
        hypotheses, gold = draw(seed, ended=True)
        values = []
        for K in range(1, len(hypotheses) + 1):
            values.append(similarity(method.choose(hypotheses[:K], gold), gold))
        assert values == sorted(values)


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────
KINDS = ("marian", "t5")


def check_targets() -> None:
    """Start, the text of beam search for the row's source alone, padding; all else as it was. Marian and T5."""
    for kind in KINDS:
        teacher = make_teacher(kind, 1)
        beams = TeacherBeams(None, teacher, end=END, max_new_tokens=N, beams=4)
        batch = make_batch(1)
        golds = texts(batch)
        kept = {name: value.copy() for name, value in batch.items()}
        by_rank, by_bleu = SequenceLevel(beams).map([batch])[0], Interpolation(beams).map([batch])[0]
        assert all(np.array_equal(batch[name], kept[name]) for name in kept), "the given batch is not changed"
        assert by_rank.keys() == {"ids", "mask", "source_ids", "source_mask"}
        for b, (source, real) in enumerate(zip(batch["source_ids"], batch["source_mask"], strict=True)):
            found = beam_search(teacher, None, N, beams=4, end=END, n_best=4, source_ids=source[real][None])[0]
            complete = [h for h in found if h.ended] or found
            assert texts(by_rank)[b] == (START, *complete[0].tokens)
            most_similar = max(complete, key=lambda h: similarity(h, golds[b]))  # the first of the largest
            assert texts(by_bleu)[b] == (START, *most_similar.tokens)
        for new in (by_rank, by_bleu):
            assert new["source_ids"] is batch["source_ids"]
            targets = read_batch(new)
            assert targets.weight == new["mask"].sum() - len(new["ids"]), "every token of a text is a target"


def check_labels() -> None:
    """A batch with labels gives the same targets as one with the whole text."""
    batch = make_batch(2)
    ids, mask = batch["ids"], batch["mask"]
    labels = np.where(mask[:, 1:], ids[:, 1:], -100)
    shifted = {**batch, "ids": ids[:, :-1], "mask": mask[:, :-1], "labels": labels}
    for method in (SequenceLevel(make_beams()), Interpolation(make_beams())):
        new = method.map_batch(shifted)
        assert "labels" not in new
        assert texts(new) == texts(method.map_batch(batch))


def check_padding() -> None:
    """More padding, its side, its ids, the order of the rows and the other rows change no target; nor does a repeat."""
    batch = make_batch(3)
    order = np.random.default_rng(0).permutation(6)
    other_ids = {name: np.where(batch[mask], batch[name], 7)
                 for name, mask in (("ids", "mask"), ("source_ids", "source_mask"))}
    variants = [{**batch, **other_ids}]
    for sides in ((0, 3), (3, 0)):
        variants.append({name: np.pad(value, ((0, 0), sides)) for name, value in batch.items()})
    for method in (SequenceLevel, Interpolation):
        expected = texts(method(make_beams()).map_batch(batch))
        beams = make_beams()
        for _ in range(2):
            assert texts(method(beams).map_batch(batch)) == expected
        for variant in variants:
            assert texts(method(make_beams()).map_batch(variant)) == expected
            assert texts(method(beams).map_batch(variant)) == expected
        assert beams.searches == 6, "a source is found in all of them"
        shuffled = {name: value[order] for name, value in batch.items()}
        assert texts(method(make_beams()).map_batch(shuffled)) == [expected[i] for i in order]
        for b in range(6):
            alone = {name: value[b:b + 1] for name, value in batch.items()}
            assert texts(method(make_beams()).map_batch(alone)) == expected[b:b + 1]


def check_teacher_rests() -> None:
    """The teacher decodes without dropout, and keeps its mode."""
    batch = make_batch(4)
    expected = texts(SequenceLevel(make_beams(seed=2)).map_batch(batch))
    teacher = make_teacher(seed=2, dropout=0.5).train()
    beams = TeacherBeams(None, teacher, end=END, max_new_tokens=N, beams=4)
    assert texts(SequenceLevel(beams).map_batch(batch)) == expected
    assert all(module.training for module in teacher.modules())


def check_mode() -> None:
    """With as many beams as texts, ŷ is the most probable text of all that end: by enumeration."""
    teacher = make_teacher(seed=3, vocab=4)
    beams = TeacherBeams(None, teacher, end=END, max_new_tokens=3, beams=64, lp=ft.GNMTPenalty(0.0))
    batch = make_batch(5)
    batch["source_ids"] %= 4
    batch["ids"] = np.where(batch["ids"] > 3, 3, batch["ids"])
    new = SequenceLevel(beams).map_batch(batch)
    for b in range(6):
        facts = {"source_ids": batch["source_ids"][b:b + 1], "source_mask": batch["source_mask"][b:b + 1]}
        best = ((), -np.inf)
        for text in every_ended_text():
            z = host(teacher([[START, *text[:-1]]], **facts))[0]
            log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
            total = float(log_p[np.arange(len(text)), text].sum())
            best = max(best, (text, total), key=lambda pair: pair[1])
        assert texts(new)[b] == (START, *best[0])


def every_ended_text() -> list[tuple[int, ...]]:
    """All texts of up to 3 of the tokens 0 ... 3 whose last token, and no other, is the end."""
    others = [0, 2, 3]
    found = [(END,)]
    found += [(a, END) for a in others]
    found += [(a, b, END) for a in others for b in others]
    return found


CHECKS = [check_choice, check_special_tokens, check_one_beam, check_gold, check_more_beams, check_targets, check_labels,
          check_padding, check_teacher_rests, check_mode]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sequence_level_distillation(check):
    check()


# ── wrong ones ───────────────────────────────────────────────────────────────────────────────────────────────────────
Choice = Callable[[Any, Sequence[Hypothesis], Sequence[int]], Hypothesis]


def by_similarity(key: Callable[[Any, Hypothesis, Sequence[int]], Any], *, unfinished: bool = False) -> Choice:
    """An interpolation with another key; the first of the largest is chosen."""
    def choose(self: Any, hypotheses: Sequence[Hypothesis], gold: Sequence[int]) -> Hypothesis:
        candidates = hypotheses if unfinished else sequence.complete(hypotheses)
        return max(candidates, key=lambda h: key(self, h, gold))
    return choose


def last_of_equal(self: Any, hypotheses: Sequence[Hypothesis], gold: Sequence[int]) -> Hypothesis:
    candidates = sequence.complete(hypotheses)[::-1]
    return max(candidates, key=lambda h: similarity(h, gold))


def f1(self: Any, h: Hypothesis, gold: Sequence[int]) -> float:
    common = sum(min(h.tokens.count(token), list(gold).count(token)) for token in set(words(gold)))
    return 2 * common / max(len(words(h.tokens)) + len(words(gold)), 1)


def whole_tokens(self: Any, tokens: Sequence[int]) -> list[int]:
    return list(tokens)


def only_the_end(self: Any, tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token != END]


def first_of_all(self: Any, hypotheses: Sequence[Hypothesis], gold: Sequence[int]) -> Hypothesis:
    return hypotheses[0]


def by_log_prob(self: Any, hypotheses: Sequence[Hypothesis], gold: Sequence[int]) -> Hypothesis:
    return min(hypotheses, key=lambda h: len(h.tokens))


def gold_if_unlike(self: Any, hypotheses: Sequence[Hypothesis], gold: Sequence[int]) -> Hypothesis:
    """The data's target, if no text has a word in common with it."""
    chosen = right_choice(self, hypotheses, gold)
    return chosen if similarity(chosen, gold) else Hypothesis(tuple(gold), 0.0, 0.0, ended=True)


def without_end(rows: Sequence[Sequence[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    return right_pad([row[:-1] if row[-1] == END and len(row) > 2 else row for row in rows], fill)


def without_mask(rows: Sequence[Sequence[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = right_pad(rows, fill)
    return ids, mask | True


def without_start(rows: Sequence[Sequence[int]], fill: int) -> tuple[np.ndarray, np.ndarray]:
    return right_pad([row[1:] for row in rows], fill)


def keys_with_padding(targets: ft.Targets) -> list[bytes]:
    return [row.tobytes() for row in np.asarray(targets.facts["source_ids"])]


def keys_of_sets(targets: ft.Targets) -> list[bytes]:
    """A source is known by its length."""
    mask = targets.facts.get("source_mask", np.ones(targets.facts["source_ids"].shape, bool))
    return [bytes([int(n)]) for n in np.asarray(mask).sum(axis=1)]


def search_without_mask(*args: Any, source_mask: Any = None, **facts: Any) -> list[list[Hypothesis]]:
    return right_search(*args, **facts)


def search_in_training(model: ft.Module, *args: Any, **facts: Any) -> list[list[Hypothesis]]:
    """A teacher in training mode is another model."""
    return right_search(make_teacher(seed=4) if model.training else model, *args, **facts)


def greedy_search(*args: Any, **facts: Any) -> list[list[Hypothesis]]:
    return right_search(*args, **{**facts, "beams": 1})


def best_only(*args: Any, **facts: Any) -> list[list[Hypothesis]]:
    return right_search(*args, **{**facts, "n_best": 1})


def old_labels(self: Any, batch: dict) -> dict:
    """The labels of the batch stay where they are."""
    new = right_map(self, batch)
    return {**new, **({"labels": batch["labels"]} if "labels" in batch else {})}


def in_place(self: Any, batch: dict) -> dict:
    """The given batch itself gets the new targets."""
    new = right_map(self, batch)
    batch.update(new)
    return batch


right_choice = Interpolation.choose
right_pad = sequence.pad_right
right_search = beams_module.beam_search
right_map = sequence.NewTargets.map_batch
WRONG: dict[str, tuple[Any, str, Any]] = {
    "The most similar text is the one that the teacher likes best.": (Interpolation, "choose", SequenceLevel.choose),
    "A text that was cut off may be the most similar one.":
        (Interpolation, "choose", by_similarity(lambda self, h, gold: similarity(h, list(gold)), unfinished=True)),
    "BLEU of gold given the text is the same.":
        (Interpolation, "choose", by_similarity(lambda self, h, gold: sentence_bleu(words(gold), words(h.tokens)))),
    "Any similarity will do, such as F1.": (Interpolation, "choose", by_similarity(f1)),
    "Of equally similar texts any is as good.": (Interpolation, "choose", last_of_equal),
    "A text that is unlike the gold one teaches nothing.": (Interpolation, "choose", gold_if_unlike),
    "The end is a word like others.": (Interpolation, "words", whole_tokens),
    "Only the end is no word.": (Interpolation, "words", only_the_end),
    "The first hypothesis is the best text.": (SequenceLevel, "choose", first_of_all),
    "The shortest text is the most probable one.": (SequenceLevel, "choose", by_log_prob),
    "The student knows where to end.": (sequence, "pad_right", without_end),
    "Padding is a part of the target.": (sequence, "pad_right", without_mask),
    "The text begins with its first token.": (sequence, "pad_right", without_start),
    "A source is its row of ids.": (beams_module, "source_keys", keys_with_padding),
    "Sources of one length have one target.": (beams_module, "source_keys", keys_of_sets),
    "The teacher sees padding as the student does.": (beams_module, "beam_search", search_without_mask),
    "The teacher decodes as it trains.": (beams_module, "beam_search", search_in_training),
    "The teacher's greedy text is its best.": (beams_module, "beam_search", greedy_search),
    "One hypothesis is enough for both.": (beams_module, "beam_search", best_only),
    "The labels of the batch go with it.": (sequence.NewTargets, "map_batch", old_labels),
    "Nobody needs the old targets.": (sequence.NewTargets, "map_batch", in_place),
}


@wrong_answers
@pytest.mark.parametrize("belief", WRONG)
def test_a_wrong_answer_is_caught(belief):
    owner, name, f = WRONG[belief]
    with replaced(owner, name, f):
        assert any(rejects(check) for check in CHECKS)


REJECTED = {
    check_choice: "Of equally similar texts any is as good.",
    check_special_tokens: "Only the end is no word.",
    check_one_beam: "A text that is unlike the gold one teaches nothing.",
    check_gold: "The most similar text is the one that the teacher likes best.",
    check_more_beams: "Any similarity will do, such as F1.",
    check_targets: "The student knows where to end.",
    check_labels: "The labels of the batch go with it.",
    check_padding: "A source is its row of ids.",
    check_teacher_rests: "The teacher decodes as it trains.",
    check_mode: "The teacher's greedy text is its best.",
}


@wrong_answers
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_property_rejects_something(check):
    owner, name, f = WRONG[REJECTED[check]]
    with replaced(owner, name, f):
        assert rejects(check)


# ── texts on disk ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_both_methods_and_later_runs_pay_the_teacher_once(tmp_path):
    batches = [make_batch(1), make_batch(2)]
    beams = make_beams(tmp_path / "beams")
    sources = {tuple(row[real]) for batch in batches
               for row, real in zip(batch["source_ids"], batch["source_mask"], strict=True)}
    assert beams.fill(batches) == len(sources) == len(beams)
    assert beams.fill([*batches, make_batch(3)]) == len(beams) - len(sources) > 0, "the new ones of this call"
    expected = [method(beams).map(batches) for method in (SequenceLevel, Interpolation)]
    assert beams.searches == len(beams)
    reopened = make_beams(tmp_path / "beams")
    for method, before in zip((SequenceLevel, Interpolation), expected, strict=True):
        for new, old in zip(method(reopened).map(batches), before, strict=True):
            assert texts(new) == texts(old)
    assert reopened.searches == 0 and reopened.fill(batches) == 0
    found = [reopened.look_up(read_batch(batch)) for batch in batches]
    assert found == [beams.look_up(read_batch(batch)) for batch in batches], "scores and flags, too"
    assert reopened.unfinished == beams.unfinished > 0


def test_five_beams_are_the_default_and_all_their_texts_are_kept():
    beams = TeacherBeams(None, make_teacher(), end=END, max_new_tokens=N)
    assert (beams.beams, beams.n_best) == (5, 5)
    assert max(map(len, beams.look_up(read_batch(make_batch())))) == 5


def test_a_source_of_other_whole_numbers_is_the_same_source():
    batch = make_batch()
    narrow = {**batch, "source_ids": batch["source_ids"].astype(np.int32)}
    assert beams_module.source_keys(read_batch(narrow)) == beams_module.source_keys(read_batch(batch))


def test_a_fill_that_was_stopped_goes_on(tmp_path):
    """A stop in a search, or while its file is written, leaves the whole entries of the searches before."""
    batches = [make_batch(seed) for seed in (1, 2, 3)]
    whole = make_beams()
    whole.fill(batches)
    right_write = beams_module.write_row_file
    stops = {"beam_search": right_search, "write_row_file": right_write}
    for name, right in stops.items():
        calls = []

        def third_call_stops(*args: Any, calls: list = calls, right: Any = right, **facts: Any) -> Any:
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return right(*args, **facts)
        with replaced(beams_module, name, third_call_stops), pytest.raises(KeyboardInterrupt):
            make_beams(tmp_path / name).fill(batches)
        beams = make_beams(tmp_path / name)
        done = len(beams)
        assert 0 < done < len(whole)
        assert beams.fill(batches) == len(whole) - done
        for batch in batches:
            assert beams.look_up(read_batch(batch)) == whole.look_up(read_batch(batch))
        assert len(make_beams(tmp_path / name)) == len(whole)


def test_a_file_that_is_half_written_gives_no_entry(tmp_path):
    """The temporary file of a killed process is not read, and a file that was cut off is refused."""
    beams = make_beams(tmp_path)
    beams.fill([make_batch(1)])
    file = tmp_path / "rows-000000.safetensors"
    content = file.read_bytes()
    (tmp_path / ".rows-000001.safetensors.0123abcd").write_bytes(content[:100])
    assert len(make_beams(tmp_path)) == len(beams)
    for cut in (len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="damaged"):
            make_beams(tmp_path)
    changed = bytearray(content)
    changed[-3] ^= 1
    file.write_bytes(changed)
    with pytest.raises(ValueError, match="damaged"):
        make_beams(tmp_path)


def test_texts_of_another_teacher_or_search_are_refused(tmp_path):
    make_beams(tmp_path).fill([make_batch(1)])
    with pytest.raises(ValueError, match="TeacherBeams wants hypotheses of this teacher, got those of another teacher"):
        make_beams(tmp_path, seed=1)
    with pytest.raises(ValueError, match="wants hypotheses with beams=5, got those with beams=4 in .*take another fol"):
        make_beams(tmp_path, beams=5, n_best=4)
    with pytest.raises(ValueError, match="wants hypotheses of this length penalty, got those of another length pena"):
        make_beams(tmp_path, lp=ft.GNMTPenalty(0.0))
    assert len(make_beams(tmp_path, lp=ft.GNMTPenalty(0.6))) > 0


def check_coverage(folder: Path, make: Callable[..., TeacherBeams]) -> None:
    """The texts are those of beam_search with the penalty. A folder has the texts of one weight; 0 is as without it."""
    batch = make_batch(3, 10)
    targets = read_batch(batch)
    facts = {name: batch[name] for name in ("source_ids", "source_mask")}
    wanted, without = [
        beam_search(make_teacher(), None, N, beams=4, end=END, n_best=4, coverage=coverage, **facts)
        for coverage in (2.0, 0.0)
    ]
    assert wanted != without
    with_penalty = make(folder / "covered", coverage=2.0)
    assert with_penalty.look_up(targets) == wanted
    assert make(folder / "covered", coverage=2).look_up(targets) == wanted
    assert make(folder / "plain").look_up(targets) == without
    assert len(make(folder / "plain", coverage=0.0)) > 0
    with pytest.raises(ValueError, match="wants hypotheses with coverage=0.0, got those with coverage=2.0 in"):
        make(folder / "covered")
    with pytest.raises(ValueError, match="wants hypotheses with coverage=2.0, got those with coverage=0.0 in"):
        make(folder / "plain", coverage=2.0)
    state = SequenceLevel(make(None)).map(stream()).state_dict()
    SequenceLevel(make(None, coverage=0)).map(stream()).load_state_dict(state)
    with pytest.raises(ValueError, match="wants a state with the targets of this method and teacher"):
        SequenceLevel(make(None, coverage=2.0)).map(stream()).load_state_dict(state)


def test_the_texts_of_a_search_with_the_coverage_penalty(tmp_path):
    check_coverage(tmp_path, make_beams)
    assert "coverage" not in make_beams().facts, "folders of versions without the penalty are those with β = 0"
    for wrong, words in ((-1.0, "number >= 0"), ("a", "number"), (float("nan"), "number")):
        with pytest.raises((TypeError, ValueError), match=f"TeacherBeams: coverage wants .*{words}"):
            make_beams(coverage=wrong)


class NoPenalty(TeacherBeams):
    """The weight stands in the files, and the search does without it."""

    def look_up(self, targets: Any) -> list:
        self.coverage = 0.0
        return super().look_up(targets)


class NoFact(TeacherBeams):
    """The files do not say the weight."""

    def __init__(self, folder: Path | None, teacher: Any, *, coverage: float = 0.0, **settings: Any):
        super().__init__(folder, teacher, **settings)
        self.coverage = float(coverage)


@pytest.mark.parametrize("wrong", [NoPenalty, NoFact])
def test_texts_with_another_coverage_are_noticed(wrong, tmp_path):
    def make(folder: Path | None = None, **settings: Any) -> TeacherBeams:
        return wrong(folder, make_teacher(), end=END, max_new_tokens=N, beams=4, **settings)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_coverage(tmp_path, make)


# GNMTPenalty of a later version, which has got a field
LaterPenalty = dataclasses.make_dataclass("GNMTPenalty", [("shift", float, 5.0)], bases=(ft.GNMTPenalty,), frozen=True)
LaterPenalty.__module__, LaterPenalty.__qualname__ = ft.GNMTPenalty.__module__, ft.GNMTPenalty.__qualname__


def test_a_new_field_of_a_length_penalty_does_not_refuse_older_texts(tmp_path):
    """A folder, and a position in new targets, from before the field. With another value than its default, it does."""
    older = make_beams(tmp_path)
    older.fill([make_batch(7, 10)])
    state = SequenceLevel(older).map(stream()).state_dict()
    later = make_beams(tmp_path, lp=LaterPenalty())
    assert len(later) == len(older) > 0
    SequenceLevel(later).map(stream()).load_state_dict(state)
    with pytest.raises(ValueError, match="wants a state with the targets of this method and teacher"):
        Interpolation(later).map(stream()).load_state_dict(state)
    for lp in (LaterPenalty(shift=4.0), LaterPenalty(alpha=0.5)):
        with pytest.raises(ValueError, match="wants hypotheses of this length penalty"):
            make_beams(tmp_path, lp=lp)
        with pytest.raises(ValueError, match="wants a state with the targets of this method and teacher"):
            SequenceLevel(make_beams(lp=lp)).map(stream()).load_state_dict(state)


# ── in training ──────────────────────────────────────────────────────────────────────────────────────────────────────
class Collate:
    """Rows of (source, text) as a batch, padded."""

    def __call__(self, chosen: list, rng: Any) -> dict[str, np.ndarray]:
        source, source_mask = sequence.pad_right([source for source, _ in chosen], 0)
        ids, mask = sequence.pad_right([text for _, text in chosen], 0)
        return {"ids": ids, "mask": mask, "source_ids": source, "source_mask": source_mask}


def stream(seed: int = 0) -> ft.data.Batches:
    batch = make_batch(7, 10)
    sources = [row[real].tolist() for row, real in zip(batch["source_ids"], batch["source_mask"], strict=True)]
    examples = list(zip(sources, map(list, texts(batch)), strict=True))
    return ft.data.Batches(examples, 4, seed, collate=Collate())


def test_endless_batches_stay_endless():
    """The same order, sources and epochs; only the targets are new."""
    beams = make_beams()
    new = SequenceLevel(beams).map(stream())
    assert len(new) == 3 and beams.searches == 0
    assert beams.fill(stream()) == 10
    targets = dict(zip(map(tuple, sources_of(stream().once())), sum(map(texts, new.once()), []), strict=True))
    old = stream()
    for _ in range(7):
        batch, before = next(new), next(old)
        np.testing.assert_array_equal(batch["source_ids"], before["source_ids"])
        assert texts(batch) == [targets[tuple(source)] for source in sources_of([batch])]
    assert beams.searches == 10


class Counted(list):
    """A list of batches that knows its position; it has an end."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def test_batches_with_an_end_give_a_list():
    """Also those that can be resumed: only endless ones are mapped as they are read."""
    batches = [make_batch(1), make_batch(2)]
    method = SequenceLevel(make_beams())
    new = method.map(Counted(batches))
    assert isinstance(new, list) and [texts(batch) for batch in new] == [texts(b) for b in method.map(batches)]


def check_chosen_once() -> None:
    """Interpolation computes BLEU for each pair of a source and a target in the first epoch alone.

    Every epoch has the targets of a method that knows nothing yet, also of two targets for one source."""
    calls = []

    def counted(*arguments: Any) -> float:
        calls.append(arguments)
        return sentence_bleu(*arguments)
    source = stream()
    beams = make_beams()
    others = []                                          # the teacher's last text of each source, as another target
    for batch in source.once():
        others += [sequence.complete(hypotheses)[-1] for hypotheses in beams.look_up(read_batch(batch))]
    source.examples += [(text, [START, *h.tokens]) for (text, _), h in zip(source.examples, others, strict=True)]
    with replaced(sequence, "sentence_bleu", counted):
        new = Interpolation(beams).map(source)
        sizes = []
        for _ in range(3):
            for batch, before in zip(new.once(), source.once(), strict=True):
                seen = len(calls)
                assert texts(batch) == texts(Interpolation(beams).map_batch(before))
                del calls[seen:]
            sizes.append(len(calls))
    assert sizes[0] > 20 and sizes[1] == sizes[2] == sizes[0]


def test_a_target_is_chosen_once():
    check_chosen_once()


def choose_again(self: Any, targets: ft.Targets, golds: list) -> list[Hypothesis]:
    """BLEU is cheap enough for every epoch."""
    return sequence.NewTargets.choose_all(self, targets, golds)


def one_for_a_source(self: Any, targets: ft.Targets, golds: list) -> list[Hypothesis]:
    """A source has one target, whatever the data say."""
    keys = beams_module.source_keys(targets)
    for key, hypotheses, gold in zip(keys, self.beams.look_up(targets), golds, strict=True):
        if key not in self._chosen:
            self._chosen[key] = self.choose(hypotheses, gold)
    return [self._chosen[key] for key in keys]


@wrong_answers
@pytest.mark.parametrize("wrong", [choose_again, one_for_a_source])
def test_a_choice_that_is_made_again_or_for_another_target_is_caught(wrong):
    with replaced(Interpolation, "choose_all", wrong), pytest.raises(AssertionError):
        check_chosen_once()


def sources_of(batches: Any) -> list[tuple[int, ...]]:
    found = []
    for batch in batches:
        found += texts({"ids": batch["source_ids"], "mask": batch["source_mask"]})
    return found


@pytest.mark.parametrize("method", [SequenceLevel, Interpolation])
def test_a_run_on_new_targets_resumes(method, tmp_path):
    def run(name: str, stop: int = 0, other: Any = method) -> list[np.ndarray]:
        model = make_teacher(seed=5, dropout=0.1)
        ft.fit(model, other(make_beams(tmp_path / "beams")).map(stream()), 6, ft.AdamW(0.02), stop_at(stop),
               out=tmp_path / name, resume=True, save_every=2, progress=False)
        return values_of(model)

    straight = run("straight")
    with pytest.raises(Stop):
        run("stopped", stop=4)
    other = {SequenceLevel: Interpolation, Interpolation: SequenceLevel}[method]
    with pytest.raises(ValueError, match="wants a state with the targets of this method and teacher"):
        run("stopped", other=other)
    assert equal(run("stopped"), straight)


def test_a_student_learns_what_its_teacher_writes(tmp_path):
    """After Seq-KD the student's greedy text is the teacher's best one. Word-level KD on the same prefixes brings it
    nearer to the teacher's distribution."""
    batches = [make_batch(8, 4)]
    teacher = make_teacher(seed=3)
    new = SequenceLevel(TeacherBeams(tmp_path / "beams", teacher, end=END, max_new_tokens=N)).map(batches)
    distances = []
    for loss in (None, ft.WordLevel(ft.TeacherCache(tmp_path / "cache", teacher, k=None), 0.5)):
        student = ft.Seq2Seq(ft.Seq2SeqConfig(V, 12, 12, 1, 3, 16, start=START), seed=6).to(dtype=np.float64)
        ft.fit(student, new, 60, ft.AdamW(0.03), loss=loss, progress=False)
        facts = {name: new[0][name] for name in ("source_ids", "source_mask")}
        written = ft.generate(student, None, N, end=END, **facts)
        for row, text in zip(written.tolist(), texts(new[0]), strict=True):
            assert tuple(row[:len(text)]) == text
        only_soft = ft.WordLevel(teacher, 1.0)
        distances.append(float(only_soft(student, only_soft.read(new[0]))[1].data))
    alone, with_teacher = distances
    assert with_teacher < 0.5 * alone


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_bad_batches_and_teachers_get_one_sentence():
    beams = make_beams()
    batch = make_batch()
    method = SequenceLevel(beams)
    with pytest.raises(IndexError, match="token id 40 is outside the teacher's vocabulary of 11"):
        method.map([{**batch, "source_ids": batch["source_ids"] * 0 + 40}])
    with pytest.raises(IndexError, match="token id 40 is outside the teacher's vocabulary of 11"):
        method.map([{**batch, "ids": np.where(batch["ids"] == END, 40, batch["ids"])}])
    with pytest.raises(ValueError, match="SequenceLevel wants ids that begin with the teacher's start token 2, got 9"):
        method.map([{**batch, "ids": np.where(batch["ids"] == START, 9, batch["ids"])}])
    with pytest.raises(ValueError, match="wants batches of an encoder-decoder, with source_ids, got one without"):
        method.map([{"ids": batch["ids"]}])
    with pytest.raises(ValueError, match="SequenceLevel wants batches of source and target, got one label per row"):
        method.map([{**batch, "labels": np.zeros(6, int)}])
    labels = np.where(batch["mask"], batch["ids"], -100)
    embeddings = {**batch, "ids": ft.Tensor(np.zeros((6, 6, 12))), "labels": labels}
    with pytest.raises(ValueError, match="SequenceLevel wants batches of ids, got embeddings"):
        method.map([embeddings])
    empty = {**batch, "source_mask": batch["source_mask"] & (np.arange(6) != 2)[:, None]}
    with pytest.raises(ValueError, match="a source with one token or more in each row, got an empty one in row 2"):
        method.map([empty])
    with pytest.raises(ValueError, match="a sequence of 30 tokens is longer than the model's 12 positions"):
        method.map([{**batch, "source_ids": np.full((6, 30), 5), "source_mask": np.ones((6, 30), bool)}])
    with pytest.raises(ValueError, match="beams wants a whole number >= 1, got 0"):
        make_beams(beams=0)
    with pytest.raises(ValueError, match="max_new_tokens wants a whole number >= 1, got 0"):
        make_beams(max_new_tokens=0)
    with pytest.raises(ValueError, match="end wants a whole number from 0 to 10, got 11"):
        make_beams(end=11)
    gpt = ft.GPT(ft.GPTConfig(V, 8, 12, 1, 3), seed=0)
    with pytest.raises(TypeError, match="TeacherBeams: teacher wants an encoder-decoder, got GPT"):
        TeacherBeams(None, gpt, end=END, max_new_tokens=3)
    with pytest.raises(TypeError, match=r"Interpolation: beams wants a TeacherBeams\(folder, teacher\), got"):
        Interpolation(make_teacher())
    assert beams.searches == 0


def test_a_target_that_the_student_cannot_hold_is_refused_in_training():
    new = SequenceLevel(make_beams()).map([make_batch()])
    short = ft.Seq2Seq(ft.Seq2SeqConfig(V, 3, 12, 1, 3, start=START), seed=0)
    with pytest.raises(ValueError, match="tokens is longer than the model's 3 positions"):
        ft.fit(short, new, 1, progress=False)
