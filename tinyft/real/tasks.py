"""Tasks as conversations: the instruction is the system's message, an example is a turn of user and assistant.

    names     the first sentence of a docstring -> the name of its function
    intact    is a sentence intact, or were two of its words swapped?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import checks, data
from ..data import Pairs, baselines, name_baselines
from ..data.scores import bootstrap_interval, exact_match, name_words, token_f1, wilson_interval

Metric = Callable[[Sequence[str], Sequence[str]], np.ndarray]  # (true, predicted) -> one score per example, (N,)
TASKS = ("names", "intact")


@dataclass(frozen=True)
class ChatTask:
    """A task whose answers are texts that can be checked.

    instruction     the system's message
    train, valid, test   prompts and responses
    read            the prediction in an answer of a model
    metrics         {name: function of true and predicted responses}; the first one decides which row is best
    baselines       test predictions of models without a network, {name: (N,)}
    longest         tokens of an answer, the end included; no response is longer
    shots           indices of the training examples that few-shot prompts show
    """

    name: str
    instruction: str
    train: Pairs
    valid: Pairs
    test: Pairs
    read: Callable[[str], str]
    metrics: dict[str, Metric]
    baselines: Callable[[], dict[str, list[str]]]
    longest: int
    shots: tuple[int, ...]

    def messages(self, prompt: str, shots: int = 0) -> list[dict[str, str]]:
        """The conversation that ends with this prompt: the instruction, `shots` solved examples, the prompt."""
        turns = [{"role": "system", "content": self.instruction}]
        for i in self.shots[:shots]:
            turns.append({"role": "user", "content": self.train.prompts[i]})
            turns.append({"role": "assistant", "content": self.train.responses[i]})
        return [*turns, {"role": "user", "content": prompt}]

    def score(self, answers: Sequence[str]) -> dict[str, np.ndarray]:
        """{metric: one score per example} of the answers to the first prompts of the test split."""
        predicted = [self.read(answer) for answer in answers]
        return {name: metric(self.test.responses[: len(answers)], predicted) for name, metric in self.metrics.items()}


def chat_task(name: str, test: int = 200, seed: int = 0) -> ChatTask:
    """The task of this name, one of TASKS, with at most `test` test examples.

    seed    chooses and orders the training examples
    """
    checks.one_of("chat_task: name", name, TASKS)
    test = checks.whole("chat_task: test", test, 1)
    return names(test, seed) if name == "names" else intact(test, seed)


def summarise(values: np.ndarray) -> list[float]:
    """[mean, low, high]: the mean of scores (N,) and its 95 % interval, by Wilson if all scores are 0 or 1."""
    if np.isin(values, (0, 1)).all():
        low, high = wilson_interval(int(values.sum()), len(values))
    else:
        low, high = bootstrap_interval(values)
    return [float(values.mean()), low, high]


def first(pairs: Pairs, count: int) -> Pairs:
    """The first `count` pairs."""
    return Pairs(pairs.prompts[:count], pairs.responses[:count])


# ---------------------------------------------------------------------------------------------------- names
def names(test: int, seed: int) -> ChatTask:
    """The task *names*. The first few-shot turns show names of two, one and three words.

    The base's token F1 on 40 validation examples: 0.13, 0.20 and 0.21 for three instructions, of which this is the
    best; with the first of them 0.25, 0.26 and 0.29 for 2, 4 and 8 solved examples.
    """
    task = data.task("names", seed)
    held_out = first(task.test, test)
    return ChatTask(
        name="names",
        instruction="Give a name for the Python function described by the user.",
        train=task.train, valid=task.valid, test=held_out,
        read=data.read_name,
        metrics={"token F1": token_f1, "exact": exact_match},
        baselines=lambda: name_baselines.simple_names(task.train, task.valid, held_out.prompts),
        longest=16,
        shots=different_lengths(task.train.responses),
    )  # fmt: skip


def different_lengths(responses: Sequence[str]) -> tuple[int, ...]:
    """The indices of the first names of two, one and three words, and then of the others."""
    lengths = [len(name_words(name)) for name in responses]
    chosen = [lengths.index(count) for count in (2, 1, 3)]
    others = [i for i in range(len(responses)) if i not in chosen]
    return tuple(chosen + others)


# ---------------------------------------------------------------------------------------------------- intact
LABELS = ("swapped", "intact")


def intact(test: int, seed: int) -> ChatTask:
    """The task *intact*. Few-shot turns show both labels in turn.

    A negative result: 100 steps of 8 sentences leave the model at chance, 0.46 [0.37, 0.56] of 100 test sentences. It
    answers "intact" to nearly all of them. Before, it seldom gave a readable answer, 0.31 [0.23, 0.41].
    """
    task = data.task("intact", seed, train_size=3000)
    held_out = data.Examples(task.test.texts[:test], task.test.labels[:test])

    def predict() -> dict[str, list[str]]:
        found = baselines.simple(task.train, task.valid, held_out, classes=2)
        return {name: as_words(labels) for name, labels in found.items()}

    return ChatTask(
        name="intact",
        instruction="Is the sentence intact, or were two of its words swapped? Answer intact or swapped.",
        train=as_pairs(task.train), valid=as_pairs(task.valid), test=as_pairs(held_out),
        read=read_label,
        metrics={"accuracy": same},
        baselines=predict,
        longest=8,
        shots=alternating(task.train.labels),
    )  # fmt: skip


def as_pairs(examples: data.Examples) -> Pairs:
    """Texts and the words of their labels."""
    return Pairs(tuple(examples.texts), tuple(as_words(examples.labels)))


def as_words(labels: np.ndarray) -> list[str]:
    """The words of labels (N,), 0 or 1."""
    return [LABELS[label] for label in labels]


def alternating(labels: np.ndarray) -> tuple[int, ...]:
    """The indices of examples with the labels 0, 1, 0, 1, ..., as many as there are of the rarer label."""
    pairs = zip(np.flatnonzero(labels == 0), np.flatnonzero(labels == 1))
    return tuple(int(i) for pair in pairs for i in pair)


def read_label(answer: str) -> str:
    """The label that occurs first in an answer; "" if none does."""
    positions = {label: answer.lower().find(label) for label in LABELS}
    found = [label for label in LABELS if positions[label] >= 0]
    return min(found, key=positions.get) if found else ""


def same(true: Sequence[str], predicted: Sequence[str]) -> np.ndarray:
    """1 where a prediction is the true response, else 0: (N,) float64."""
    return np.array([a == b for a, b in zip(true, predicted, strict=True)], np.float64)
