"""Rows of a source and a target: their files, the targets that an encoder-decoder writes, and the commands on them."""
from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from command_tools import refusal, result_of, succeed, write_rows
from helpers import host
from wrong import replaced

import tinyft as ft
from tinyft import array, data
from tinyft.commands import rows as rows_module
from tinyft.commands.calibration import calibration_batches
from tinyft.commands.rows import make_batches
from tinyft.commands.settings import make_rule
from tinyft.compress import Rule
from tinyft.compress.calibrate import recording
from tinyft.data import sources
from tinyft.data.files import Rows, read_rows
from tinyft.predict import positions_of_prompts, predict
from tinyft.tokens import encode_text

TOKENIZER = data.shipped_tokenizer()
END = TOKENIZER.token_to_id("<|endoftext|>")
PAIRS = [("Return the list of files.", "get files"), ("Close it.", "close"), ("Open the file of this name.", "open it"),
         ("Return one.", "one"), ("Return a copy of the whole list of all items.", "copy")]


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def small_model(kind: str = "marian", seed: int = 0, scale: float = 1) -> ft.Module:
    """A very small encoder-decoder. With a large scale its attention is sharp, and its targets differ."""
    sizes = {"vocab": 2048, "positions": 48, "width": 16, "layers": 1, "heads": 2}
    model = ft.Seq2Seq(ft.Seq2SeqConfig(**sizes), seed) if kind == "marian" else ft.T5(ft.T5Config(**sizes), seed)
    for name, p in model.named_parameters().items():
        if ".cross_attn." in name or ".mlp." in name:
            p.copy_(host(p) * scale)
    return model


# ── the columns of a file ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("row, kind", [
    ({"source": "a", "target": "b"}, "sources"),
    ({"source": "a", "target": "b", "id": 3}, "sources"),
    ({"text": "a", "source": "web"}, "text"),
    ({"text": "a", "source": "web", "target": "x"}, "text"),
    ({"prompt": "a", "response": "b", "source": "web"}, "pairs"),
    ({"text": "a", "label": "b", "source": "web", "target": "c"}, "labelled"),
])
def test_source_and_target_are_a_kind_of_their_own_where_nothing_else_is(row, kind, tmp_path):
    read = read_rows(write_rows(tmp_path / "a.jsonl", [row]))
    assert read.kind == kind and read.rows[0][0] == "a"


# ── writing targets ──────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["marian", "t5"])
def test_a_target_is_what_the_model_writes_for_its_source_alone(kind):
    model = small_model(kind, 3, 20)
    texts = [source for source, _ in PAIRS]
    together = predict(model, TOKENIZER, texts, max_new_tokens=6, batch_size=3)
    for text, written in zip(texts, together, strict=True):
        out = ft.generate(model, None, 6, source_ids=[[*ids_of(text), END]], end=END)[0, 1:].tolist()
        assert written == TOKENIZER.decode(out[:out.index(END)] if END in out else out)
        assert predict(model, TOKENIZER, [text], max_new_tokens=6) == [written]
    assert len(set(together)) > 1
    drawn = predict(model, TOKENIZER, texts, max_new_tokens=6, temperature=9.0, rng=np.random.default_rng(0))
    assert drawn != together
    with pytest.raises(ValueError, match="a source wants at least one token"):
        predict(model, TOKENIZER, [""])
    with pytest.raises(TypeError, match="names are the names of classes"):
        predict(model, TOKENIZER, texts, names=["a"])


def test_a_prompt_before_a_source_takes_positions():
    model = small_model()
    assert positions_of_prompts(model) == 0
    ft.attach(model, ft.PromptTuning(p=3))
    assert positions_of_prompts(model) == 3


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────
commands = pytest.mark.skipif(array.backend() == "cupy", reason="commands and files are of the host")


@pytest.fixture(scope="module")
def marian(tmp_path_factory) -> str:
    return str(ft.save(small_model(), tmp_path_factory.mktemp("models") / "marian", TOKENIZER))


