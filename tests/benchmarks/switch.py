"""Switch models beside a dense one at equal FLOPs per token and at equal time, and dense students of a Switch model.

    python tests/benchmarks/switch.py           the rows that are missing, then the page and the picture
    python tests/benchmarks/switch.py --page    the page and the picture from the stored rows

Protocol: small GPTs learn the shipped prose, all on the same batches of a seed. The learning rate is constant after its
warm-up, so the losses of two runs can be compared at every step. Dense and Switch models have each the best of three
rates after a third of the steps, by validation text. The feed-forwards of a Switch model have E experts. A token visits
one of them, so it costs the FLOPs of the dense model, and the router's. No token is dropped. The wide dense model has
the feed-forward parameters of the model with 4 experts, and every token visits all of them. Losses are held out, on the
same windows for all models. Milliseconds of a step are processor time, from paired rounds. A student has the dense
model's shape and trains for as many steps as its teacher did. Intervals are 95 %, by Student's t over the seeds, of
paired differences or ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import study
from report import table
from study import Row, Study

import tinyft as ft

NAME = "switch"


@dataclass(frozen=True)
class Settings:
    """Sizes of the study. longer: the dense model trains so many times the steps of the others."""

    seeds: int = 3
    experts: tuple[int, ...] = (4, 8, 32)
    width: int = 64
    hidden: int = 128
    layers: int = 2
    heads: int = 2
    length: int = 64
    batch: int = 16
    steps: int = 640
    longer: int = 2
    rates: tuple[float, ...] = (1.5e-3, 2.5e-3, 4e-3)
    rate_steps: int = 200
    warmup: int = 50
    every: int = 64
    windows: int = 160
    rounds: int = 10


SMOKE = Settings(
    seeds=1, experts=(2, 3, 4), length=16, batch=2, steps=4, rates=(1e-3, 2e-3), rate_steps=2, warmup=2, every=2,
    windows=8, rounds=2,
)


@dataclass(frozen=True)
class Model:
    """The width of a feed-forward, and how many there are in a block: None for a dense model."""

    hidden: int
    experts: int | None = None


DENSE = "dense"
WIDE = "dense, wide feed-forwards"  # as many parameters as the Switch model with the fewest experts
DISTILLED = "+ distillation"
START = "+ start from the teacher"
BOTH = "+ both"
LONGER = "dense, all its steps"  # as many as teacher and student together
LENGTHS = (0.25, 0.5, 1.0)  # shares of the steps, for the trend
STUDENTS = (DISTILLED, START, BOTH)
SOFT = 0.25  # the share of the teacher in the loss; the labels have the rest
PAPER = {DISTILLED: 0.03, START: 0.20, BOTH: 0.29}  # shares of the gain, Fedus et al. 2021, table 6
COST = "cost"
RATES = "learning rates"


def name_of(experts: int) -> str:
    """The name of a Switch model."""
    return f"Switch, {experts} experts"


def models(s: Settings) -> dict[str, Model]:
    """{name: its shape} of the models that learn from the text alone."""
    found = {DENSE: Model(s.hidden), WIDE: Model(s.hidden * min(s.experts))}
    for experts in s.experts:
        found[name_of(experts)] = Model(s.hidden, experts)
    return found


# ---------------------------------------------------------------------------------------------------- models, data
def new_model(s: Settings, name: str, seed: int) -> ft.GPT:
    """One of the models, with random weights. A Switch model has experts in every block."""
    shape = models(s)[name]
    switch = None
    if shape.experts is not None:
        # With f = E no token is dropped. An expert computes its own tokens alone, so this costs nothing.
        switch = ft.SwitchConfig(experts=shape.experts, every=1, capacity=shape.experts, eval_capacity=shape.experts)
    config = ft.GPTConfig(
        vocab=2048, positions=s.length, width=s.width, layers=s.layers, heads=s.heads, hidden=shape.hidden,
        switch=switch,
    )
    return ft.GPT(config, seed)


def teacher_name(s: Settings) -> str:
    """The Switch model with the most experts: the teacher."""
    return name_of(max(s.experts))


def size(model: ft.Module) -> int:
    """The number of parameters."""
    return sum(p.size for p in model.parameters())


@lru_cache(maxsize=2)
def held_out(s: Settings, split: str = "test") -> list[dict[str, np.ndarray]]:
    """Batches of held-out prose, at equal distances in a split."""
    return ft.data.held_out_batches(study.prose(split), s.length, s.windows, 32)


def training_batches(s: Settings, seed: int) -> ft.data.Batches:
    """The batches of a seed, the same for all models."""
    return ft.data.lm_batches(study.prose("train"), s.length, s.batch, seed)


# ---------------------------------------------------------------------------------------------------- the runs
def optimizer(lr: float) -> ft.AdamW:
    """The optimizer of all runs."""
    return ft.AdamW(lr, betas=(0.9, 0.98), weight_decay=0.1)


def rates_row(s: Settings) -> Row:
    """{"losses": {model: a loss for each rate}, "dense", "switch": the best rates}, by one model of each family."""
    losses = {}
    best = {}
    for family, name in (("dense", DENSE), ("switch", name_of(s.experts[1]))):
        losses[name] = []
        for lr in s.rates:
            model = new_model(s, name, s.seeds)
            batches = training_batches(s, 2 * s.seeds)
            ft.fit(model, batches, s.rate_steps, optimizer(lr), ft.constant_schedule(s.warmup), progress=False)
            losses[name].append(round(ft.evaluate(model, held_out(s, "valid"))["loss"], 4))
        best[family] = s.rates[int(np.argmin(losses[name]))]
    return {"losses": losses, **best}


@dataclass(frozen=True)
class Runs:
    """The training runs of the study. rates: the learning rates of "dense" and "switch" models."""

    s: Settings
    study: Study
    rates: Row

    def train(self, model: ft.Module, key: str, seed: int, steps: int, family: str, loss: ft.Loss | None = None
              ) -> ft.History:
        """Train a model in place; a run that ended is read from its checkpoint. seed: of the batches."""
        s = self.s
        return ft.fit(
            model, training_batches(s, seed), steps, optimizer(self.rates[family]), ft.constant_schedule(s.warmup),
            loss=loss, seed=seed, out=self.study.folder(key), resume=True, progress=False,
            evaluate=partial(ft.evaluate, model, held_out(s)), evaluate_every=s.every,
        )

    def pretrain(self, name: str, seed: int) -> tuple[ft.Module, ft.History]:
        """A model after its pretraining. The dense one trains longer."""
        s = self.s
        model = new_model(s, name, seed)
        steps = s.longer * s.steps if name == DENSE else s.steps
        family = "dense" if models(s)[name].experts is None else "switch"
        return model, self.train(model, f"{name}/{seed}", seed, steps, family)

    def pretraining_row(self, name: str, seed: int) -> Row:
        """The learning curve of one model; of a Switch model also its balance loss at the end."""
        _, history = self.pretrain(name, seed)
        row = study.curve(history)
        if "balance" in history.terms:
            row["balance"] = round(float(np.mean(history.terms["balance"][-100:])), 5)
        return row

    def student_row(self, name: str, seed: int) -> Row:
        """The learning curve of one dense student of the largest Switch model."""
        s = self.s
        teacher, _ = self.pretrain(teacher_name(s), seed)
        loss = ft.Hinton(teacher, temperature=1, soft=SOFT) if name in (DISTILLED, BOTH) else None
        if name == DISTILLED:  # the dense model's random weights and batches
            model = new_model(s, DENSE, seed)
            order = seed
        else:
            model = ft.dense_student(teacher, seed=seed)
            order = s.seeds + seed  # of the batches: another one than the teacher's
        return study.curve(self.train(model, f"{name}/{seed}", order, s.steps, "dense", loss))


def cost_row(s: Settings) -> Row:
    """Parameters, and processor time of training steps: that of each model over the dense model's, paired."""
    made = {name: new_model(s, name, 0) for name in models(s)}
    batch = next(training_batches(s, 0))
    dense = partial(study.step_seconds, made[DENSE], batch)
    ratios = {}
    for name, model in made.items():
        if name != DENSE:
            ratios[name] = study.time_ratios(partial(study.step_seconds, model, batch), dense, s.rounds)
    distil = ft.Hinton(made[teacher_name(s)], temperature=1, soft=SOFT)
    distilled = partial(study.step_seconds, new_model(s, DENSE, 0), batch, distil)
    ratios[DISTILLED] = study.time_ratios(distilled, dense, s.rounds)
    seconds = [dense() for _ in range(s.rounds)]
    return {
        "parameters": {name: size(model) for name, model in made.items()},
        "ratios": ratios,
        "dense_ms": 1e3 * float(np.median(seconds)),
    }


