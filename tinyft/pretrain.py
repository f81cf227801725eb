"""The shipped base models, trained from scratch on the snapshot's prose:  `make base`, or  python -m tinyft.pretrain [NAME ...]

A BERT by masked language modelling and a GPT in three sizes by predicting the next token; fixed seeds, resumable at any moment, float16
on disk, each with a model card.  About two hours on two cores; masked-LM loss hardly moves for the first thousand steps, then falls.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import baselines, data
from .models import BERT, GPT, BERTConfig, GPTConfig
from .models.blocks import sinusoids
from .nn import Module
from .optim import AdamW, cosine_schedule
from .train import History, evaluate, fit

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Recipe:
    """What is trained and how: 4,096 tokens a step, AdamW at a peak rate with warm-up and cosine decay to a tenth.

    lengths: {T: share of the steps}, in order.  Short texts first, as BERT was trained (Devlin et al. 2018, A.2)."""
    config: GPTConfig | BERTConfig
    steps: int
    lr: float
    lengths: dict[int, float]
    warmup: float = 0.05
    decay: float = 0.1
    seed: int = 0
    tokens: int = 4096

    def model(self) -> Module:
        """From random weights.  At 128 wide and N(0, 0.02²) masked-LM loss stays for 1,500 steps where no context is used.  It leaves that
        plateau at 400 when scores are as spread as they are at 768 wide (std 0.05) and positions, sinusoids, stand out from the words."""
        model = (BERT if isinstance(self.config, BERTConfig) else GPT)(self.config, self.seed)
        if isinstance(model, BERT):
            model.pos.weight.copy_(0.05 * sinusoids(*model.pos.weight.shape))
        return model

    def batches(self, split: str, T: int | None = None) -> Stages:
        "Batches of each length in turn; of the longest only, with T."
        tokens, made = data.pretraining("prose", split), []
        for length in ([T] if T else self.lengths):
            size = self.tokens // length
            if isinstance(self.config, BERTConfig):
                made.append(data.mlm_batches(tokens, length, size, self.config.vocab, self.seed))
            else:
                made.append(data.lm_batches(tokens, length, size, self.seed))
        return Stages(made, [round(share * self.steps) for share in self.lengths.values()])


class Stages:
    "Batches from one source after another: so many from each, the last without end."

    def __init__(self, sources: list[data.Batches], counts: list[int]):
        self.sources, self.counts, self.given = sources, counts, 0

    def __iter__(self) -> Stages:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        left, self.given = self.given, self.given + 1
        for source, count in zip(self.sources[:-1], self.counts):
            if left < count:
                return next(source)
            left -= count
        return next(self.sources[-1])

    def state_dict(self) -> dict:
        return {"given": self.given, "sources": [s.state_dict() for s in self.sources]}

    def load_state_dict(self, state: dict) -> None:
        self.given = state["given"]
        for source, was in zip(self.sources, state["sources"]):
            source.load_state_dict(was)


GPT_LENGTHS = {128: 1.0}
RECIPES = {
    "base-bert": Recipe(BERTConfig(vocab=2048, positions=128, width=128, layers=4, heads=4, std=0.05), steps=3600, lr=2e-3, decay=0.01,
                        lengths={32: 0.25, 64: 0.25, 128: 0.5}),
    "base-gpt-small": Recipe(GPTConfig(vocab=2048, positions=128, width=64, layers=2, heads=2), steps=3000, lr=4e-3, lengths=GPT_LENGTHS),
    "base-gpt": Recipe(GPTConfig(vocab=2048, positions=128, width=128, layers=4, heads=4), steps=3000, lr=2e-3, lengths=GPT_LENGTHS),
    "base-gpt-large": Recipe(GPTConfig(vocab=2048, positions=128, width=160, layers=6, heads=5), steps=3000, lr=1.5e-3, lengths=GPT_LENGTHS),
}


def pretrain(name: str, work: Path, assets: Path = ASSETS, steps: int | None = None) -> dict[str, float]:
    "Train one base model, going on from work/NAME if it was begun; write it and its card to assets/NAME.  Returns its held-out metrics."
    recipe = RECIPES[name]
    steps, longest = steps or recipe.steps, list(recipe.lengths)[-1]
    model, train = recipe.model(), replace(recipe, steps=steps).batches("train")
    valid, test = (recipe.batches(split, longest).sources[0] for split in ("valid", "test"))
    judge = lambda: evaluate(model, valid.once())
    history = fit(model, train, steps, AdamW(recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.decay), cosine_schedule(recipe.warmup, 0.1), out=work / name,
                  resume=True, save_every=100, seed=recipe.seed, evaluate=judge, every=max(steps // 10, 1))
    metrics = evaluate(model, test.once())
    from .formats.huggingface import save
    save(model, assets / name, data.shipped_tokenizer(), dtype=np.float16)
    card(name, recipe, steps, history, metrics, assets / name)
    return metrics


def references(recipe: Recipe) -> dict[str, float]:
    "The same held-out numbers from counting: unigrams and bigrams."
    train, valid, test = (data.pretraining("prose", s) for s in data.SPLITS)
    V = recipe.config.vocab
    if isinstance(recipe.config, BERTConfig):
        return {"unigram accuracy": baselines.unigram_mlm_accuracy(train, test), "bigram accuracy": baselines.bigram_mlm_accuracy(train, test, V)}
    return {"unigram perplexity": baselines.unigram_perplexity(train, test, V),
            "bigram perplexity": baselines.bigram_perplexity(train, valid, test, V)}


def card(name: str, recipe: Recipe, steps: int, history: History, metrics: dict[str, float], folder: Path) -> None:
    "The model card: README.md with the numbers, and loss.png."
    c, masked = recipe.config, isinstance(recipe.config, BERTConfig)
    tokens = len(data.pretraining("prose", "train"))
    size = sum(p.size for p in recipe.model().parameters())
    own = f"| this model | {100 * metrics['accuracy']:.1f} % of masked tokens, pseudo-perplexity {metrics['perplexity']:.1f} |" if masked else \
        f"| this model | perplexity {metrics['perplexity']:.1f}, accuracy {100 * metrics['accuracy']:.1f} % |"
    others = "\n".join(f"| {k} | {100 * v:.1f} % |" if "accuracy" in k else f"| {k} | {v:.1f} |" for k, v in references(recipe).items())
    lengths = ", ".join(f"{share:.0%} in texts of {T}" for T, share in recipe.lengths.items())
    (folder / "README.md").write_text(f"""# {name}

{'A BERT (masked language model)' if masked else 'A GPT-2 (causal language model)'}: {c.layers} layers, {c.width} wide, {c.heads} heads,
{c.positions} positions, vocabulary {c.vocab:,}; {size:,} numbers, float16 on disk.

Trained from scratch by `make base` (`tinyft/pretrain.py`, seed {recipe.seed}) on the training part of the prose that ships with tinyft: the Python
language reference, docstrings and comments ({tokens:,} tokens; `assets/LICENSES.txt`).  {steps:,} steps of {recipe.tokens:,} tokens
({steps * recipe.tokens / tokens:.1f} epochs; {lengths}),
AdamW, peak rate {recipe.lr:g}, weight decay {recipe.decay:g}, warm-up {recipe.warmup:.0%}, cosine decay to a tenth.

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
