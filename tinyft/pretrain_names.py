"""The shipped encoder-decoder, base-seq2seq: a T5 that reads the summary of a docstring and writes a function's name.

    make base ARGS=base-seq2seq      or      python -m tinyft.pretrain base-seq2seq

    "Return the list of archive files."  ->  "get archive files"

The task has 3,423 training pairs, too few to learn from scratch how to copy a word. Therefore

    tokens      of lower-case text: nearly every word of a summary is one token, to be copied whole
    start       W_V = W_O = I in cross-attention, so that it copies    following Trockman, Kolter 2023, arXiv:2305.09828
    pairs       WordChoice, a simple model fitted on the real pairs, gives names to the sentences of the prose, and to
                copies of them and of the summaries with some words replaced. The network learns to do the same

A network that learns the real names instead writes the likeliest name, and not the words that promise the highest token
F1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from . import checks, data
from .data.name_baselines import simple_names
from .data.name_training import chosen_names, prose_sentences, replaced
from .data.names import Pairs
from .data.scores import exact_match, token_f1
from .data.word_choice import WordChoice
from .files import write_atomically
from .models import T5, T5Config
from .optim import AdamW, cosine_schedule
from .predict import predict
from .pretrain import ASSETS, smooth, write_figure
from .train import CrossEntropy, History, fit

NAME = "base-seq2seq"
SPECIAL = ("[PAD]", "[UNK]", "<|endoftext|>")
MAX_SOURCE = 40  # tokens of a summary and its end
MAX_TARGET = 16  # tokens of a name and its end


@dataclass(frozen=True)
class NameRecipe:
    """The model and its training: AdamW, warm-up and cosine decay.

    batch      pairs of a step
    sentences  copies of each sentence of the prose, see `labelled_texts`
    summaries  copies of each summary
    """

    config: T5Config = T5Config(
        vocab=6144, positions=MAX_SOURCE, width=128, layers=2, heads=4, head_width=32, hidden=384, dropout=0.05,
    )
    steps: int = 5500
    lr: float = 2e-3
    batch: int = 128
    warmup: float = 0.05
    decay: float = 0.01
    smoothing: float = 0.05
    sentences: int = 6
    summaries: int = 32
    seed: int = 0

    def model(self) -> T5:
        """The model before training: random weights, and cross-attention that copies what it attends to."""
        return start_copying(T5(self.config, self.seed))

    def batches(self, tokenizer: Tokenizer) -> data.Batches:
        """The batches, endless."""
        pairs = labelled_texts(self.sentences, self.summaries, self.seed)
        return name_batches(pairs, tokenizer, self.batch, self.seed)


def start_copying(model: T5) -> T5:
    """The same model, with identity matrices as W_V and W_O of each cross-attention.

    Cross-attention then adds the encoder's states to the decoder unchanged. By the residual connections such a state
    contains the embedding of its token, and the tied output layer turns that into a logit of the token. With random
    W_V and W_O, the model copies nothing in the first 1,000 steps.
    ValueError unless the heads together are as wide as the model.
    """
    config = model.config
    if config.heads * config.head_width != config.width:
        raise ValueError(f"start_copying wants heads that are together as wide as the model, {config.width}, "
                         f"got {config.heads} of {config.head_width}")
    for block in model.decoder:
        for linear in (block.cross_attn.v, block.cross_attn.o):
            linear.weight.copy_(np.eye(config.width, dtype=np.float32))
    return model


# ---------------------------------------------------------------------------------------------------- the pairs
def real_pairs(split: str) -> Pairs:
    """(summaries, names) of a split of the task *names*."""
    chosen = [pair for pair in data.name_pairs() if pair.split == split]
    return Pairs(tuple(pair.summary for pair in chosen), tuple(pair.name for pair in chosen))


def labelled_texts(sentences: int, summaries: int, seed: int = 0) -> list[tuple[str, str]]:
    """Training pairs (source, target): texts with the names that WordChoice gives them.

    sentences   copies of each sentence of the prose. The first is unchanged, the others have replaced words
    summaries   copies of each summary of the real pairs, all with replaced words. WordChoice was fitted on the real
                summaries and has seen their names
    A target holds the words of a name, separated by spaces.
    """
    pairs = real_pairs("train")
    prose = prose_sentences("train")
    texts = []
    for i in range(sentences):
        texts += replaced(prose, 0.3, seed, copy=i) if i else prose
    for i in range(summaries):
        texts += replaced(pairs.prompts, 0.4, seed, copy=sentences + i)
    return [(text, spaced(name)) for text, name in zip(*chosen_names(pairs, texts), strict=True)]


def spaced(name: str) -> str:
    """The target of a name: get_archive_files -> "get archive files"."""
    return " ".join(name.split("_"))


def joined(target: str) -> str:
    """The name that a target holds: "get archive files" -> get_archive_files."""
    return "_".join(target.split())


def name_batches(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, batch: int, seed: int = 0) -> data.Batches:
    """Endless batches of (source, target). A source of more than MAX_SOURCE tokens is cut; a pair whose target has more
    than MAX_TARGET is left out.
    """
    # "<" leaves room for the end of the target.
    fitting = [pair for pair in pairs if len(tokenizer.encode(pair[1], add_special_tokens=False).ids) < MAX_TARGET]
    start = tokenizer.token_to_id("[PAD]")  # T5 starts its decoder with the padding token
    return data.source_batches(fitting, tokenizer, batch, MAX_SOURCE, MAX_TARGET, seed, start=start)


def train_tokenizer(vocab: int) -> Tokenizer:
    """Byte-pair encoding of lower-case words, learned from the prose and the training pairs.

    Punctuation and digits are tokens of their own, and "_" is a space. Each word begins with a space, so that a word
    has the same tokens wherever it stands; the digits and letters after the first digit of a word do not: b64encode.
    """
    pairs = real_pairs("train")
    summaries = 3 * pairs.prompts  # several times, so that their words become whole tokens
    names = 5 * pairs.responses
    texts = [*prose_sentences("train"), *summaries, *names]
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("_", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Punctuation(),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        pre_tokenizers.Digits(individual_digits=True),
    ])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# ---------------------------------------------------------------------------------------------------- quality
def written_names(model: T5, tokenizer: Tokenizer, summaries: Sequence[str]) -> list[str]:
    """The names that a model writes for N summaries, by greedy decoding."""
    return [joined(text) for text in predict(model, tokenizer, list(summaries), max_new_tokens=MAX_TARGET)]


def name_scores(model: T5, tokenizer: Tokenizer, pairs: Pairs) -> dict[str, float]:
    """{"f1", "exact"}: the means of token F1 and of exact matches of the names that a model writes."""
    names = written_names(model, tokenizer, pairs.prompts)
    return {
        "f1": float(token_f1(pairs.responses, names).mean()),
        "exact": float(exact_match(pairs.responses, names).mean()),
    }


# ---------------------------------------------------------------------------------------------------- training
def pretrain_names(
    work: Path, assets: Path = ASSETS, steps: int | None = None, recipe: NameRecipe = NameRecipe(),
) -> dict[str, float]:
    """Train base-seq2seq, or continue from the checkpoint in work/base-seq2seq.

    Writes the model, its tokenizer, its card and its curves to assets/base-seq2seq. Returns its scores on the test
    split, f1 and exact. steps: replaces those of the recipe; ValueError if it is below 1.
    """
    from .formats.huggingface import save

    if steps is not None:
        recipe = replace(recipe, steps=checks.whole("pretrain: steps", steps, 1))
    tokenizer = train_tokenizer(recipe.config.vocab)
    recipe = replace(recipe, config=replace(recipe.config, vocab=tokenizer.get_vocab_size()))
    model = recipe.model()
    history = fit(
        model,
        recipe.batches(tokenizer),
        recipe.steps,
        AdamW(recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.decay),
        cosine_schedule(recipe.warmup, 0.02),
        loss=CrossEntropy(smoothing=recipe.smoothing),
        out=work / NAME,
        resume=True,
        seed=recipe.seed,
        evaluate=partial(name_scores, model, tokenizer, real_pairs("valid")),
        evaluate_every=max(recipe.steps // 10, 1),
    )
    scores = name_scores(model, tokenizer, real_pairs("test"))
    folder = assets / NAME
    save(model, folder, tokenizer, dtype=np.float16)
    write_atomically({
        folder / "README.md": card(recipe, model, scores).encode(),
        folder / "history.json": json.dumps(record(history)).encode(),
    })
    draw_f1(history, folder / "f1.png")
    return scores


CARD = """# {name}