def rows_of(s: Settings, study_: Study) -> dict[str, Row]:
    """All rows; those that are missing are measured."""
    first = study_.run({COST: partial(cost_row, s), RATES: partial(rates_row, s)})
    runs = Runs(s, study_, first[RATES])
    jobs: dict[str, Callable[[], Row]] = {}
    for seed in range(s.seeds):
        for name in models(s):
            jobs[f"{name}/{seed}"] = partial(runs.pretraining_row, name, seed)
        for name in STUDENTS:
            jobs[f"{name}/{seed}"] = partial(runs.student_row, name, seed)
    return first | study_.run(jobs)


# ---------------------------------------------------------------------------------------------------- numbers
def summary(s: Settings, rows: dict[str, Row]) -> dict[str, Any]:
    """The numbers of the page and of the claims, from the rows. JSON-able.

    steps, curves    of every model: steps, and held-out losses (seeds, points)
    loss             {model: spread of its loss at the end}; of the dense model, after as many steps as the others
    speed            {Switch model: ratio of step times; by_steps, by_time: times faster to the dense model's loss;
                     equal_steps, equal_time: its loss − the dense model's; by_length: the same at LENGTHS}
    gain             loss of the dense model − that of the largest Switch model
    shares           {student: the share of the gain that it keeps}; LONGER: the dense model after all its steps
    """
    names = [*models(s), *STUDENTS]
    curves = {name: study.values_of(rows, name, "curve", s.seeds) for name in names}
    steps = {name: rows[f"{name}/0"]["steps"] for name in names}
    at_end = {name: curves[name][:, -1] for name in names}
    at_end[DENSE] = np.array([loss_at(steps[DENSE], losses, s.steps) for losses in curves[DENSE]])
    at_end[LONGER] = curves[DENSE][:, -1]
    cost = rows[COST]
    ratios = {name: study.quartiles(values) for name, values in cost["ratios"].items()}
    speed = {}
    for name in map(name_of, s.experts):
        speed[name] = speed_of(s, steps, curves[DENSE], curves[name], ratios[name]["mean"])
    gain = at_end[DENSE] - at_end[teacher_name(s)]
    shares = {}
    for name in (*STUDENTS, LONGER):
        shares[name] = (at_end[DENSE] - at_end[name]).tolist()
    large = cost["parameters"][teacher_name(s)]
    return {
        "steps": steps,
        "curves": {name: losses.tolist() for name, losses in curves.items()},
        "loss": {name: study.spread(losses) for name, losses in at_end.items()},
        "parameters": cost["parameters"],
        "dense_ms": cost["dense_ms"],
        "rates": rows[RATES],
        "ratios": ratios,
        "speed": speed,
        "gain": study.spread(gain),
        "shares": {name: share_of(gain, kept) for name, kept in shares.items()},
        "beyond_longer": study.spread(at_end[LONGER] - at_end[BOTH]),
        "compression": 1 - cost["parameters"][DENSE] / large,
    }


