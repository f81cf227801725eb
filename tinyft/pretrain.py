"""The shipped base models, trained from scratch on the snapshot's prose.

    make base      or      python -m tinyft.pretrain [NAME ...]

A BERT is trained by masked language modelling, and a GPT in three sizes by predicting the next token. A T5 that writes
names of functions is trained by pretrain_names.py. Seeds are fixed, training can be resumed at any moment, files are
float16, and each model has a card. All five take about two and a half hours on two cores. The masked-LM loss hardly
moves for the first thousand steps, then falls.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import checks, data
from .data import baselines
from .files import write_atomically
from .models import BERT, GPT, BERTConfig, GPTConfig
from .models.blocks import sinusoids
from .nn import Module
from .optim import AdamW, cosine_schedule
from .train import History, evaluate, fit

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Recipe:
    """One base model and its training: AdamW at a peak learning rate with warm-up and cosine decay to a tenth.

    lengths   {T: share of the steps}, in order. Short texts come first, as for BERT (Devlin et al., 2018, A.2)
    decay     weight decay
    tokens    tokens per step
    """

    config: GPTConfig | BERTConfig
    steps: int
    lr: float
    lengths: dict[int, float]
    warmup: float = 0.05
    decay: float = 0.1
    seed: int = 0
    tokens: int = 4096

    @property
    def masked(self) -> bool:
        """True for masked language modelling (BERT), False for causal language modelling (GPT)."""
        return isinstance(self.config, BERTConfig)

    def model(self) -> Module:
        """The model with random weights.

        A BERT gets sinusoids as position vectors. Reason: at width 128 with weights of N(0, 0.02²), the masked-LM loss
        stays for 1,500 steps at the level reached without context. It leaves that plateau at step 400 if the attention
        scores are as spread as at width 768 (by config.std = 0.05), and the position vectors differ clearly from the
        token vectors.
        """
        if not self.masked:
            return GPT(self.config, self.seed)
        model = BERT(self.config, self.seed)
        model.pos.weight.copy_(0.05 * sinusoids(*model.pos.weight.shape))
        return model

    def batches(self, split: str) -> Stages:
        """Batches of each length in turn, each for its share of the steps. split: train, valid or test."""
        counts = [round(share * self.steps) for share in self.lengths.values()]
        return Stages([self.batches_of(split, length) for length in self.lengths], counts)

    def batches_of(self, split: str, length: int) -> data.Batches:
        """Endless batches (B, length) of about self.tokens tokens each. split: train, valid or test.

        For BERT some tokens are masked, and are the labels.
        """
        tokens = data.pretraining("prose", split)
        batch_size = self.tokens // length
        if self.masked:
            return data.mlm_batches(tokens, length, batch_size, self.config.vocab, self.seed)
        return data.lm_batches(tokens, length, batch_size, self.seed)


class Stages:
    """Batches from one source after another: `counts[i]` batches of source i; the last source is endless."""

    def __init__(self, sources: list[data.Batches], counts: list[int]):
        self.sources = sources
        self.counts = counts
        self.given = 0  # number of batches returned

    def __iter__(self) -> Stages:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch, of the source whose turn it is: the first `counts[0]` are of source 0, and so on."""
        left = self.given                                # batches returned since this source's first one
        self.given += 1
        for source, count in zip(self.sources[:-1], self.counts):
            if left < count:
                return next(source)
            left -= count
        return next(self.sources[-1])

    def state_dict(self) -> dict:
        """The position in the stream. JSON-able."""
        return {"given": self.given, "sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict) -> None:
        """Continue exactly where `state` was taken. ValueError if it belongs to other sources; then nothing moves."""
        given = checks.whole("Stages.load_state_dict: given", state["given"], 0)
        if len(state["sources"]) != len(self.sources):
            raise ValueError(f"Stages.load_state_dict wants a state of {len(self.sources)} sources, "
                             f"got one of {len(state['sources'])}")
        before = [source.state_dict() for source in self.sources]
        try:
            for source, source_state in zip(self.sources, state["sources"]):
                source.load_state_dict(source_state)
        except Exception:
            for source, source_state in zip(self.sources, before):
                source.load_state_dict(source_state)
            raise
        self.given = given


BERT_CONFIG = BERTConfig(vocab=2048, positions=128, width=128, layers=4, heads=4, std=0.05)
SMALL_CONFIG = GPTConfig(vocab=2048, positions=128, width=64, layers=2, heads=2)
MIDDLE_CONFIG = GPTConfig(vocab=2048, positions=128, width=128, layers=4, heads=4)
LARGE_CONFIG = GPTConfig(vocab=2048, positions=128, width=160, layers=6, heads=5)
BERT_LENGTHS = {32: 0.25, 64: 0.25, 128: 0.5}
GPT_LENGTHS = {128: 1.0}
RECIPES = {
    "base-bert": Recipe(BERT_CONFIG, steps=3600, lr=2e-3, lengths=BERT_LENGTHS, decay=0.01),
    "base-gpt-small": Recipe(SMALL_CONFIG, steps=3000, lr=4e-3, lengths=GPT_LENGTHS),
    "base-gpt": Recipe(MIDDLE_CONFIG, steps=3000, lr=2e-3, lengths=GPT_LENGTHS),
    "base-gpt-large": Recipe(LARGE_CONFIG, steps=3000, lr=1.5e-3, lengths=GPT_LENGTHS),
}
NAMES = [*RECIPES, "base-seq2seq"]  # the last one has its recipe in pretrain_names.py


def pretrain(name: str, work: Path, assets: Path = ASSETS, steps: int | None = None) -> dict[str, float]:
    """Train one base model, or continue from the checkpoint in work/NAME.

    Writes the model, its card (README.md), history.json and loss.png to assets/NAME. Returns its metrics on the test
    split. steps: in place of the recipe's. ValueError for another name, or steps below 1.
    """
    from .formats.huggingface import save

    checks.one_of("pretrain: name", name, NAMES)
    if name not in RECIPES:
        from .pretrain_names import pretrain_names

        return pretrain_names(work, assets, steps)
    recipe = RECIPES[name]
    if steps is not None:
        recipe = replace(recipe, steps=checks.whole("pretrain: steps", steps, 1))
    longest = list(recipe.lengths)[-1]  # held-out metrics are on texts of this length
    valid = recipe.batches_of("valid", longest)
    test = recipe.batches_of("test", longest)
    model = recipe.model()

    def run_evaluation() -> dict[str, float]:
        return evaluate(model, valid.once())

    history = fit(
        model,
        recipe.batches("train"),
        recipe.steps,
        AdamW(recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.decay),
        cosine_schedule(recipe.warmup, 0.1),  # from the peak to a tenth of it
        out=work / name,
        resume=True,
        save_every=100,
        seed=recipe.seed,
        evaluate=run_evaluation,
        evaluate_every=max(recipe.steps // 10, 1),
    )
    metrics = evaluate(model, test.once())
    folder = assets / name
    save(model, folder, data.shipped_tokenizer(), dtype=np.float16)
    losses = [round(value, 3) for value in smooth(history.losses)]
    evaluations = [[step, round(metrics["loss"], 4)] for step, metrics in history.evaluations]
    write_atomically({
        folder / "README.md": card(name, recipe, metrics).encode(),
        folder / "history.json": json.dumps({"losses": losses, "evaluations": evaluations}).encode(),
    })
    draw(history, folder / "loss.png", name)
    return metrics


def references(recipe: Recipe) -> dict[str, float]:
    """{name: value}: the test metric of models that only count training tokens, unigrams and bigrams.

    Accuracy at masked tokens for BERT, perplexity for GPT; the card shows them beside the trained model.
    """
    train, valid, test = (data.pretraining("prose", split) for split in data.SPLITS)
    V = recipe.config.vocab
    if recipe.masked:
        return {
            "unigram accuracy": baselines.unigram_mlm_accuracy(train, test),
            "bigram accuracy": baselines.bigram_mlm_accuracy(train, test, V),
        }
    return {
        "unigram perplexity": baselines.unigram_perplexity(train, test, V),
        "bigram perplexity": baselines.bigram_perplexity(train, valid, test, V),
    }


CARD = """# {name}

{kind}: {config.layers} layers, {config.width} wide, {config.heads} heads,
{config.positions} positions, vocabulary {config.vocab:,}; {parameters:,} parameters, float16 on disk.

Trained from scratch by `make base` (`tinyft/pretrain.py`, seed {recipe.seed}) on the training part of the prose that
ships with tinyft: the Python language reference, docstrings and comments ({tokens:,} tokens; `assets/LICENSES.txt`).
{recipe.steps:,} steps of {recipe.tokens:,} tokens ({epochs:.1f} epochs; {lengths}),
AdamW, peak learning rate {recipe.lr:g}, weight decay {recipe.decay:g}, warm-up {recipe.warmup:.0%}, cosine decay to a
tenth.

Held out (modules that occur nowhere in training):

| | |
|---|---|
| this model, on all held-out text | {result} |
{references}

![loss](loss.png)

It knows a little about English and Python's documentation, and nothing else.  Made to learn from, not to be used.
"""


def card(name: str, recipe: Recipe, metrics: dict[str, float]) -> str:
    """The model card, Markdown: architecture, training, and the test metrics beside those of models that count tokens.

    name: of the base model.  metrics: of the trained model on the test split.
    """
    accuracy = f"{100 * metrics['accuracy']:.1f} %"
    perplexity = f"{metrics['perplexity']:.1f}"
    if recipe.masked:
        kind = "A BERT (masked language model)"
        result = f"{accuracy} of masked tokens, pseudo-perplexity {perplexity}"
    else:
        kind = "A GPT-2 (causal language model)"
        result = f"perplexity {perplexity}, accuracy {accuracy}"
    rows = []
    for metric, value in references(recipe).items():
        text = f"{100 * value:.1f} %" if "accuracy" in metric else f"{value:.1f}"
        rows.append(f"| {metric} | {text} |")
    tokens = len(data.pretraining("prose", "train"))
    return CARD.format(
        name=name,
        kind=kind,
        recipe=recipe,
        config=recipe.config,
        parameters=sum(p.size for p in recipe.model().parameters()),
        tokens=tokens,
        epochs=recipe.steps * recipe.tokens / tokens,
        lengths=", ".join(f"{share:.0%} in texts of {T}" for T, share in recipe.lengths.items()),
        result=result,
        references="\n".join(rows),
    )


def smooth(values: list[float], points: int = 200) -> list[float]:
    """Means of equal stretches, at most `points` of them."""
    return [float(np.mean(part)) for part in np.array_split(values, min(points, len(values)))]


def draw(history: History, path: Path, name: str) -> None:
    """Save a figure of the training and held-out loss at `path`, with `name` as title, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3), dpi=100)
    curve = smooth(history.losses)
    ax.plot(np.linspace(0, len(history.losses), len(curve)), curve, label="training", color="#4477aa")
    steps = [step for step, _ in history.evaluations]
    losses = [metrics["loss"] for _, metrics in history.evaluations]
    ax.plot(steps, losses, "o-", ms=3, label="held out", color="#cc6677")
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=name)
    ax.set_ylim(0, min(8, max(curve) * 1.05))  # random weights give a loss of about ln 2048 = 7.6
    ax.legend(frameon=False)
    fig.tight_layout()
    write_figure(fig, path)
    plt.close(fig)


def write_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically({path: content.getvalue()})


def main(argv: list[str] | None = None) -> int:
    """Train the base models named on the command line, or all, and print their metrics. Returns the exit status."""
    p = argparse.ArgumentParser(prog="tinyft.pretrain", description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", default=[], help=f"which of {', '.join(NAMES)} (default: all)")
    p.add_argument("--work", type=Path, default=Path("work/base"), help="folder for checkpoints")
    p.add_argument("--assets", type=Path, default=ASSETS, help="folder for the trained models")
    p.add_argument("--steps", type=int, help="steps in place of the recipe's")
    args = p.parse_args(argv)
    unknown = set(args.names) - set(NAMES)
    if unknown:
        p.error(f"there is no base model {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if args.steps is not None and args.steps < 1:
        p.error(f"--steps wants a whole number of at least 1, got {args.steps}")
    for name in args.names or NAMES:
        metrics = pretrain(name, args.work, args.assets, args.steps)
        print(name, {metric: round(value, 3) for metric, value in metrics.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
