"""The shipped base models, trained from scratch on the snapshot's prose:  `make base`, or  python -m tinyft.pretrain [NAME ...]

A BERT by masked language modelling and a GPT in three sizes by predicting the next token; fixed seeds, resumable at any moment, float16
on disk, each with a model card.  About two hours on two cores; masked-LM loss hardly moves for the first thousand steps, then falls.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import baselines, data
from .models import BERT, GPT, BERTConfig, GPTConfig
from .nn import Module
from .optim import AdamW, cosine
from .train import History, evaluate, fit

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Recipe:
    "What is trained and how: 4,096 tokens a step, AdamW at a peak rate with warm-up and cosine decay to a tenth."
    config: GPTConfig | BERTConfig
    steps: int
    lr: float
    T: int = 128
    batch: int = 32
    warmup: float = 0.05
    decay: float = 0.1
    seed: int = 0

    def model(self) -> Module:
        return (BERT if isinstance(self.config, BERTConfig) else GPT)(self.config, self.seed)

    def batches(self, split: str) -> data.Batches:
        tokens = data.pretraining("prose", split)
        if isinstance(self.config, BERTConfig):
            return data.mlm_batches(tokens, self.T, self.batch, self.config.vocab, self.seed)
        return data.lm_batches(tokens, self.T, self.batch, self.seed)


RECIPES = {
    "base-bert": Recipe(BERTConfig(vocab=2048, positions=128, width=128, layers=4, heads=4), steps=4200, lr=2e-3),
    "base-gpt-small": Recipe(GPTConfig(vocab=2048, positions=128, width=64, layers=2, heads=2), steps=3000, lr=4e-3),
    "base-gpt": Recipe(GPTConfig(vocab=2048, positions=128, width=128, layers=4, heads=4), steps=3000, lr=2e-3),
    "base-gpt-large": Recipe(GPTConfig(vocab=2048, positions=128, width=160, layers=6, heads=5), steps=3000, lr=1.5e-3),
}


def pretrain(name: str, work: Path, assets: Path = ASSETS, steps: int | None = None) -> dict[str, float]:
    "Train one base model, going on from work/NAME if it was begun; write it and its card to assets/NAME.  Returns its held-out metrics."
    recipe = RECIPES[name]
    steps, model, train, valid = steps or recipe.steps, recipe.model(), recipe.batches("train"), recipe.batches("valid")
    judge = lambda: evaluate(model, valid.once())                                # noqa: E731
    start = time.time()
    history = fit(model, train, steps, AdamW(recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.decay), cosine(recipe.warmup, 0.1), out=work / name,
                  resume=True, save_every=100, seed=recipe.seed, evaluate=judge, every=max(steps // 10, 1))
    metrics = evaluate(model, recipe.batches("test").once())
    from .formats.huggingface import save
    save(model, assets / name, data.shipped_tokenizer(), dtype=np.float16)
    card(name, recipe, steps, history, metrics, assets / name, time.time() - start)
    return metrics


def references(recipe: Recipe) -> dict[str, float]:
    "The same held-out numbers from counting: unigrams and bigrams."
    train, valid, test = (data.pretraining("prose", s) for s in data.SPLITS)
    V = recipe.config.vocab
    if isinstance(recipe.config, BERTConfig):
        return {"unigram accuracy": baselines.unigram_mlm_accuracy(train, test, V), "bigram accuracy": baselines.bigram_mlm_accuracy(train, test, V)}
    return {"unigram perplexity": baselines.unigram_perplexity(train, test, V), "bigram perplexity": baselines.bigram_perplexity(train, valid, test, V)}


def card(name: str, recipe: Recipe, steps: int, history: History, metrics: dict[str, float], folder: Path, seconds: float) -> None:
    "The model card: README.md with the numbers, and loss.png."
    c, masked = recipe.config, isinstance(recipe.config, BERTConfig)
    tokens = len(data.pretraining("prose", "train"))
    size = sum(p.size for p in recipe.model().parameters())
    own = f"| this model | {100 * metrics['accuracy']:.1f} % of masked tokens, pseudo-perplexity {metrics['perplexity']:.1f} |" if masked else \
        f"| this model | perplexity {metrics['perplexity']:.1f}, accuracy {100 * metrics['accuracy']:.1f} % |"
    others = "\n".join(f"| {k} | {100 * v:.1f} % |" if "accuracy" in k else f"| {k} | {v:.1f} |" for k, v in references(recipe).items())
    (folder / "README.md").write_text(f"""# {name}

{'A BERT (masked language model)' if masked else 'A GPT-2 (causal language model)'}: {c.layers} layers, {c.width} wide, {c.heads} heads, {c.positions} positions, vocabulary {c.vocab:,}; {size:,} numbers, float16 on disk.

Trained from scratch by `make base` (`tinyft/pretrain.py`, seed {recipe.seed}) on the training part of the prose that ships with tinyft: the Python
language reference, docstrings and comments ({tokens:,} tokens; `assets/LICENSES.txt`).  {steps:,} steps of {recipe.T * recipe.batch:,} tokens
({steps * recipe.T * recipe.batch / tokens:.1f} epochs), AdamW, peak rate {recipe.lr:g}, weight decay {recipe.decay:g}, warm-up {recipe.warmup:.0%}, cosine decay to a tenth.

Held out (modules that occur nowhere in training):

| | |
|---|---|
{own}
{others}

![loss](loss.png)

It knows a little about English and Python's documentation, and nothing else.  Made to learn from, not to be used.
""", encoding="utf-8")
    (folder / "history.json").write_text(json.dumps({"losses": [round(v, 3) for v in smooth(history.losses)], "evaluations": [
        [s, round(m["loss"], 4)] for s, m in history.evaluations]}))
    draw(history, folder / "loss.png", name)


def smooth(values: list[float], points: int = 200) -> list[float]:
    "Means over equal stretches."
    return [float(np.mean(part)) for part in np.array_split(values, min(points, len(values)))]


def draw(history: History, path: Path, name: str) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(5, 3), dpi=100)
    curve = smooth(history.losses)
    ax.plot(np.linspace(0, len(history.losses), len(curve)), curve, label="training", color="#4477aa")
    ax.plot(*zip(*[(s, m["loss"]) for s, m in history.evaluations]), "o-", ms=3, label="held out", color="#cc6677")
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=name)
    ax.set_ylim(0, min(8, max(curve) * 1.05))
    ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="tinyft.pretrain", description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*", default=[], help=f"which of {', '.join(RECIPES)} (all)")
    p.add_argument("--work", type=Path, default=Path("work/base"), help="where training keeps its state")
    p.add_argument("--assets", type=Path, default=ASSETS, help="where the models go")
    p.add_argument("--steps", type=int, help="fewer or more steps than the recipe")
    args = p.parse_args(argv)
    if unknown := set(args.names) - RECIPES.keys():
        p.error(f"there is no base model {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    for name in args.names or RECIPES:
        metrics = pretrain(name, args.work, args.assets, args.steps)
        print(name, {k: round(v, 3) for k, v in metrics.items()}, f"e^loss {math.exp(metrics['loss']):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
