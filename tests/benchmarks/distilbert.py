"""Half of the shipped BERT by the recipe of DistilBERT, with the ablations of its losses and of its start.

    python tests/benchmarks/distilbert.py           the rows that are missing, then the page and the picture
    python tests/benchmarks/distilbert.py --page    the page and the picture from the stored rows

Protocol: the teacher is base-bert (4 layers), the students have 2. A student trains by masked language modelling on the
shipped prose; all variants of a seed see the same masked batches. Losses of a curve are held out (valid), those of the
table are of the test split; both are of modules that the teacher has not seen either. The task is *intact*, with the
settings of `tinyft compare`: teacher and students are fine-tuned with the same steps, batches and learning rate.
Intervals are 95 %, by Student's t over the seeds, of paired differences or ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import study
from report import table
from study import Row, Study

import tinyft as ft
from tinyft.compare import PRESETS
from tinyft.compare.cells import Material, load_material
from tinyft.compare.settings import learning_rates
from tinyft.pretrain import RECIPES

NAME = "distilbert"
TEACHER = "base-bert"


@dataclass(frozen=True)
class Settings:
    """Sizes of the study. steps, length, batch, lr: of the pretraining; task_steps, task_lr: of the fine-tuning."""

    seeds: int = 3
    steps: int = 300
    length: int = 64
    batch: int = 8
    lr: float = 1e-3
    evaluations: int = 10
    curve_windows: int = 128
    test_windows: int = 1024
    task_examples: int = 3000
    task_test: int = 1000
    task_steps: int = 200
    task_lr: float = learning_rates()["intact"]["full"]
    rounds: int = 20


SMOKE = Settings(
    seeds=1, steps=4, length=16, batch=2, evaluations=2, curve_windows=8, test_windows=8, task_examples=32,
    task_test=32, task_steps=2, rounds=2,
)


@dataclass(frozen=True)
class Variant:
    """A student: its start, "layers" of the teacher or "random", and the weights of L_ce, L_mlm and L_cos."""

    start: str
    weights: tuple[float, float, float]

    @property
    def has_teacher(self) -> bool:
        """True if a loss needs the teacher's outputs."""
        return bool(self.weights[0] or self.weights[2])


FULL = "DistilBERT"
START = "layers, no teacher"
ALONE = "alone"
RANDOM = "random start"
HALF = "half of the layers, untrained"
AGAIN = "distilled on the task, too"
VARIANTS = {
    FULL: Variant("layers", (5, 2, 1)),
    "without L_ce": Variant("layers", (0, 2, 1)),
    "without L_cos": Variant("layers", (5, 2, 0)),
    "without L_mlm": Variant("layers", (5, 0, 1)),
    RANDOM: Variant("random", (5, 2, 1)),
    START: Variant("layers", (0, 2, 0)),
    ALONE: Variant("random", (0, 2, 0)),
}
ON_TASK = (FULL, RANDOM, START, ALONE)  # the variants that are fine-tuned
COST = "cost"


# ---------------------------------------------------------------------------------------------------- models, data
@lru_cache(maxsize=1)
def teacher() -> ft.Module:
    """The shipped BERT. It never trains here."""
    model, _ = ft.load(TEACHER)
    return model


def new_student(variant: Variant, seed: int) -> ft.Module:
    """A student of half the depth, without token types and pooler, as DistilBERT is."""
    layers = teacher().config.layers // 2
    model = ft.student(teacher(), layers, token_types=False)
    if variant.start == "layers":
        return model
    recipe = RECIPES[TEACHER]
    fresh = ft.BERT(replace(model.config, std=recipe.config.std), seed)  # a checkpoint does not keep std
    fresh.pos.weight.copy_(recipe.model().pos.weight.data)  # the base models' own start: sinusoids
    return fresh