An encoder-decoder (T5): {config.layers} + {config.layers} layers, {config.width} wide, {config.heads} heads,
vocabulary {config.vocab:,}; {parameters:,} parameters, float16 on disk.

It reads the summary of a docstring and writes the words of a function's name. Trained from scratch by `make base`
(`tinyft/pretrain_names.py`, seed {recipe.seed}) for {recipe.steps:,} steps of {recipe.batch} pairs, AdamW, peak
learning rate {recipe.lr:g}. The training pairs are sentences of the shipped prose, copies of them with some words
replaced, and such copies of {real:,} summaries, with the names that `WordChoice` gives them (`assets/LICENSES.txt`).

Held out (modules that occur nowhere in training; {count} pairs, greedy decoding):

| | token F1 | exact |
|---|---|---|
| this model | {f1:.3f} | {exact:.3f} |
{rows}

![token F1](f1.png)

*word choice* is the logistic regression that gave the names (`WordChoice`). The model knows the verbs of
Python's standard library, and how to copy. Made to learn from, not to be used.
"""


def card(recipe: NameRecipe, model: T5, scores: dict[str, float]) -> str:
    """The model card, Markdown: architecture, training, and the test scores beside those of the baselines.

    scores: of the trained model on the test split, as `name_scores` gives them.
    """
    train, test = real_pairs("train"), real_pairs("test")
    baselines = simple_names(train, real_pairs("valid"), test.prompts)
    baselines["word choice"] = WordChoice().fit(train).predict(test.prompts)
    rows = []
    for baseline, names in baselines.items():
        f1 = token_f1(test.responses, names).mean()
        rows.append(f"| {baseline} | {f1:.3f} | {exact_match(test.responses, names).mean():.3f} |")
    return CARD.format(
        name=NAME,
        config=recipe.config,
        recipe=recipe,
        parameters=sum(p.size for p in model.parameters()),
        real=len(real_pairs("train").prompts),
        count=len(test.prompts),
        rows="\n".join(rows),
        **scores,
    )


def record(history: History) -> dict[str, list]:
    """The content of history.json: the smoothed training losses, and [step, valid token F1] of each evaluation."""
    return {
        "losses": [round(value, 3) for value in smooth(history.losses)],
        "f1": [[step, round(metrics["f1"], 4)] for step, metrics in history.evaluations],
    }


def draw_f1(history: History, path: Path) -> None:
    """Save a figure of token F1 on the valid split against steps at `path`, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    valid = real_pairs("valid")
    copied = simple_names(real_pairs("train"), valid, valid.prompts)["copy words"]
    figure, axes = plt.subplots(figsize=(5, 3), dpi=100)
    steps = [step for step, _ in history.evaluations]
    axes.plot(steps, [metrics["f1"] for _, metrics in history.evaluations], "o-", ms=3, label=NAME, color="#4477aa")
    axes.axhline(token_f1(valid.responses, copied).mean(), color="#cc6677", ls=":", label="copy words")
    axes.set(xlabel="step", ylabel="token F1, valid", title=NAME, ylim=(0, None))
    axes.legend(frameon=False)
    figure.tight_layout()
    write_figure(figure, path)
    plt.close(figure)