@commands
def test_tune_eval_and_generate_take_sources(marian, capsys, tmp_path):
    """An encoder-decoder learns four targets by heart, and writes them. A source stands in no answer."""
    file = write_rows(tmp_path / "train.jsonl", [{"source": s, "target": t} for s, t in PAIRS[:4]])
    tuned = result_of(capsys, "tune", "--model", marian, "--data", file, "--test", file, "--method", "full", "--steps",
                      "120", "--lr", "1e-2", "--batch", "4", "--out", str(tmp_path / "run"))
    assert tuned["test"]["loss"] < 0.2 < tuned["before"]["loss"]
    options = ["--model", marian, "--adapter", str(tmp_path / "run")]
    result = result_of(capsys, "eval", *options, "--data", file, "--generate")
    assert result["exact_match"] == result["token_f1"] == 1
    assert result["loss"] == pytest.approx(tuned["test"]["loss"], rel=1e-5)
    assert succeed(capsys, "generate", *options, "--prompt", PAIRS[1][0]) == "close\n"
    texts = result_of(capsys, "generate", *options, "--file", file)["texts"]
    assert [text["text"] for text in texts] == [target for _, target in PAIRS[:4]]


@commands
@pytest.mark.parametrize("kind", ["marian", "t5"])
def test_generate_searches_the_targets_of_sources(kind, capsys, tmp_path):
    """Texts of different lengths in one batch: each gets the targets and scores that it gets alone."""
    model = small_model(kind, 3, 20)
    folder = str(ft.save(model, tmp_path / kind, TOKENIZER))
    model, _ = ft.load(folder)
    file = write_rows(tmp_path / "sources.jsonl", [{"source": s, "target": t} for s, t in PAIRS])
    options = ["generate", "--model", folder, "--max-new-tokens", "6", "--beams", "3", "--n-best", "3"]
    entries = result_of(capsys, *options, "--file", file)["texts"]
    for (source, _), entry in zip(PAIRS, entries, strict=True):
        (wanted,) = ft.beam_search(model, None, 6, beams=3, n_best=3, end=END, source_ids=[[*ids_of(source), END]])
        texts = [TOKENIZER.decode(h.tokens[:-1] if h.ended else h.tokens) for h in wanted]
        assert [best["text"] for best in entry["n_best"]] == texts and entry["text"] == texts[0]
        assert [best["score"] for best in entry["n_best"]] == pytest.approx([h.score for h in wanted], rel=1e-4)
    assert len({entry["text"] for entry in entries}) > 1
    covered = result_of(capsys, *options, "--file", file, "--coverage", "0.3")["texts"]
    for (source, _), entry in zip(PAIRS, covered, strict=True):
        (wanted,) = ft.beam_search(model, None, 6, beams=3, n_best=3, end=END, source_ids=[[*ids_of(source), END]],
                                   coverage=0.3)
        assert [best["score"] for best in entry["n_best"]] == pytest.approx([h.score for h in wanted], rel=1e-4)
    assert covered != entries
    printed = succeed(capsys, *options, "--prompt", PAIRS[0][0])
    assert printed == "".join(f"{best['score']:9.4f}  {best['text']}\n" for best in entries[0]["n_best"])


@pytest.mark.parametrize("max_len", [11, 12, 13, 14, 15])
def test_the_longest_rows_fit_into_the_positions(max_len):
    """A source and a target of max_len tokens, their ends included, are read whole by a model of max_len positions,
    although batches are padded to round lengths. A source with one token more is cut, and each is encoded once."""
    sizes = {"vocab": 2048, "positions": max_len, "width": 8, "layers": 1, "heads": 1}
    model = ft.Seq2Seq(ft.Seq2SeqConfig(**sizes))
    first = first_tokens(max_len - 1)
    encoded = []

    def count(name: str, tokenizer: Any, text: str) -> list[int]:
        encoded.append(text)
        return encode_text(name, tokenizer, text)
    for source, note in ((first, ""), (first_tokens(max_len), "1 of 2 sources are cut on the right")):
        rows = Rows("a.jsonl", "sources", ((source, first), ("a", "b")), (1, 2))
        encoded.clear()
        with replaced(sources, "encode_text", count), replaced(rows_module, "encode_text", count):
            made = make_batches(rows, model, TOKENIZER, 2, max_len, 0, chat=False, template=None)
        assert made.note == note and sorted(encoded) == sorted([source, first, "a", "b"])
        batch = next(made.batches.once())
        assert batch["source_mask"].sum(axis=1).max() == max_len and batch["mask"].sum(axis=1).max() == max_len + 1
        assert np.isfinite(ft.evaluate(model, made.batches)["loss"])
    rows = Rows("a.jsonl", "sources", (("a", first_tokens(max_len)), ("a", "b")), (1, 2))
    with pytest.raises(ValueError, match=f"a target of {max_len} tokens and the end do not fit into {max_len}"):
        make_batches(rows, model, TOKENIZER, 2, max_len, 0, chat=False, template=None)


