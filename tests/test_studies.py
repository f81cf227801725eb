"""The studies of distillation: their rows resume, their smoke runs end, and the claims' verdicts follow the numbers."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinyft import array

HERE = Path(__file__).parent / "benchmarks"
pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="the studies are measured on NumPy")


@pytest.fixture(scope="module")
def studies():
    """The modules of the studies, importable for the length of this file's tests."""
    before = set(sys.modules)
    sys.path.insert(0, str(HERE))
    import distilbert
    import sequences
    import study
    import switch
    from claims import c26, c27, c28, c29, c30

    yield SimpleNamespace(
        distilbert=distilbert, sequences=sequences, study=study, switch=switch, c26=c26, c27=c27, c28=c28, c29=c29,
        c30=c30,
    )
    sys.path.remove(str(HERE))
    for name in set(sys.modules) - before:
        if str(HERE) in str(getattr(sys.modules[name], "__file__", "")):
            sys.modules.pop(name)


# ---------------------------------------------------------------------------------------------------- rows
def test_a_killed_study_goes_on_at_its_next_row(studies, tmp_path):
    calls = []

    def job(key: str, value: float):
        def run():
            calls.append(key)
            if value < 0:
                raise KeyboardInterrupt
            return {"loss": value}
        return run

    study = studies.study.Study(tmp_path / "s.json", {"steps": 3}, tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        study.run({"a/0": job("a/0", 1.0), "b/0": job("b/0", -1.0)})
    rows = study.run({"a/0": job("a/0", 1.0), "b/0": job("b/0", 2.0)})
    assert calls == ["a/0", "b/0", "b/0"]
    assert [rows[key]["loss"] for key in ("a/0", "b/0")] == [1.0, 2.0]
    assert all(row["seconds"] >= 0 for row in rows.values())


def test_rows_of_other_settings_are_refused(studies, tmp_path):
    file = tmp_path / "s.json"
    first = studies.study.Study(file, {"steps": 3}, tmp_path / "work")
    first.run({"a/0": lambda: {"loss": 1.0}})
    other = studies.study.Study(file, {"steps": 4}, tmp_path / "work")
    with pytest.raises(ValueError, match="holds rows of other settings"):
        other.run({"a/0": lambda: {"loss": 1.0}})
    assert first.folder("a/0") != other.folder("a/0"), "their checkpoints must not meet either"
    other.forget()
    assert other.run({"a/0": lambda: {"loss": 2.0}})["a/0"]["loss"] == 2.0


def test_a_row_that_json_cannot_hold_is_refused(studies, tmp_path):
    study = studies.study.Study(tmp_path / "s.json", {}, tmp_path / "work")
    with pytest.raises(ValueError):
        study.run({"a/0": lambda: {"loss": math.nan}})


def test_the_interval_is_students_t_over_the_seeds(studies):
    r = studies.study.spread([1.0, 2.0, 3.0])
    half = 4.303 / math.sqrt(3)
    assert (r["mean"], r["low"], r["high"]) == pytest.approx((2, 2 - half, 2 + half))
    assert studies.study.spread([1.5]) == {"mean": 1.5, "low": None, "high": None}
    assert studies.study.text(studies.study.spread([0.5]), ".1f", 100) == "50.0 (one seed)"


@pytest.mark.parametrize("level, step", [(3.0, 10.0), (2.5, 15.0), (2.0, 20.0), (1.5, 25.0), (0.9, None), (4.0, 10.0)])
def test_steps_to_a_level_are_interpolated_between_evaluations(studies, level, step):
    found = studies.study.steps_to([10, 20, 30], [3.0, 2.0, 1.0], level)
    assert found == (None if step is None else pytest.approx(step))


def test_times_are_paired_and_take_turns(studies):
    order = []

    def side(name: str, seconds: float):
        def run():
            order.append(name)
            return seconds
        return run

    assert studies.study.time_ratios(side("f", 3.0), side("g", 2.0), 4) == [1.5] * 4
    assert "".join(order) == "fg" + "fggf" * 2


# ---------------------------------------------------------------------------------------------------- smoke runs
def test_the_smoke_run_of_distilbert_writes_page_and_picture_and_resumes(studies, tmp_path):
    d = studies.distilbert
    study = d.PROGRAM.open(d.SMOKE, tmp_path, tmp_path / "work")
    rows = d.rows_of(d.SMOKE, study)
    d.PROGRAM.report(d.SMOKE, study, rows)
    text = (tmp_path / "distilbert.md").read_text(encoding="utf-8")
    assert "| without L_cos |" in text and "python tests/benchmarks/distilbert.py" in text
    assert (tmp_path / "distilbert.png").stat().st_size > 10_000
    # A row that is gone is computed again from its checkpoint, with the same numbers: nothing trains.
    data = json.loads(study.file.read_text(encoding="utf-8"))
    key = f"{d.FULL}/0"
    lost = data["rows"].pop(key)
    study.file.write_text(json.dumps(data), encoding="utf-8")
    again = d.rows_of(d.SMOKE, study)[key]
    assert {**again, "seconds": 0} == {**lost, "seconds": 0}
    for claim in (studies.c26, studies.c27):
        assert claim.judge(d.summary(d.SMOKE, rows)).measured


def test_all_students_start_as_their_variant_says(studies):
    d = studies.distilbert
    teacher = d.teacher().named_parameters()
    for name, variant in d.VARIANTS.items():
        model = d.new_student(variant, 0)
        same = np.array_equal(model.named_parameters()["blocks.1.attn.q.weight"].data,
                              teacher["blocks.3.attn.q.weight"].data)
        assert same == (variant.start == "layers"), name
        assert len(model.blocks) == 2
        assert variant.has_teacher == (name not in (d.START, d.ALONE))
        loss = d.loss_of(variant)
        if loss is not None:
            assert (loss.soft, loss.hard, loss.cosine) == variant.weights
            assert loss.temperature == 2
    assert d.VARIANTS[d.FULL].weights == (5, 2, 1)


def test_the_smoke_run_of_switch_writes_page_and_picture(studies, tmp_path):
    w = studies.switch
    study = w.PROGRAM.open(w.SMOKE, tmp_path, tmp_path / "work")
    rows = w.rows_of(w.SMOKE, study)
    w.PROGRAM.report(w.SMOKE, study, rows)
    text = (tmp_path / "switch.md").read_text(encoding="utf-8")
    assert "| + both |" in text and "python tests/benchmarks/switch.py" in text
    assert (tmp_path / "switch.png").stat().st_size > 10_000
    assert rows["dense/0"]["steps"] == [2, 4, 6, 8] and rows["+ both/0"]["steps"] == [2, 4]
    assert rows[w.RATES]["dense"] in w.SMOKE.rates and rows[w.RATES]["switch"] in w.SMOKE.rates
    assert w.summary(w.SMOKE, rows)["shares"].keys() == {*w.STUDENTS, w.LONGER}


def test_the_smoke_run_of_sequences_writes_page_and_picture(studies, tmp_path):
    q = studies.sequences
    study = q.PROGRAM.open(q.SMOKE, tmp_path, tmp_path / "work")
    rows = q.rows_of(q.SMOKE, study)
    q.PROGRAM.report(q.SMOKE, study, rows)
    text = (tmp_path / "sequences.md").read_text(encoding="utf-8")
    assert "| interpolation |" in text and "python tests/benchmarks/sequences.py" in text
    assert (tmp_path / "sequences.png").stat().st_size > 10_000
    assert studies.c28.judge(q.summary(q.SMOKE, rows)).measured


def test_the_students_of_a_seed_see_the_same_sources_and_learn_what_their_method_says(studies, tmp_path):
    q = studies.sequences
    study = q.PROGRAM.open(q.SMOKE, tmp_path, tmp_path / "work")
    batches = {}
    losses = {}
    for method in q.METHODS:
        found, losses[method] = q.apply_method(study, q.SMOKE, method, q.data_batches(q.SMOKE, method, 0))
        batches[method] = next(iter(found))
    for method in q.METHODS[:-1]:
        assert np.array_equal(batches[method]["source_ids"], batches[q.ALONE]["source_ids"]), method
    for method in (q.ALONE, q.WORD):
        assert np.array_equal(batches[method]["ids"], batches[q.ALONE]["ids"]), method
    assert {method for method, loss in losses.items() if loss is not None} == {q.WORD, q.BOTH}
    assert len(q.data_batches(q.SMOKE, q.MORE, 0)) == 2 * len(q.data_batches(q.SMOKE, q.ALONE, 0))


def test_a_token_of_every_switch_model_costs_what_one_of_the_dense_model_costs(studies):
    w = studies.switch
    s = w.Settings()
    dense = w.new_model(s, w.DENSE, 0)
    for experts in s.experts:
        model = w.new_model(s, w.name_of(experts), 0)
        layer = model.blocks[1].mlp
        assert len(layer.experts) == experts
        assert w.size(layer.experts[0]) == w.size(dense.blocks[1].mlp)
        assert layer._switch.capacity >= experts, "no token is dropped"
    assert w.size(dense) < 0.2 * w.size(w.new_model(s, w.teacher_name(s), 0)), "80 % compression, as the claim has it"


# ---------------------------------------------------------------------------------------------------- arithmetic
def test_times_faster_of_known_curves(studies):
    w = studies.switch
    steps = [10, 20, 30, 40]
    dense = [4.0, 3.0, 2.5, 2.0]
    assert w.times_faster(20, steps, dense, [3.0, 2.0]) == pytest.approx(2)      # at step 10 where dense is at 20
    assert w.times_faster(40, steps, dense, [3.0, 2.0, 1.5, 1.0]) == pytest.approx(2)
    assert w.times_faster(20, steps, dense, [4.0, 3.5]) == pytest.approx(15 / 20)  # never: dense is there at step 15
    assert w.times_faster(20, steps, dense, dense[:2]) == pytest.approx(1)


def test_the_share_of_the_gain_is_that_of_the_mean_losses(studies):
    w = studies.switch
    found = w.share_of(np.array([0.1, 0.3]), [0.05, 0.05])
    assert found["share"] == pytest.approx(0.25)
    assert found["kept"]["mean"] == pytest.approx(0.05)


# ---------------------------------------------------------------------------------------------------- verdicts
def r(mean: float, half: float = 0.0) -> dict[str, float]:
    """A spread."""
    return {"mean": mean, "low": mean - half, "high": mean + half}


def distilbert_numbers(studies, kept: float = 0.98, parameters: int = 60, speed: float = 1.7) -> dict:
    """Numbers in which only these facts vary. The teacher has 100 parameters."""
    d = studies.distilbert
    whole = {"accuracy": r(0.5), "loss": r(3.0), "kept": r(kept), "difference": r(0.0)}
    curves = {d.FULL: [[3.0, 2.0]], d.START: [[4.0, 3.0]], d.RANDOM: [[5.0, 4.0]], d.ALONE: [[6.0, 5.0]]}
    return {
        "teacher": {"accuracy": 0.5, "loss": 2.5},
        "untrained": {"accuracy": 0.3, "loss": 4.0},
        "mlm": dict.fromkeys(d.VARIANTS, whole),
        "task": {d.TEACHER: {"accuracy": r(0.7)}} | dict.fromkeys(
            (*d.ON_TASK, d.AGAIN), {"accuracy": r(0.7), "kept": r(kept), "kept_gain": 0.9}),
        "steps": [10, 20],
        "curves": curves,
        "cost": {"parameters": {"teacher": 100, "student": parameters}, "speed": {"1": r(speed), "32": r(speed)},
                 "teacher_step": r(1.5)},
    }


@pytest.mark.parametrize("facts, verdict", [
    ({}, "holds"),
    ({"kept": 0.96}, "holds in part"),
    ({"parameters": 70}, "holds in part"),
    ({"speed": 1.4}, "holds in part"),
    ({"kept": 0.9, "parameters": 90, "speed": 1.1}, "wrong as stated"),
])
def test_c26_wants_quality_size_and_speed(studies, facts, verdict):
    assert studies.c26.judge(distilbert_numbers(studies, **facts)).verdict == verdict


def test_c26_does_not_take_the_better_of_two_qualities(studies):
    numbers = distilbert_numbers(studies)
    name = studies.distilbert.FULL
    numbers["mlm"] = {**numbers["mlm"], name: {**numbers["mlm"][name], "kept": r(0.9)}}
    assert studies.c26.judge(numbers).verdict == "holds in part"


@pytest.mark.parametrize("ratio, curves, verdict", [
    (1.5, {}, "holds"),                                         # reached at the first evaluation, half of the steps
    (2.5, {}, "holds in part"),                                 # a step costs more than the steps saved
    (1.5, {"random start": [[6.0, 5.5]]}, "holds in part"),     # from one start never
    (1.5, {"random start": [[6.0, 5.5]], "DistilBERT": [[4.0, 3.5]]}, "wrong as stated"),
    (1.5, {"DistilBERT": [[4.0, 3.0]]}, "holds in part"),       # at the last step: not in fewer
])
def test_c27_counts_steps_and_time(studies, ratio, curves, verdict):
    numbers = distilbert_numbers(studies)
    numbers["curves"] |= curves
    numbers["cost"]["teacher_step"] = r(ratio)
    assert studies.c27.judge(numbers).verdict == verdict


def test_c27_wants_every_seed(studies):
    d = studies.distilbert
    numbers = distilbert_numbers(studies)
    numbers["curves"] = {d.FULL: [[3.0, 2.0], [4.0, 3.5]], d.START: [[4.0, 3.0]] * 2,
                         d.RANDOM: [[5.0, 4.0]] * 2, d.ALONE: [[6.0, 5.0]] * 2}
    assert d.head_starts(numbers) == {"layers": [0.5, None], "random": [0.5, 0.5]}
    finding = studies.c27.judge(numbers)
    assert finding.verdict == "holds in part" and "in 1 of 2 seeds" in finding.measured


@pytest.mark.parametrize("word, sequence, mixed, verdict", [
    (0.01, 0.05, 0.03, "holds"),
    (0.06, 0.05, 0.03, "holds in part"),                        # word-level gains more
    (0.01, 0.05, 0.07, "holds in part"),                        # interpolation gains more
    (-0.01, 0.005, 0.0, "wrong as stated"),                     # the largest, but not clearly above nothing
    (0.03, -0.02, 0.01, "wrong as stated"),
])
def test_c28_wants_the_largest_gain_and_a_clear_one(studies, word, sequence, mixed, verdict):
    q = studies.sequences
    scores = dict.fromkeys(q.SCORES, r(0.2))
    gains = {q.WORD: word, q.SEQUENCE: sequence, q.INTERPOLATION: mixed}
    students = {}
    for method in q.METHODS:
        students[method] = {"greedy": scores, "beam": scores, "gain": r(gains.get(method, 0.0), 0.01)}
    numbers = {
        "students": students, "baselines": {},
        "teacher": {decoding: dict.fromkeys(q.SCORES, 0.3) for decoding in ("greedy", "beam")},
    }
    assert studies.c28.judge(numbers).verdict == verdict


def switch_numbers(studies, by_steps: list[float], by_time: float = 1.0, half: float = 0.1,
                   by_length: tuple = (0.1, 0.1, 0.1)) -> dict:
    """Numbers of three Switch models with these factors."""
    w = studies.switch
    names = [w.name_of(experts) for experts in w.Settings().experts]
    row = {"by_time": r(by_time), "equal_steps": r(-0.1), "equal_time": r(0.0), "by_length": list(by_length)}
    return {
        "steps": {w.DISTILLED: [10]},
        "parameters": dict.fromkeys([w.DENSE, w.WIDE, *names], 10),
        "dense_ms": 50.0,
        "loss": dict.fromkeys([w.DENSE, w.WIDE, *names, *w.STUDENTS, w.LONGER], r(4.0)),
        "ratios": dict.fromkeys([w.WIDE, *names], r(1.2)),
        "speed": {name: {**row, "by_steps": r(factor, half)} for name, factor in zip(names, by_steps)},
    }


@pytest.mark.parametrize("by_steps, by_time, verdict", [
    ([2, 4, 7.5], 7.1, "holds"),
    ([2, 4, 7.5], 6.0, "holds in part"),
    ([0.9, 1.0, 1.3], 0.9, "holds in part"),
    ([0.8, 0.9, 1.0], 0.9, "wrong as stated"),
])
def test_c29_wants_steps_and_time(studies, by_steps, by_time, verdict):
    assert studies.c29.judge(switch_numbers(studies, by_steps, by_time)).verdict == verdict


def test_c29_and_c30_want_a_trend_over_three_lengths_for_not_at_this_size(studies):
    w = studies.switch
    none = {"shares": dict.fromkeys([*w.STUDENTS, w.LONGER], {"share": 0.5, "kept": r(0.0)}), "gain": r(0.0, 0.1),
            "beyond_longer": r(0.0), "compression": 0.9}
    for by_length, verdict in (((0.2, 0.1, 0.05), "not at this size"), ((0.2, 0.05, 0.1), "wrong as stated")):
        numbers = switch_numbers(studies, [0.9, 0.9, 0.9], by_length=by_length)
        assert studies.c29.judge(numbers).verdict == verdict
        assert studies.c30.judge(numbers | none).verdict == verdict


def test_c29_a_factor_counts_only_if_its_interval_excludes_one(studies):
    assert studies.c29.judge(switch_numbers(studies, [1.3, 1.2, 1.2], half=0.4)).verdict == "wrong as stated"


@pytest.mark.parametrize("share, beyond, compression, gain, verdict", [
    (0.35, 0.01, 0.85, 0.1, "holds"),
    (0.35, -0.01, 0.85, 0.1, "holds in part"),                  # longer training explains it
    (0.2, 0.01, 0.85, 0.1, "holds in part"),
    (0.35, 0.01, 0.5, 0.1, "holds in part"),
    (-0.1, 0.01, 0.85, 0.1, "wrong as stated"),
    (0.35, 0.01, 0.85, -0.1, "wrong as stated"),                # no gain: a share of it says nothing
])
def test_c30_wants_share_compression_and_more_than_longer_training(studies, share, beyond, compression, gain, verdict):
    w = studies.switch
    numbers = switch_numbers(studies, [1, 1, 1])
    kept = {"share": share, "kept": r(share * gain)}
    numbers |= {"shares": dict.fromkeys([*w.STUDENTS, w.LONGER], kept), "gain": r(gain, 0.05),
                "beyond_longer": r(beyond), "compression": compression}
    assert studies.c30.judge(numbers).verdict == verdict


def test_the_stored_rows_are_of_the_settings_and_give_the_stored_page(studies):
    for module in (studies.distilbert, studies.switch):
        study = module.PROGRAM.open(module.Settings(), studies.study.RESULTS, Path("unused"))
        if not study.file.exists():
            continue
        data = study.read()
        page = study.file.with_suffix(".md").read_text(encoding="utf-8")
        assert page == module.page(data, module.summary(module.Settings(), data["rows"])), "--page writes it again"


def test_one_thing_differs_between_neighbours_of_the_ablation(studies):
    d = studies.distilbert
    whole = d.VARIANTS[d.FULL]
    assert replace(d.VARIANTS[d.RANDOM], start="layers") == whole
    for place, name in enumerate(("without L_ce", "without L_mlm", "without L_cos")):
        weights = list(whole.weights)
        weights[place] = 0
        assert d.VARIANTS[name].weights == tuple(weights)