def loss_at(steps: list[int], losses: Any, step: float) -> float:
    """The held-out loss at a step, interpolated between evaluations; beyond the last one, the last loss."""
    return float(np.interp(step, steps, losses))


def speed_of(s: Settings, steps: dict[str, list[int]], dense: np.ndarray, switch: np.ndarray,
             ratio: float) -> dict[str, Any]:
    """How much faster a Switch model is, and its loss beside the dense model's, over seeds.

    steps: of the evaluations. dense, switch: losses (seeds, points). ratio: of the times of a step."""
    by_steps = []
    equal_steps = []
    equal_time = []
    for of_dense, of_switch in zip(dense, switch):
        by_steps.append(times_faster(s.steps, steps[DENSE], of_dense, of_switch))
        equal_steps.append(of_switch[-1] - loss_at(steps[DENSE], of_dense, s.steps))
        equal_time.append(of_switch[-1] - loss_at(steps[DENSE], of_dense, s.steps * ratio))
    return {
        "by_steps": study.spread(by_steps),
        "by_time": study.spread(np.array(by_steps) / ratio),
        "equal_steps": study.spread(equal_steps),
        "equal_time": study.spread(equal_time),
        "by_length": [gap_at(steps, dense, switch, share * s.steps) for share in LENGTHS],
    }