def first_tokens(n: int) -> str:
    """A text of n tokens."""
    text = TOKENIZER.decode(ids_of("Return a copy of the whole list of all items in this list of names")[:n])
    assert len(ids_of(text)) == n
    return text


@commands
def test_rows_that_an_encoder_decoder_cannot_read_are_refused(marian, capsys, tmp_path):
    text = write_rows(tmp_path / "text.jsonl", [{"text": "a b c"}])
    sentence = refusal(capsys, "eval", "--model", marian, "--data", text)
    assert f"the encoder-decoder Seq2Seq wants rows of source and target, got {text} with rows of text" in sentence
    sentence = refusal(capsys, "generate", "--model", marian, "--prompt", "a", "--chat")
    assert "the encoder-decoder Seq2Seq wants sources, got turns of a chat" in sentence
    sentence = refusal(capsys, "generate", "--model", marian, "--prompt", "")
    assert "a source wants at least one token, got an empty text" in sentence
    assert "wants a model that reads one text" in refusal(capsys, "chat", "--model", marian)
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"source": "a", "target": "b"}])
    sentence = refusal(capsys, "eval", "--model", "base-gpt-small", "--data", pairs)
    assert "a causal language model reads prompt and response" in sentence


# ── compression ──────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclasses.dataclass(frozen=True)
class Seen(Rule):
    """A rule that keeps its Hessians and changes little."""
    needs_hessian: ClassVar[bool] = True
    hessians: list = dataclasses.field(default_factory=list)

    def __call__(self, W: np.ndarray, H: np.ndarray | None = None) -> ft.nn.Packed:
        self.hessians.append(H)
        return ft.RTN(bits=8)(W)


def hessian(model: ft.Module, batches: list, target: str) -> np.ndarray:
    """The Hessian with which the map is compressed. The model stays as it is."""
    rule = Seen()
    ft.compress(copy.deepcopy(model), rule, batches, targets=target)
    return rule.hessians[0]


def mean_square(rows: list[np.ndarray]) -> np.ndarray:
    """2/n Σ x xᵀ"""
    x = np.concatenate(rows).astype(np.float64)
    return 2 * x.T @ x / len(x)


def check_calibration(model: ft.Module, batches: list) -> None:
    """Keys of cross-attention read the encoder's output of each real source, queries a text up to its last token; and
    the feed-forward reads what the two give together.

    The expected inputs come from one pair at a time, without padding."""
    block = model.decoder[0]
    maps = {"decoder.0.cross_attn.q": block.cross_attn.q, "decoder.0.mlp.up": block.mlp.up}
    rows: dict[str, list[np.ndarray]] = {path: [] for path in ("decoder.0.cross_attn.k", *maps)}
    for source, target in PAIRS:
        encoded = model.encode([[*ids_of(source), END]])
        rows["decoder.0.cross_attn.k"].append(host(encoded.last_hidden_state)[0])
        with recording(maps, lambda path, x, ctx: rows[path].append(host(x)[0])):
            model([[model.config.start, *ids_of(target)]], source=encoded)
    for path, inputs in rows.items():
        want = mean_square(inputs)
        assert np.abs(hessian(model, batches, path) - want).max() < 1e-4 * np.abs(want).max()


def calibrated(model: ft.Module, pairs: list, folder: Path, **options: int) -> list:
    """The batches of the command for a file of these pairs."""
    file = write_rows(folder / "pairs.jsonl", [{"source": s, "target": t} for s, t in pairs])
    return calibration_batches(model, TOKENIZER, file, **{"count": 9, "length": 48, "seed": 0, **options})