@lru_cache(maxsize=4)
def held_out(split: str, s: Settings, windows: int) -> list[dict[str, np.ndarray]]:
    """Masked batches of about so many windows, at equal distances in a split; the same at each call."""
    batches = list(ft.data.mlm_batches(study.prose(split), s.length, 8, seed=1).once())
    count = min(len(batches), max(1, windows // 8))
    return [batches[i * len(batches) // count] for i in range(count)]


def training_batches(s: Settings, seed: int) -> ft.data.Batches:
    """The masked batches of a seed, the same for all students."""
    return ft.data.mlm_batches(study.prose("train"), s.length, s.batch, seed=seed)


def loss_of(variant: Variant) -> ft.Loss | None:
    """The loss of a variant; None, the cross-entropy at the masked tokens, if it has no teacher."""
    if not variant.has_teacher:
        return None
    soft, hard, cosine = variant.weights
    return ft.DistilBERTLoss(teacher(), soft=soft, hard=hard, cosine=cosine)


def measured(metrics: dict[str, float]) -> Row:
    """The metrics that a row keeps."""
    return {name: metrics[name] for name in ("loss", "perplexity", "accuracy")}


# ---------------------------------------------------------------------------------------------------- the runs
def pretrain(study_: Study, s: Settings, name: str, seed: int) -> tuple[ft.Module, ft.History]:
    """Train one student by masked language modelling; a run that ended is read from its checkpoint."""
    variant = VARIANTS[name]
    model = new_student(variant, seed)
    history = ft.fit(
        model, training_batches(s, seed), s.steps,
        ft.AdamW(s.lr, betas=(0.9, 0.98), weight_decay=0.01), ft.linear_schedule(0.05),
        loss=loss_of(variant), clip=5.0, seed=seed, out=study_.folder(f"{name}/{seed}"), resume=True, progress=False,
        evaluate=partial(ft.evaluate, model, held_out("valid", s, s.curve_windows)),
        evaluate_every=max(1, s.steps // s.evaluations),
    )
    return model, history


def pretraining_row(study_: Study, s: Settings, name: str, seed: int) -> Row:
    """Held-out quality of one student, and its learning curve."""
    model, history = pretrain(study_, s, name, seed)
    return measured(ft.evaluate(model, held_out("test", s, s.test_windows))) | study.curve(history)


def untrained_row(s: Settings, name: str) -> Row:
    """Held-out quality of a model that does not train here: the teacher, or half of its layers."""
    model = teacher() if name == TEACHER else new_student(VARIANTS[FULL], 0)
    return measured(ft.evaluate(model, held_out("test", s, s.test_windows)))


def task_material(s: Settings, seed: int) -> Material:
    """The task of `tinyft compare`, its batches at their start."""
    settings = replace(PRESETS["quick", "intact"], train=s.task_examples, test=s.task_test)
    material = load_material(settings, seed)
    state = material.train.state_dict()
    material.train.load_state_dict({**state, "epoch": 0, "batch": 0})
    return material


def fine_tune(study_: Study, s: Settings, model: ft.Module, key: str, seed: int, loss: ft.Loss | None = None) -> Row:
    """Fine-tune a model on the task, in place; its accuracy on the test examples."""
    material = task_material(s, seed)
    ft.classifier(model, 2, seed)
    ft.fit(
        model, material.train, s.task_steps, ft.AdamW(s.task_lr), ft.linear_schedule(0.1), loss=loss, seed=seed,
        out=study_.folder(key), resume=True, progress=False,
    )
    return {"accuracy": ft.evaluate(model, material.test)["accuracy"]}


def task_row(study_: Study, s: Settings, name: str, seed: int) -> Row:
    """Accuracy on the task of one student, or of the teacher."""
    model = ft.load(TEACHER)[0] if name == TEACHER else pretrain(study_, s, name, seed)[0]
    return fine_tune(study_, s, model, f"task, {name}/{seed}", seed)


def again_row(study_: Study, s: Settings, seed: int) -> Row:
    """DistilBERT's student, fine-tuned with the fine-tuned teacher: Hinton's loss on the task."""
    model = ft.load(TEACHER)[0]
    fine_tune(study_, s, model, f"task, {TEACHER}/{seed}", seed)
    student, _ = pretrain(study_, s, FULL, seed)
    return fine_tune(study_, s, student, f"task, {AGAIN}/{seed}", seed, ft.Hinton(model, temperature=2, soft=0.5))


def cost_row(s: Settings) -> Row:
    """Sizes, and paired ratios of times: of inference with a classifier, and of training steps with a teacher."""
    student = new_student(VARIANTS[FULL], 0)
    parameters = {"teacher": size(teacher()), "student": size(student)}
    batch = next(training_batches(s, 0))
    with_teacher = partial(study.step_seconds, new_student(VARIANTS[FULL], 0), batch, loss_of(VARIANTS[FULL]))
    without = partial(study.step_seconds, new_student(VARIANTS[START], 0), batch)
    steps = study.time_ratios(with_teacher, without, s.rounds)
    large = ft.classifier(ft.load(TEACHER)[0], 2)
    small = ft.classifier(student, 2)
    speed = {}
    for texts in (1, 32):
        ids = np.random.default_rng(0).integers(10, 2000, (texts, s.length))
        sides = (partial(study.inference_seconds, model, ids) for model in (large, small))
        speed[f"{texts}"] = study.time_ratios(*sides, s.rounds)
    return {"parameters": parameters, "speed": speed, "teacher_step": steps}


def size(model: ft.Module) -> int:
    """The number of parameters."""
    return sum(p.size for p in model.parameters())


def rows_of(s: Settings, study_: Study) -> dict[str, Row]:
    """All rows; those that are missing are measured."""
    jobs: dict[str, Callable[[], Row]] = {COST: partial(cost_row, s)}
    jobs[TEACHER] = partial(untrained_row, s, TEACHER)
    jobs[HALF] = partial(untrained_row, s, HALF)
    for seed in range(s.seeds):
        for name in VARIANTS:
            jobs[f"{name}/{seed}"] = partial(pretraining_row, study_, s, name, seed)
        for name in (TEACHER, *ON_TASK):
            jobs[f"task, {name}/{seed}"] = partial(task_row, study_, s, name, seed)
        jobs[f"task, {AGAIN}/{seed}"] = partial(again_row, study_, s, seed)
    return study_.run(jobs)


# ---------------------------------------------------------------------------------------------------- numbers
def summary(s: Settings, rows: dict[str, Row]) -> dict[str, Any]:
    """The numbers of the page and of the claims, from the rows. JSON-able.

    mlm       {variant: {accuracy, loss: spreads; kept: accuracy over the teacher's; difference: of the loss from
              that of the whole recipe, paired}}
    task      {model: {accuracy, kept, kept_gain: the share of the teacher's accuracy above chance}}
    curves    {variant: losses, (seeds, points)}, and steps
    cost      parameters of both, speed {rows of a batch: quartiles}, teacher_step: quartiles
    """
    whole = study.values_of(rows, FULL, "loss", s.seeds)
    mlm = {}
    for name in VARIANTS:
        accuracy = study.values_of(rows, name, "accuracy", s.seeds)
        loss = study.values_of(rows, name, "loss", s.seeds)
        mlm[name] = {
            "accuracy": study.spread(accuracy),
            "loss": study.spread(loss),
            "kept": study.spread(accuracy / rows[TEACHER]["accuracy"]),
            "difference": study.spread(loss - whole),
        }
    best = study.values_of(rows, f"task, {TEACHER}", "accuracy", s.seeds)
    task = {TEACHER: {"accuracy": study.spread(best)}}
    for name in (*ON_TASK, AGAIN):
        accuracy = study.values_of(rows, f"task, {name}", "accuracy", s.seeds)
        task[name] = {
            "accuracy": study.spread(accuracy),
            "kept": study.spread(accuracy / best),
            "kept_gain": float((accuracy - 0.5).mean() / max((best - 0.5).mean(), 1e-6)),
        }
    cost = rows[COST]
    return {
        "teacher": {name: rows[TEACHER][name] for name in ("accuracy", "loss")},
        "untrained": {name: rows[HALF][name] for name in ("accuracy", "loss")},
        "mlm": mlm,
        "task": task,
        "steps": rows[f"{FULL}/0"]["steps"],
        "curves": {name: study.values_of(rows, name, "curve", s.seeds).tolist() for name in VARIANTS},
        "cost": {
            "parameters": cost["parameters"],
            "speed": {texts: study.quartiles(ratios) for texts, ratios in cost["speed"].items()},
            "teacher_step": study.quartiles(cost["teacher_step"]),
        },
    }


def head_starts(numbers: dict[str, Any]) -> dict[str, list[float | None]]:
    """{start: for each seed, the share of the steps after which the student with a teacher has the final held-out loss
    of the student without; None if it never has}.
    """
    steps = numbers["steps"]
    found = {}
    for start, (with_teacher, without) in {"layers": (FULL, START), "random": (RANDOM, ALONE)}.items():
        shares = []
        for own, other in zip(numbers["curves"][with_teacher], numbers["curves"][without]):
            reached = study.steps_to(steps, own, other[-1])
            shares.append(None if reached is None else reached / steps[-1])
        found[start] = shares
    return found


# ---------------------------------------------------------------------------------------------------- the page
def page(data: dict[str, Any], numbers: dict[str, Any]) -> str:
    """results/distilbert.md."""
    parts = __doc__.split("\n\n")
    lines = ["# " + parts[0].rstrip("."), ""]
    lines += study.heading(data, "python tests/benchmarks/distilbert.py")
    lines += [parts[2].strip().replace("\n", " "), "", "![curves and kept quality](distilbert.png)", ""]
    lines += ["## Size, speed and quality beside the paper's", "", *headline_table(numbers)]
    lines += ["## Masked language modelling, and the ablation", "", *mlm_table(numbers)]
    lines += ["## The task", "", *task_table(numbers)]
    lines += ["## Reading", "", *reading(numbers)]
    return "\n".join(lines).rstrip() + "\n"


def headline_table(numbers: dict[str, Any]) -> list[str]:
    """DistilBERT beside the paper: kept quality, size, speed."""
    cost = numbers["cost"]
    small, large = cost["parameters"]["student"], cost["parameters"]["teacher"]
    rows = [
        ["accuracy on the task, kept", "97 % (GLUE)", percent(numbers["task"][FULL]["kept"])],
        ["the same, distilled on the task, too", "", percent(numbers["task"][AGAIN]["kept"])],
        ["accuracy at masked tokens, kept", "", percent(numbers["mlm"][FULL]["kept"])],
        ["fewer parameters", "40 %", f"{100 * (1 - small / large):.0f} % ({large:,} to {small:,})"],
    ]
    for count, ratio in cost["speed"].items():
        rows.append([f"times as fast, {count} texts in a batch", "1.6", study.text(ratio, ".2f")])
    return table(["", "paper", "here"], rows)


def percent(r: dict[str, float | None]) -> str:
    """A spread in percent."""
    return study.text(r, ".1f", 100) + " %"


def mlm_table(numbers: dict[str, Any]) -> list[str]:
    """Every variant: held-out loss, accuracy, the share kept, and the loss beside that of the whole recipe."""
    teacher_row, untrained = numbers["teacher"], numbers["untrained"]
    rows = [
        ["teacher, 4 layers", f"{teacher_row['loss']:.3f}", f"{100 * teacher_row['accuracy']:.1f} %", "100 %", ""],
        [HALF, f"{untrained['loss']:.3f}", f"{100 * untrained['accuracy']:.1f} %",
         f"{100 * untrained['accuracy'] / teacher_row['accuracy']:.1f} %", ""],
    ]
    for name, row in numbers["mlm"].items():
        difference = "" if name == FULL else study.text(row["difference"], "+.3f")
        rows.append([name, study.text(row["loss"]), percent(row["accuracy"]), percent(row["kept"]), difference])
    return table(["student", "held-out loss", "accuracy", "accuracy kept", "loss − that of DistilBERT"], rows)


def task_table(numbers: dict[str, Any]) -> list[str]:
    """Accuracy on the task after the same fine-tuning."""
    rows = [["teacher", percent(numbers["task"][TEACHER]["accuracy"]), "100 %", "100 %"]]
    for name, row in numbers["task"].items():
        if name != TEACHER:
            rows.append([name, percent(row["accuracy"]), percent(row["kept"]), f"{100 * row['kept_gain']:.0f} %"])
    return table(["model", "accuracy", "kept", "kept of what is above chance"], rows)


def reading(numbers: dict[str, Any]) -> list[str]:
    """What the tables say, computed from them."""
    mlm = numbers["mlm"]
    lines = []
    for name in ("without L_ce", "without L_cos", "without L_mlm", RANDOM):
        lines.append(f"- {name}: the held-out loss {judged(mlm[name]['difference'])}.")
    for start, shares in head_starts(numbers).items():
        reached = [share for share in shares if share is not None]
        if len(reached) < len(shares):
            said = f"in {len(reached)} of {len(shares)} seeds"
        else:
            said = f"after {100 * float(np.mean(reached)):.0f} % of the steps (mean over seeds)"
        lines.append(f"- Start from {start}: the student with a teacher reaches the final loss of the one without "
                     f"{said}.")
    ratio = numbers["cost"]["teacher_step"]["mean"]
    return [*lines, f"- A step with the teacher takes {ratio:.1f} times as long."]


def judged(difference: dict[str, float | None]) -> str:
    """A paired difference of losses in words."""
    if difference["low"] is None:
        return f"is {difference['mean']:+.3f} away (one seed)"
    if difference["low"] > 0:
        return f"is higher by {study.text(difference)}"
    if difference["high"] < 0:
        return f"is lower by {study.text({k: -v for k, v in zip(('mean', 'high', 'low'), difference.values())})}"
    return f"does not differ clearly: {study.text(difference, '+.3f')}"


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Left: held-out loss against steps, with and without a teacher. Right: the losses of all variants."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    styles = {FULL: ("#4477aa", "-"), START: ("#4477aa", "--"), RANDOM: ("#cc6677", "-"), ALONE: ("#cc6677", "--")}
    labels = {FULL: "layers, teacher (DistilBERT)", START: "layers, no teacher", RANDOM: "random, teacher",
              ALONE: "random, no teacher"}
    for name, (color, line) in styles.items():
        mean = np.mean(numbers["curves"][name], axis=0)
        left.plot(numbers["steps"], mean, line, color=color, label=labels[name])
    left.axhline(numbers["teacher"]["loss"], color="0.5", linestyle=":", label="teacher (test)")
    left.set(xlabel="step", ylabel="held-out masked-LM loss", title="with and without a teacher")
    left.legend(frameon=False, fontsize=8)
    names = list(VARIANTS)
    means = [numbers["mlm"][name]["kept"]["mean"] * 100 for name in names]
    errors = [half_width(numbers["mlm"][name]["kept"]) * 100 for name in names]
    right.barh(names, means, xerr=errors, color="#88ccee", ecolor="0.3")
    right.axvline(97, color="0.5", linestyle=":")
    right.invert_yaxis()
    right.set(xlabel="accuracy at masked tokens kept, % (dotted: 97 %)", title="ablation")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def half_width(r: dict[str, float | None]) -> float:
    """Half the width of the interval of a spread; 0 for one seed."""
    return 0.0 if r["low"] is None else r["high"] - r["mean"]


PROGRAM = study.Program(NAME, __doc__, Settings(), SMOKE, rows_of, summary, page, draw)

if __name__ == "__main__":
    PROGRAM.main()
