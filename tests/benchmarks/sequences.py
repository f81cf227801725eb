"""Small encoder-decoders that name functions, distilled from the shipped one: at word level, sequence level, and both.

    python tests/benchmarks/sequences.py           the rows that are missing, then the page and the picture
    python tests/benchmarks/sequences.py --page    the page and the picture from the stored rows

Protocol: the teacher is base-seq2seq. A student has half its width, half its layers, its vocabulary and the same
initial cross-attention. It trains on the training pairs of *names*. For one seed, all methods see the same sources in
the same order, except "more sources", which adds sentences of the prose that have no names. Targets: "without a
teacher": the names in the data. "word-level": the same names, and at each token the teacher's distribution.
"sequence-level": the best text of the teacher's beam search. "interpolation": of the teacher's K best texts, the one
that is most similar to the name in the data, by BLEU. "sequence-level and word-level": the targets of the first, with
the loss of the second. Scores are means over the test pairs; teacher and student have seen none of their modules.
Curves are on the valid pairs, with greedy decoding. Intervals are 95 %, by Student's t over the seeds; differences are
paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import study
from report import table
from study import Row, Study

import tinyft as ft
from tinyft.data.name_baselines import simple_names
from tinyft.data.name_training import prose_sentences
from tinyft.data.names import Pairs
from tinyft.data.scores import exact_match, name_words, token_f1
from tinyft.predict import search_texts
from tinyft.pretrain_names import MAX_TARGET, joined, name_batches, real_pairs, spaced, start_copying, written_names

NAME = "sequences"
TEACHER = "base-seq2seq"


@dataclass(frozen=True)
class Settings:
    """Sizes of the study. steps, batch, lr: of a student's training; k: the texts among which interpolation chooses."""

    seeds: int = 3
    steps: int = 600
    batch: int = 64
    lr: float = 3e-3
    width: int = 64
    layers: int = 1
    hidden: int = 192
    beams: int = 5
    k: int = 10
    evaluations: int = 10
    pairs: int | None = None  # None: all
    sentences: int = 6846  # of "more sources": twice the real training pairs
    rounds: int = 10


SMOKE = Settings(
    seeds=1, steps=2, batch=4, width=16, hidden=16, beams=2, k=2, evaluations=1, pairs=8, sentences=8, rounds=1,
)

ALONE = "without a teacher"
WORD = "word-level"
SEQUENCE = "sequence-level"
INTERPOLATION = "interpolation"
BOTH = "sequence-level and word-level"
MORE = "sequence-level, more sources"
METHODS = (ALONE, WORD, SEQUENCE, INTERPOLATION, BOTH, MORE)
THREE = (WORD, SEQUENCE, INTERPOLATION)  # those of Kim and Rush 2016, arXiv:1606.07947
COST = "cost"
BASELINES = "baselines"
SCORES = ("f1", "exact", "bleu")


# ---------------------------------------------------------------------------------------------------- models, data
@lru_cache(maxsize=1)
def teacher() -> tuple[ft.Module, Any]:
    """The shipped encoder-decoder and its tokenizer. It never trains here."""
    return ft.load(TEACHER)


def new_student(s: Settings, seed: int) -> ft.T5:
    """A student with random weights, except for its cross-attention, which starts as the teacher's did."""
    large = teacher()[0].config
    return start_copying(ft.T5(ft.T5Config(
        vocab=large.vocab, positions=large.positions, width=s.width, layers=s.layers, heads=4,
        head_width=s.width // 4, hidden=s.hidden, dropout=large.dropout,
    ), seed))


@lru_cache(maxsize=4)
def pairs_of(split: str, count: int | None) -> Pairs:
    """The first `count` pairs of a split; None: all."""
    pairs = real_pairs(split)
    return Pairs(pairs.prompts[:count], pairs.responses[:count])


def data_batches(s: Settings, method: str, seed: int) -> ft.data.Batches:
    """The batches of the data, the same for all methods of a seed; "more sources" adds sentences without names."""
    pairs = pairs_of("train", s.pairs)
    examples = [(summary, spaced(name)) for summary, name in zip(*pairs, strict=True)]
    if method == MORE:
        prose = prose_sentences("train")
        order = np.random.default_rng(0).permutation(len(prose))[: s.sentences]
        examples += [(prose[i], "") for i in order]  # the teacher writes their names
    return name_batches(examples, teacher()[1], s.batch, seed)