@commands
@pytest.mark.parametrize("kind", ["marian", "t5"])
def test_the_calibration_of_an_encoder_decoder_reads_sources_and_targets(kind, tmp_path):
    model = small_model(kind, 3, 5)
    batches = calibrated(model, PAIRS, tmp_path)
    assert [len(batch["ids"]) for batch in batches] == [4, 1]
    check_calibration(model, batches)
    few = calibrated(model, PAIRS, tmp_path, count=2, seed=1)
    assert sum(len(batch["ids"]) for batch in few) == 2
    shipped = calibration_batches(model, TOKENIZER, None, 6, 48, 0)
    assert sum(len(batch["source_ids"]) for batch in shipped) == 6


WRONG_CALIBRATIONS = {
    "sources are left out": lambda batch: {**batch, "source_ids": batch["source_ids"][:, :1] * 0 + END,
                                           "source_mask": batch["source_mask"][:, :1]},
    "the target is its own source": lambda batch: {**batch, "source_ids": batch["ids"], "source_mask": batch["mask"]},
    "padding of a source counts": lambda batch: {**batch, "source_mask": batch["source_mask"] | True},
    "a source belongs to the next target": lambda batch: {**batch, "source_ids": batch["source_ids"][::-1],
                                                          "source_mask": batch["source_mask"][::-1]},
    "what follows a target counts": lambda batch: {**batch, "mask": batch["mask"] | True},
    "the last token of a target is not read": lambda batch: {**batch, "mask": batch["mask"][:, 1:],
                                                             "ids": batch["ids"][:, :-1],
                                                             "labels": batch["ids"][:, :-1]},
}


@commands
@pytest.mark.parametrize("belief", WRONG_CALIBRATIONS)
def test_a_wrong_calibration_is_caught(belief, tmp_path):
    model = small_model("marian", 3, 5)
    batches = calibrated(model, PAIRS, tmp_path)
    with pytest.raises(AssertionError):
        check_calibration(model, [WRONG_CALIBRATIONS[belief](batch) for batch in batches])


@commands
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_compress_calibrates_an_encoder_decoder_with_pairs(method, marian, capsys, tmp_path):
    """The command's weights are those of the library on the same pairs, and its result writes targets."""
    file = write_rows(tmp_path / "pairs.jsonl", [{"source": s, "target": t} for s, t in PAIRS])
    out = str(tmp_path / "packed")
    printed = succeed(capsys, "compress", "--model", marian, "--method", method, "--data", file, "--group", "16",
                      "--out", out)
    source = 1 + max(len(ids_of(source)) for source, _ in PAIRS)                 # with the end
    target = 1 + max(len(ids_of(target)) for _, target in PAIRS)                 # with the start
    assert f"5 sources of up to {source} tokens with targets of up to {target} of {file}" in printed
    model, tokenizer = ft.load(marian)
    rule = make_rule(method, ["group=16"])
    ft.compress(model, rule, calibration_batches(model, tokenizer, file, 32, 48, 0))
    theirs = dict(ft.load(out)[0].named_modules())
    packed = {path: m for path, m in model.named_modules() if isinstance(m, ft.nn.Packed)}
    assert any(".cross_attn.k" in path for path in packed)
    for path, weight in packed.items():
        np.testing.assert_array_equal(host(weight.dequantize()), host(theirs[path].dequantize()))
    succeed(capsys, "generate", "--model", out, "--prompt", PAIRS[0][0], "--max-new-tokens", "3")


@commands
def test_compress_refuses_rows_without_sources(marian, capsys, tmp_path):
    options = ["compress", "--model", marian, "--out", str(tmp_path / "out")]
    text = write_rows(tmp_path / "text.jsonl", [{"text": "a b c"}])
    sentence = refusal(capsys, *options, "--data", text)
    assert f"the encoder-decoder Seq2Seq wants rows of source and target, got {text} with rows of text" in sentence
    long = write_rows(tmp_path / "long.jsonl", [{"source": "a", "target": "word " * 60}])
    assert f"line 1 of {long}: a target of" in refusal(capsys, *options, "--data", long)