def gap_at(steps: dict[str, list[int]], dense: np.ndarray, switch: np.ndarray, step: float) -> float:
    """The Switch model's loss − the dense model's at one step: the mean over seeds."""
    points = switch.shape[1]  # the Switch model ends earlier; up to there, both have the same steps
    gaps = []
    for of_dense, of_switch in zip(dense, switch):
        gaps.append(loss_at(steps[DENSE][:points], of_switch, step) - loss_at(steps[DENSE], of_dense, step))
    return float(np.mean(gaps))


def times_faster(N: int, steps: list[int], dense: Any, switch: Any) -> float:
    """N / the step at which the Switch model has the dense model's loss of step N.

    If it never has, the dense model is faster: the step at which it has the Switch model's last loss, over N.
    Both curves are of one seed, with evaluations at the same steps; the dense one may be longer."""
    reached = study.steps_to(steps, switch, loss_at(steps, dense, N))
    if reached is not None:
        return N / reached
    return study.steps_to(steps, dense, switch[-1]) / N


def percent(numbers: dict[str, Any], name: str) -> str:
    """The share of the gain that a student keeps, in words; "no gain" if its teacher is not better than dense."""
    if numbers["gain"]["mean"] <= 0:
        return "no gain"
    return f"{100 * numbers['shares'][name]['share']:.0f} %"


def share_of(gain: np.ndarray, kept: list[float]) -> dict[str, Any]:
    """{share: mean over seeds of what is kept, over the mean gain; kept: the spread of what is kept, in nats}."""
    return {"share": float(np.mean(kept) / np.mean(gain)), "kept": study.spread(kept)}


# ---------------------------------------------------------------------------------------------------- the page
def page(data: dict[str, Any], numbers: dict[str, Any]) -> str:
    """results/switch.md."""
    parts = __doc__.split("\n\n")
    lines = ["# " + parts[0].rstrip("."), ""]
    lines += study.heading(data, "python tests/benchmarks/switch.py")
    lines += [parts[2].strip().replace("\n", " "), "", "![learning curves](switch.png)", ""]
    lines += ["## Switch and dense at equal FLOPs per token, and at equal time", "", *speed_table(numbers)]
    lines += ["## Dense students of the largest Switch model", "", *student_table(numbers)]
    lines += ["## Reading", "", *reading(numbers)]
    return "\n".join(lines).rstrip() + "\n"


def speed_table(numbers: dict[str, Any]) -> list[str]:
    """A row for each model."""
    steps = numbers["steps"][DISTILLED][-1]
    rows = []
    for name, ratio in ((DENSE, 1.0), (WIDE, numbers["ratios"][WIDE]["mean"])):
        rows.append([name, f"{numbers['parameters'][name]:,}", f"{numbers['dense_ms'] * ratio:.0f}",
                     study.text(numbers["loss"][name]), "", "", "", ""])
    for name, speed in numbers["speed"].items():
        ms = numbers["dense_ms"] * numbers["ratios"][name]["mean"]
        rows.append([
            name, f"{numbers['parameters'][name]:,}", f"{ms:.0f}", study.text(numbers["loss"][name]),
            study.text(speed["equal_steps"], "+.3f"), study.text(speed["equal_time"], "+.3f"),
            study.text(speed["by_steps"], ".2f"), study.text(speed["by_time"], ".2f"),
        ])
    head = ["model", "parameters", "ms a step", f"held-out loss after {steps} steps", "− dense, equal steps",
            "− dense, equal time", "times faster, by steps", "times faster, by time"]
    return table(head, rows)


def student_table(numbers: dict[str, Any]) -> list[str]:
    """A row for each student: its loss, and the share of the gain beside the paper's."""
    rows = []
    for name, share in numbers["shares"].items():
        paper = f"{100 * PAPER[name]:.0f} %" if name in PAPER else ""
        rows.append([name, study.text(numbers["loss"][name]), study.text(share["kept"], "+.3f"),
                     percent(numbers, name), paper])
    lines = table(["student", "held-out loss", "below the dense model", "share of the gain", "paper"], rows)
    return [f"The gain: {study.text(numbers['gain'], '+.3f')} nats. The student has "
            f"{100 * numbers['compression']:.0f} % fewer parameters than its teacher.", "", *lines]