@lru_cache(maxsize=2)
def teacher_beams(folder: Path, beams: int) -> ft.TeacherBeams:
    """The teacher's best texts by beam search, kept in a folder for all seeds."""
    model, tokenizer = teacher()
    end = tokenizer.token_to_id("<|endoftext|>")
    return ft.TeacherBeams(folder / f"beams-{beams}", model, end=end, max_new_tokens=MAX_TARGET, beams=beams)


def apply_method(study_: Study, s: Settings, method: str, batches: ft.data.Batches) -> tuple[Any, ft.Loss | None]:
    """(batches, loss) of a method: the batches with its targets, and its loss; None: the cross-entropy."""
    if method in (SEQUENCE, BOTH, MORE):
        batches = ft.SequenceLevel(teacher_beams(study_.work, s.beams)).map(batches)
    elif method == INTERPOLATION:
        batches = ft.Interpolation(teacher_beams(study_.work, s.k)).map(batches)
    loss = ft.WordLevel(teacher()[0]) if method in (WORD, BOTH) else None
    return batches, loss


# ---------------------------------------------------------------------------------------------------- scores
def mean_scores(gold: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """{"f1", "exact", "bleu"}: token F1, exact match and sentence BLEU of words, means over the pairs."""
    bleu = [ft.sentence_bleu(name_words(name), name_words(other)) for name, other in zip(names, gold, strict=True)]
    return {
        "f1": float(token_f1(gold, names).mean()),
        "exact": float(exact_match(gold, names).mean()),
        "bleu": float(np.mean(bleu)),
    }


def beam_names(model: ft.Module, s: Settings, summaries: Sequence[str]) -> list[str]:
    """The names that a model writes by beam search."""
    texts = search_texts(model, teacher()[1], list(summaries), beams=s.beams, max_new_tokens=MAX_TARGET)
    return [joined(best.text) for best, *_ in texts]


def test_scores(model: ft.Module, s: Settings) -> Row:
    """{"greedy": scores, "beam": scores} on the test pairs."""
    test = pairs_of("test", s.pairs)
    greedy = written_names(model, teacher()[1], test.prompts)
    beam = beam_names(model, s, test.prompts)
    return {"greedy": mean_scores(test.responses, greedy), "beam": mean_scores(test.responses, beam)}


def valid_f1(model: ft.Module, s: Settings) -> dict[str, float]:
    """{"loss": 1 − token F1} on the valid pairs: `study.curve` reads "loss", and lower is better."""
    valid = pairs_of("valid", s.pairs)
    return {"loss": 1 - float(token_f1(valid.responses, written_names(model, teacher()[1], valid.prompts)).mean())}


# ---------------------------------------------------------------------------------------------------- the runs
def student_row(study_: Study, s: Settings, method: str, seed: int) -> Row:
    """Scores of one student on the test pairs, and its learning curve."""
    model = new_student(s, seed)
    batches, loss = apply_method(study_, s, method, data_batches(s, method, seed))
    history = ft.fit(
        model, batches, s.steps, ft.AdamW(s.lr, betas=(0.9, 0.98), weight_decay=0.01), ft.linear_schedule(0.1),
        loss=loss, seed=seed, out=study_.folder(f"{method}/{seed}"), resume=True, progress=False,
        evaluate=partial(valid_f1, model, s), evaluate_every=max(1, s.steps // s.evaluations),
    )
    return test_scores(model, s) | study.curve(history)


def baseline_row(s: Settings) -> Row:
    """Scores of the baselines that only count words, on the test pairs."""
    test = pairs_of("test", s.pairs)
    names = simple_names(pairs_of("train", s.pairs), pairs_of("valid", s.pairs), test.prompts)
    return {baseline: mean_scores(test.responses, found) for baseline, found in names.items()}


def cost_row(s: Settings) -> Row:
    """Parameters, and paired ratios of the times in which teacher and student generate four tokens for 64 summaries."""
    student = new_student(s, 0)
    summaries = pairs_of("test", s.pairs).prompts[:64]
    of_teacher = partial(writing_seconds, teacher()[0], summaries)
    of_student = partial(writing_seconds, student, summaries)
    return {
        "parameters": {"teacher": ft.count(teacher()[0]).total, "student": ft.count(student).total},
        "speed": study.time_ratios(of_teacher, of_student, s.rounds),
    }


def writing_seconds(model: ft.Module, summaries: Sequence[str]) -> float:
    """Processor seconds to generate four tokens for each of these summaries."""
    from time import process_time

    tokenizer = teacher()[1]
    batch = next(name_batches([(summary, "") for summary in summaries], tokenizer, len(summaries)))
    start = process_time()
    ft.generate(model, None, 4, source_ids=batch["source_ids"], source_mask=batch["source_mask"])
    return process_time() - start


def rows_of(s: Settings, study_: Study) -> dict[str, Row]:
    """All rows; those that are missing are measured."""
    jobs: dict[str, Callable[[], Row]] = {
        COST: partial(cost_row, s), BASELINES: partial(baseline_row, s), TEACHER: lambda: test_scores(teacher()[0], s),
    }
    for seed in range(s.seeds):
        for method in METHODS:
            jobs[f"{method}/{seed}"] = partial(student_row, study_, s, method, seed)
    return study_.run(jobs)


# ---------------------------------------------------------------------------------------------------- numbers
def summary(s: Settings, rows: dict[str, Row]) -> dict[str, Any]:
    """The numbers of the page and of the claim, from the rows. JSON-able.

    teacher     {"greedy" | "beam": {score: value}}
    baselines   {name: {score: value}}
    students    {method: {"greedy" | "beam": {score: spread}, "gain": spread, "kept": spread}}
                gain: token F1 minus that of the student without a teacher, same seed, greedy
                kept: token F1 divided by the teacher's, greedy
    reached     {method: one value per seed}: the share of the steps after which the student has the final F1 of the one
                without a teacher; None if it never has
    steps       at which the students were evaluated
    curves      {method: token F1 on the valid pairs}, (seeds, points)
    cost        parameters; speed: the teacher's time divided by the student's
    """

    def values(method: str, decoding: str, score: str) -> np.ndarray:
        return np.array([rows[f"{method}/{seed}"][decoding][score] for seed in range(s.seeds)])

    alone = values(ALONE, "greedy", "f1")
    best = rows[TEACHER]["greedy"]["f1"]
    students: dict[str, Any] = {}
    curves: dict[str, list] = {}
    for method in METHODS:
        row: dict[str, Any] = {}
        for decoding in ("greedy", "beam"):
            row[decoding] = {score: study.spread(values(method, decoding, score)) for score in SCORES}
        row["gain"] = study.spread(values(method, "greedy", "f1") - alone)
        row["kept"] = study.spread(values(method, "greedy", "f1") / max(best, 1e-6))
        students[method] = row
        curves[method] = (1 - study.values_of(rows, method, "curve", s.seeds)).tolist()  # rows hold 1 − F1
    steps = rows[f"{ALONE}/0"]["steps"]
    return {
        "teacher": {decoding: rows[TEACHER][decoding] for decoding in ("greedy", "beam")},
        "baselines": {name: row for name, row in rows[BASELINES].items() if name != "seconds"},
        "students": students,
        "reached": {method: shares(steps, curves[method], curves[ALONE]) for method in METHODS[1:]},
        "steps": steps,
        "curves": curves,
        "cost": {"parameters": rows[COST]["parameters"], "speed": study.quartiles(rows[COST]["speed"])},
    }


def shares(steps: list[int], own: list[list[float]], other: list[list[float]]) -> list[float | None]:
    """For each seed, the share of the steps after which a student has the other's final F1; None if it never has."""
    found: list[float | None] = []
    for own_f1, other_f1 in zip(own, other, strict=True):
        losses = [-f1 for f1 in own_f1]  # steps_to wants values that fall
        reached = study.steps_to(steps, losses, -other_f1[-1])
        found.append(None if reached is None else reached / steps[-1])
    return found


# ---------------------------------------------------------------------------------------------------- the page
def page(data: dict[str, Any], numbers: dict[str, Any]) -> str:
    """results/sequences.md."""
    title, _, protocol = __doc__.split("\n\n")  # the second paragraph shows the commands
    lines = ["# " + title.rstrip("."), ""]
    lines += study.heading(data, "python tests/benchmarks/sequences.py")
    lines += [protocol.strip().replace("\n", " "), "", "![learning curves and gains](sequences.png)", ""]
    lines += ["## Quality", "", *quality_table(numbers)]
    lines += ["## Size, speed and quality", "", *size_table(numbers)]
    lines += ["## Reading", "", *reading(numbers)]
    return "\n".join(lines).rstrip() + "\n"


def quality_table(numbers: dict[str, Any]) -> list[str]:
    """Every baseline, the teacher and every student: token F1, exact match and BLEU, greedy and by beam search."""
    rows = []
    for name, scores in numbers["baselines"].items():
        rows.append([name, *(f"{scores[score]:.3f}" for score in SCORES), "", ""])
    own = numbers["teacher"]
    rows.append(["teacher", *(f"{own['greedy'][score]:.3f}" for score in SCORES), f"{own['beam']['f1']:.3f}", ""])
    for method, row in numbers["students"].items():
        gain = "" if method == ALONE else study.text(row["gain"], "+.3f")
        cells = [study.text(row["greedy"][score]) for score in SCORES]
        rows.append([method, *cells, study.text(row["beam"]["f1"]), gain])
    return table(["", "token F1", "exact", "BLEU", "token F1, beam", "F1 minus that without a teacher"], rows)


def size_table(numbers: dict[str, Any]) -> list[str]:
    """The students beside the teacher."""
    cost = numbers["cost"]
    large, small = cost["parameters"]["teacher"], cost["parameters"]["student"]
    rows = [["teacher", f"{large:,}", "1", "100 %"]]
    speed = study.text(cost["speed"], ".2f")
    for method, row in numbers["students"].items():
        rows.append([method, f"{small:,}", speed, study.text(row["kept"], ".0f", 100) + " %"])
    return table(["", "parameters", "times as fast (quartiles)", "token F1 kept"], rows)


def reading(numbers: dict[str, Any]) -> list[str]:
    """What the tables say, computed from them."""
    lines = []
    for method in METHODS[1:]:
        gain = numbers["students"][method]["gain"]
        reached = [share for share in numbers["reached"][method] if share is not None]
        seeds = len(numbers["reached"][method])
        after = f", on average after {100 * float(np.mean(reached)):.0f} % of the steps" if reached else ""
        lines.append(f"- {method}: token F1 {study.text(gain, '+.3f')}. It reaches the final F1 of the student without "
                     f"a teacher in {len(reached)} of {seeds} seeds{after}.")
    baseline = max(scores["f1"] for scores in numbers["baselines"].values())
    of_teacher = numbers["teacher"]["greedy"]["f1"]
    verdict = "beats" if of_teacher > baseline else "does not beat"
    return [*lines, f"- The teacher {verdict} the best baseline: token F1 {of_teacher:.3f} and {baseline:.3f}."]


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Left: token F1 of the valid pairs against steps. Right: the gain by the teacher on the test pairs."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colors = dict(zip(METHODS, ("0.4", "#4477aa", "#cc6677", "#ddaa33", "#aa3377", "#228833"), strict=True))
    for method, color in colors.items():
        mean = np.mean(numbers["curves"][method], axis=0)
        left.plot(numbers["steps"], mean, color=color, label=method)
    left.set(xlabel="step", ylabel="token F1, valid pairs", title="learning curves (mean over seeds)", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    names = METHODS[1:]
    gains = [numbers["students"][name]["gain"] for name in names]
    errors = [0.0 if gain["low"] is None else gain["high"] - gain["mean"] for gain in gains]
    right.barh(names, [gain["mean"] for gain in gains], xerr=errors, color=[colors[n] for n in names], ecolor="0.3")
    right.axvline(0, color="0.5", linewidth=0.8)
    right.invert_yaxis()
    right.set(xlabel="token F1, test pairs (95 % interval)", title="gain over the student without a teacher")
    figure.savefig(path, dpi=120)
    plt.close(figure)


PROGRAM = study.Program(NAME, __doc__, Settings(), SMOKE, rows_of, summary, page, draw)

if __name__ == "__main__":
    PROGRAM.main()