def reading(numbers: dict[str, Any]) -> list[str]:
    """What the tables say, computed from them."""
    best = max(numbers["speed"], key=lambda name: numbers["speed"][name]["by_steps"]["mean"])
    speed = numbers["speed"][best]
    wide = numbers["loss"][DENSE]["mean"] - numbers["loss"][WIDE]["mean"]
    rates = numbers["rates"]
    tried = [f"{name} {listed(losses, '.3f')}" for name, losses in rates["losses"].items()]
    lines = [
        f"- Learning rates: {rates['dense']:g} for dense models, {rates['switch']:g} for Switch models (losses of the "
        f"three rates: {'; '.join(tried)}).",
        f"- By steps, {best} reaches the dense model's loss {study.text(speed['by_steps'], '.2f')} times as fast; by "
        f"time, {study.text(speed['by_time'], '.2f')} times. The paper has 7. A step of the Switch model takes "
        f"{numbers['ratios'][best]['mean']:.2f} times as long: its experts are many small matrix products, and the "
        "optimizer updates all of them.",
        f"- Loss minus the dense model's after {', '.join(f'{share:g}' for share in LENGTHS)} of the steps: "
        f"{'; '.join(trend(name, row) for name, row in numbers['speed'].items())}. Every expert sees a share of the "
        "tokens, so experts are worse at first. The wide dense model, with all of these parameters at every token, is "
        f"{wide:.3f} below the dense one.",
    ]
    return lines + student_reading(numbers)


def trend(name: str, speed: dict[str, Any]) -> str:
    """The gaps of a Switch model at LENGTHS, in words."""
    return f"{name.removeprefix('Switch, ')} {listed(speed['by_length'], '+.3f')}"


def listed(values: list[float], form: str) -> str:
    """Numbers with commas between them."""
    return ", ".join(f"{value:{form}}" for value in values)


def student_reading(numbers: dict[str, Any]) -> list[str]:
    """What the table of the students says. Shares are of a gain, if there is one."""
    beyond = f"its loss minus that of the student with both is {study.text(numbers['beyond_longer'], '+.3f')}."
    if numbers["gain"]["mean"] <= 0:
        return [
            "- The largest Switch model has no gain over the dense one after these steps, so there is no share of it "
            "to keep. The student without its teacher's parameters learns faster at first than the dense model.",
            "- A student that starts from its teacher's parameters also inherits the teacher's steps. The fair "
            f"neighbour is the dense model that trained as long as both together: {beyond}",
        ]
    return [
        f"- The students keep of the gain: distilled {percent(numbers, DISTILLED)}, with the teacher's other "
        f"parameters {percent(numbers, START)}, with both {percent(numbers, BOTH)}; the paper has 3, 20 and 29 %.",
        "- A student that starts from its teacher's parameters also inherits the teacher's steps. The fair neighbour "
        f"is the dense model that trained as long as both together: it is at {percent(numbers, LONGER)} of the gain; "
        f"{beyond}",
    ]


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Held-out loss against steps and against time of the Switch models; against steps, of the students."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), sharey=True, layout="constrained")
    colors = ["0.3", "#88ccee", "#4477aa", "#332288"]
    for color, name in zip(colors, [DENSE, *numbers["speed"]]):
        losses = np.mean(numbers["curves"][name], axis=0)
        steps = np.array(numbers["steps"][name])
        ratio = 1.0 if name == DENSE else numbers["ratios"][name]["mean"]
        axes[0].plot(steps, losses, color=color, label=name)
        axes[1].plot(steps * ratio * numbers["dense_ms"] / 1e3, losses, color=color, label=name)
    largest = list(numbers["speed"])[-1]
    axes[2].plot(numbers["steps"][DENSE], np.mean(numbers["curves"][DENSE], axis=0), color="0.3", label=DENSE)
    axes[2].axhline(numbers["loss"][largest]["mean"], color="#332288", linestyle=":", label="the teacher's last loss")
    for color, name in zip(("#ddcc77", "#cc6677", "#aa4499"), STUDENTS):
        axes[2].plot(numbers["steps"][name], np.mean(numbers["curves"][name], axis=0), color=color, label=name)
    for ax, label, title in zip(axes, ("step", "processor seconds of training", "step"),
                                ("equal FLOPs per token", "equal time", "dense students")):
        ax.set(xlabel=label, title=title)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("held-out loss, nats per token")
    lowest = min(float(np.min(losses)) for losses in numbers["curves"].values())
    axes[0].set_ylim(lowest - 0.1, lowest + 1.6)
    figure.savefig(path, dpi=120)
    plt.close(figure)


PROGRAM = study.Program(NAME, __doc__, Settings(), SMOKE, rows_of, summary, page, draw)

if __name__ == "__main__":
    PROGRAM.main()
