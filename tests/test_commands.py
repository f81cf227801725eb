"""`tinyft eval | generate | chat | merge | embed | convert`, through processes and in this one."""
from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from command_tools import (
    chats,
    files_below,
    labelled,
    pairs,
    refusal,
    result_of,
    small_model,
    start,
    succeed,
    write_rows,
)
from helpers import not_on_strict, real_asset

import tinyft as ft
from tinyft import array, cli
from tinyft.chat import chat_prompt
from tinyft.data.files import read_rows

pytestmark = pytest.mark.skipif(array.backend() == "cupy", reason="commands and files are of the host")

FEW = pairs(4)
OUT_OF_ORDER = [FEW[2], FEW[0], {"prompt": FEW[1]["prompt"], "response": " wrong"}, FEW[3]]
IDS = np.arange(24).reshape(2, 12) * 7


@pytest.fixture(scope="module")
def gpt(tmp_path_factory) -> str:
    return small_model(tmp_path_factory.mktemp("models"), positions=256, width=32)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return small_model(tmp_path_factory.mktemp("models"), "bert")


def tuned(folder: Path, model: str, rows: list, *options: str) -> str:
    """The folder of a run of `tinyft tune` on these rows."""
    file = write_rows(folder / "train.jsonl", rows)
    out = str(folder / "run")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["tune", "--model", model, "--data", file, "--out", out, "--seed", "3", *options]) == 0
    return out


@pytest.fixture(scope="module")
def lora_run(gpt, tmp_path_factory) -> str:
    return tuned(tmp_path_factory.mktemp("lora"), gpt, pairs(16), "--steps", "20", "--lr", "3e-2")


@pytest.fixture(scope="module")
def learned_run(gpt, tmp_path_factory) -> str:
    """A run that knows its four responses by heart."""
    return tuned(tmp_path_factory.mktemp("learned"), gpt, FEW, "--method", "full", "--steps", "150", "--lr", "1e-2",
                 "--batch", "4", "--schedule", "linear")


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory) -> str:
    """A run of the shipped base that knows three chats by heart."""
    folder = tmp_path_factory.mktemp("chats")
    return tuned(folder, "base-gpt", chats(3), "--method", "full", "--steps", "30", "--lr", "1e-3", "--batch", "3")


@pytest.fixture(scope="module")
def label_run(bert, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("labels")
    return tuned(folder, bert, labelled(32), "--method", "full", "--steps", "60", "--lr", "1e-2")


def with_adapter(model: str, run: str) -> ft.Module:
    """The model with the adapter of a run, loaded with the library's functions."""
    loaded, _ = ft.load(model)
    ft.load_adapter(loaded, Path(run) / "adapter")
    return loaded


def outputs(model: ft.Module) -> np.ndarray:
    return array.asnumpy(model(IDS).data)


# ── eval ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_eval_measures_the_loss_of_the_responses(gpt, lora_run, capsys, tmp_path):
    file = write_rows(tmp_path / "test.jsonl", pairs(10))
    base = result_of(capsys, "eval", "--model", gpt, "--data", file)
    adapted = result_of(capsys, "eval", "--model", gpt, "--adapter", lora_run, "--data", file)
    assert adapted == result_of(capsys, "eval", "--model", gpt, "--adapter", f"{lora_run}/adapter", "--data", file)
    model, tokenizer = ft.load(gpt)
    assert base["loss"] == pytest.approx(mean_loss(model, tokenizer, file), rel=1e-5)
    assert adapted["loss"] == pytest.approx(mean_loss(with_adapter(gpt, lora_run), tokenizer, file), rel=1e-5)
    assert adapted["loss"] < base["loss"] - 0.1 and base["rows"] == 10
    assert base["perplexity"] == pytest.approx(np.exp(base["loss"]))
    assert "perplexity" in succeed(capsys, "eval", "--model", gpt, "--data", file)


def mean_loss(model: ft.Module, tokenizer, file: str) -> float:
    """The mean of −log p of the tokens of the responses and of the end of text after them, row by row."""
    losses = []
    end = tokenizer.token_to_id("<|endoftext|>")
    for prompt, response in read_rows(file).rows:
        before = tokenizer.encode(prompt).ids
        ids = [*before, *tokenizer.encode(response).ids, end]
        logits = array.asnumpy(model(np.array([ids])).data)[0].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-log_p[t - 1, ids[t]] for t in range(len(before), len(ids))]
    return float(np.mean(losses))


def test_exact_matches_are_counted(gpt, learned_run, capsys, tmp_path):
    """The model knows four responses; one of the rows wants another one. The untuned base knows none."""
    file = write_rows(tmp_path / "test.jsonl", OUT_OF_ORDER)
    result = result_of(capsys, "eval", "--model", gpt, "--adapter", learned_run, "--data", file, "--generate")
    assert result["exact_match"] == 0.75
    written = [sample["written"] for sample in result["samples"]]
    assert written == [" 3", " 1", " 2", " 4"]
    base = result_of(capsys, "eval", "--model", gpt, "--data", file, "--generate")
    assert base["exact_match"] == 0
    assert "exact_match" in succeed(capsys, "eval", "--model", gpt, "--data", file, "--generate")


def test_the_last_turn_of_a_chat_is_generated(chat_run, capsys, tmp_path):
    """Training and generation see the same tokens: a model that has learned its chats by heart gives every answer."""
    rows = chats(3)
    file = write_rows(tmp_path / "test.jsonl", rows)
    options = ["--model", "base-gpt", "--adapter", chat_run]
    result = result_of(capsys, "eval", *options, "--data", file, "--generate")
    assert result["exact_match"] == 1 and result["accuracy"] > 0.95
    assert [sample["written"] for sample in result["samples"]] == ["Closed 0.", "Closed 1.", "Closed 2."]
    assert result["samples"][0]["prompt"] == chat_prompt(rows[0]["messages"][:-1])
    (text,) = result_of(capsys, "generate", *options, "--file", file)["texts"][1:2]
    assert text["text"] == "Closed 1."


def test_labels_are_scored_by_name(bert, label_run, capsys, tmp_path):
    rows = labelled(12)
    file = write_rows(tmp_path / "test.jsonl", rows)
    result = result_of(capsys, "eval", "--model", bert, "--adapter", label_run, "--data", file)
    assert result["accuracy"] == 1 and result["macro_f1"] == 1
    swapped = [{**row, "label": "bad" if row["label"] == "good" else "good"} for row in rows]
    file = write_rows(tmp_path / "swapped.jsonl", swapped)
    assert result_of(capsys, "eval", "--model", bert, "--adapter", label_run, "--data", file)["accuracy"] == 0


def test_eval_refuses_what_it_cannot_measure(gpt, bert, lora_run, label_run, capsys, tmp_path):
    labels = write_rows(tmp_path / "labels.jsonl", [*labelled(3), {"text": "a", "label": "ugly"}])
    rows = write_rows(tmp_path / "rows.jsonl", pairs(2))
    assert "has labels, and this model has no classifier" in refusal(capsys, "eval", "--model", bert, "--data", labels)
    sentence = refusal(capsys, "eval", "--model", bert, "--adapter", label_run, "--data", labels)
    assert f"line 4 of {labels}: the model's head has no class 'ugly'; its 2 classes are bad, good" in sentence
    sentence = refusal(capsys, "eval", "--model", "base-gpt", "--adapter", lora_run, "--data", rows)
    assert "this adapter was trained on" in sentence
    sentence = refusal(capsys, "eval", "--model", gpt, "--adapter", str(tmp_path), "--data", rows)
    assert f"{tmp_path} has no adapter.json and no adapter_config.json" in sentence
    sentence = refusal(capsys, "eval", "--model", gpt, "--data", labels, "--generate", status=2)
    assert "--generate wants rows of prompt and response" in sentence
    long = write_rows(tmp_path / "long.jsonl", [*pairs(2), {"prompt": "word " * 300, "response": "a"}])
    sentence = refusal(capsys, "eval", "--model", gpt, "--data", long, "--generate")
    assert f"line 3 of {long}: the prompt has" in sentence


# ── generate ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_generate_writes_the_text_of_predict(gpt, lora_run, capsys, tmp_path):
    prompt = FEW[0]["prompt"]
    options = ["generate", "--model", gpt, "--adapter", lora_run, "--max-new-tokens", "12"]
    model, tokenizer = with_adapter(gpt, lora_run), ft.load(gpt)[1]
    (wanted,) = ft.predict(model, tokenizer, [prompt], max_new_tokens=12)
    assert result_of(capsys, *options, "--prompt", prompt)["texts"] == [{"prompt": prompt, "text": wanted}]
    assert succeed(capsys, *options, "--prompt", prompt) == f"{prompt}{wanted}\n"
    (tmp_path / "prompts.txt").write_text("".join(f"{row['prompt']}\n" for row in FEW))
    several = result_of(capsys, *options, "--file", str(tmp_path / "prompts.txt"))["texts"]
    assert several[0]["text"] == wanted and len(several) == 4
    draws = [*options, "--prompt", prompt, "--temperature", "1.5", "--top-k", "50", "--top-p", "0.9"]
    drawn = [succeed(capsys, *draws, "--seed", seed) for seed in ("0", "0", "1")]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_writes_the_texts_of_beam_search(gpt, lora_run, capsys, tmp_path):
    """The best texts of `beam_search`, with their scores. Another length penalty gives other scores."""
    model, tokenizer = with_adapter(gpt, lora_run), ft.load(gpt)[1]
    end = tokenizer.token_to_id("<|endoftext|>")
    prompts = [row["prompt"] for row in FEW]
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    options = ["generate", "--model", gpt, "--adapter", lora_run, "--max-new-tokens", "12"]
    search = [*options, "--file", str(tmp_path / "prompts.txt"), "--beams", "3"]
    scores = {}
    for alpha in (0.6, 4.0):
        searched = [*search, "--length-penalty", str(alpha)] if alpha != 0.6 else search
        several = result_of(capsys, *searched, "--n-best", "2")["texts"]
        for prompt, entry in zip(prompts, several, strict=True):
            (wanted,) = ft.beam_search(model, [tokenizer.encode(prompt).ids], 12, beams=3, n_best=2, end=end,
                                       lp=ft.GNMTPenalty(alpha))
            texts = [tokenizer.decode(h.tokens[:-1] if h.ended else h.tokens) for h in wanted]
            assert entry["prompt"] == prompt and entry["text"] == texts[0]
            assert [best["text"] for best in entry["n_best"]] == texts and len(texts) == 2
            got = [best["score"] for best in entry["n_best"]]
            assert got == pytest.approx([h.score for h in wanted], rel=1e-4)
        scores[alpha] = got
    assert scores[0.6] != scores[4.0]
    best = several[0]["n_best"]
    lines = succeed(capsys, *options, "--prompt", prompts[0], "--beams", "3", "--length-penalty", "4", "--n-best", "2")
    assert lines == "".join(f"{one['score']:9.4f}  {prompts[0]}{one['text']}\n" for one in best)
    one = succeed(capsys, *options, "--prompt", prompts[0], "--beams", "3", "--length-penalty", "4")
    assert one == f"{prompts[0]}{best[0]['text']}\n"


def test_one_beam_without_a_penalty_writes_the_greedy_text(gpt, lora_run, capsys):
    options = ["generate", "--model", gpt, "--adapter", lora_run, "--prompt", FEW[1]["prompt"]]
    assert succeed(capsys, *options) == succeed(capsys, *options, "--beams", "1", "--length-penalty", "0")


def test_beam_search_ends_a_turn_of_a_chat_at_its_mark(chat_run, capsys, tmp_path, monkeypatch):
    """The mark of <|im_end|> is no token of the shipped tokenizer: what follows it is cut. Where it is one, it ends."""
    options = ["--model", "base-gpt", "--adapter", chat_run, "--max-new-tokens", "15", "--chat", "--prompt", "Open 1"]
    assert succeed(capsys, "generate", *options, "--beams", "2") == "Done.\n"
    ends = []

    def fake(model, tokenizer, texts, **options):
        ends.append(options.get("end"))
        return [[("Done.", -1.0)]]
    monkeypatch.setattr("tinyft.commands.generating.search_texts", fake)
    for known in (None, 7):
        monkeypatch.setattr("tokenizers.Tokenizer.token_to_id", lambda self, token, known=known: known)
        succeed(capsys, "generate", *options, "--beams", "2")
    assert ends == [None, 7]


BROKEN = [("one\ntwo\r\n", "one\\ntwo\\r\\n"), ("a\u2028b\x0bc\x85", "a\\u2028b\\x0bc\\x85"),
          ("tab\tand é,\u3000字", "tab\tand é,\u3000字")]


def check_n_best(lines: str, prompt: str) -> None:
    """One line for each of the texts of BROKEN, after their scores."""
    wanted = [f"{-i:9.4f}  {prompt}{shown}" for i, (_, shown) in enumerate(BROKEN)]
    assert lines == "".join(f"{line}\n" for line in wanted) and lines.splitlines() == wanted


def test_each_of_the_n_best_is_one_line(gpt, capsys, monkeypatch):
    """Line breaks are escapes, those of the prompt as well. The best text alone, and JSON, are as the model wrote."""
    texts = [text for text, _ in BROKEN]

    def fake(model, tokenizer, prompts, **options):
        assert len(prompts) == 1
        return [[(text, -i) for i, text in enumerate(texts[:options["n_best"]])]]
    monkeypatch.setattr("tinyft.commands.generating.search_texts", fake)
    options = ["generate", "--model", gpt, "--prompt", "a\nb", "--beams", "3"]
    check_n_best(succeed(capsys, *options, "--n-best", "3"), "a\\nb")
    assert succeed(capsys, *options) == f"a\nb{texts[0]}\n"
    entry = result_of(capsys, *options, "--n-best", "3")["texts"][0]
    assert entry["prompt"] == "a\nb" and [best["text"] for best in entry["n_best"]] == texts


@pytest.mark.parametrize("wrong", [
    str, lambda text: text.replace("\n", "\\n"), lambda text: " ".join(text.split()), ascii,
    lambda text: text.encode("unicode_escape").decode(),
])
def test_texts_over_several_lines_are_noticed(wrong):
    lines = "".join(f"{-i:9.4f}  {wrong(text)}\n" for i, (text, _) in enumerate(BROKEN))
    with pytest.raises(AssertionError):
        check_n_best(lines, "")


def test_generate_in_a_process_of_its_own(tmp_path):
    run = start(tmp_path, "generate", "--model", "base-gpt", "--prompt", "Return the", "--max-new-tokens", "5")
    out, error = run.communicate(timeout=60)
    assert run.returncode == 0 and out.startswith("Return the ") and error == ""


def test_generate_refuses_what_it_cannot_continue(gpt, bert, capsys, tmp_path):
    assert "wants either --prompt or --file" in refusal(capsys, "generate", "--model", gpt, status=2)
    sentence = refusal(capsys, "generate", "--model", gpt, "--prompt", "a", "--top-k", "3", status=2)
    assert "--top-k and --top-p want --temperature > 0" in sentence
    sentence = refusal(capsys, "generate", "--model", gpt, "--prompt", "a", "--system", "b", status=2)
    assert "--system wants --chat" in sentence
    prompt = ["generate", "--model", gpt, "--prompt", "a"]
    for option in ("--n-best", "--length-penalty", "--coverage"):
        assert f"{option} wants --beams: it is an option" in refusal(capsys, *prompt, option, "2", status=2)
    assert "coverage wants an encoder-decoder" in refusal(capsys, *prompt, "--beams", "2", "--coverage", "0.2")
    search = [*prompt, "--beams", "2"]
    sentence = refusal(capsys, *search, "--temperature", "0.5", status=2)
    assert "--beams wants --temperature 0: beam search draws no tokens" in sentence
    for option in ("--beams", "--n-best"):
        assert f"{option}: wants a whole number >= 1, got '0'" in refusal(capsys, *search, option, "0", status=2)
    assert "--length-penalty: wants a finite number, got 'nan'" in refusal(
        capsys, *search, "--length-penalty", "nan", status=2)
    sentence = refusal(capsys, *search, "--length-penalty", "400")
    assert "the length penalty of 40 tokens wants a finite number > 0, got inf" in sentence
    assert "wants a causal language model, got a BERT" in refusal(capsys, "generate", "--model", bert, "--prompt", "a")
    assert "at most 216 tokens" in refusal(capsys, "generate", "--model", gpt, "--prompt", "word " * 300)


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def talk(monkeypatch, capsys, lines: str, *arguments: str) -> list[str]:
    """The answers to turns that come through a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return succeed(capsys, "chat", *arguments).splitlines()


def test_a_chat_answers_each_turn(chat_run, monkeypatch, capsys):
    options = ["--model", "base-gpt", "--adapter", chat_run, "--max-new-tokens", "15"]
    assert talk(monkeypatch, capsys, "Open 1\n\nClose 1\n/quit\nOpen 2\n", *options) == ["Done.", "Closed 1."]
    assert talk(monkeypatch, capsys, "Open 2\nClose 2", *options) == ["Done.", "Closed 2."]


def test_a_chat_forgets_its_oldest_turns_when_the_context_is_full(gpt, monkeypatch, capsys):
    """The prompts that the model gets: the system message stays, and what fits of the turns."""
    prompts = []

    def fake(model, tokenizer, texts, **options):
        prompts.extend(texts)
        return ["Yes.<|im_end|> and more"]
    monkeypatch.setattr("tinyft.commands.generating.predict", fake)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"Question {i} of many\n" for i in range(5))))
    assert cli.main(["chat", "--model", gpt, "--system", "Be short.", "--max-new-tokens", "60"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "Yes.\n" * 5 and "the oldest turn is forgotten" in printed.err
    assert all("Be short." in prompt for prompt in prompts)
    tokenizer = ft.load(gpt)[1]
    assert max(len(tokenizer.encode(prompt).ids) for prompt in prompts) <= 256 - 60
    assert "Question 0" in prompts[1] and "Question 0" not in prompts[-1] and "Question 4" in prompts[-1]
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 300))
    assert "this turn has" in refusal(capsys, "chat", "--model", gpt, "--max-new-tokens", "60")


def test_a_chat_through_a_pipe_ends_with_its_input(gpt, tmp_path):
    run = start(tmp_path, "chat", "--model", gpt, "--max-new-tokens", "3")
    out, error = run.communicate("Hello\n", timeout=60)
    assert run.returncode == 0 and error == "" and out.endswith("\n")


@not_on_strict("a real model takes long there; test_gguf.py reads and runs small ones")
@pytest.mark.parametrize("packed", [[], ["--packed"]], ids=["dense", "packed"])
def test_a_real_model_answers(packed, capsys):
    model = str(real_asset("SmolLM2-135M-Instruct.Q4_1.gguf"))
    question = ["--prompt", "What is the capital of France?", "--chat", "--max-new-tokens", "12"]
    assert succeed(capsys, "generate", "--model", model, *question, *packed) == "The capital of France is Paris.\n"


# ── merge and convert ────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_merged_model_gives_the_outputs_of_base_and_adapter(gpt, lora_run, capsys, tmp_path):
    out = tmp_path / "merged"
    result = result_of(capsys, "merge", "--model", gpt, "--adapter", lora_run, "--out", str(out))
    merged, tokenizer = ft.load(out)
    wanted = outputs(with_adapter(gpt, lora_run))
    base = outputs(ft.load(gpt)[0])
    assert np.allclose(outputs(merged), wanted, rtol=1e-4, atol=1e-5) and np.abs(base - wanted).max() > 1e-2
    assert result["parameters"] == sum(p.size for p in merged.parameters()) and tokenizer is not None


def test_a_merged_classifier_keeps_the_names_of_its_classes(bert, label_run, capsys, tmp_path):
    out = str(tmp_path / "merged")
    succeed(capsys, "merge", "--model", bert, "--adapter", label_run, "--out", out)
    model, tokenizer = ft.load(out)
    texts = [row["text"] for row in labelled(6)]
    assert ft.predict(model, tokenizer, texts).labels == ["bad", "good"] * 3
    file = write_rows(tmp_path / "test.jsonl", labelled(6))
    assert result_of(capsys, "eval", "--model", out, "--data", file)["accuracy"] == 1


def test_an_adapter_that_cannot_be_merged_leaves_nothing(gpt, capsys, tmp_path):
    run = tuned(tmp_path, gpt, pairs(4), "--method", "houlsby", "--set", "m=2", "--steps", "2")
    sentence = refusal(capsys, "merge", "--model", gpt, "--adapter", run, "--out", str(tmp_path / "a" / "merged"))
    assert f"{run} cannot be merged: " in sentence
    assert not (tmp_path / "a").exists()


def test_convert_writes_a_directory_in_another_dtype(gpt, capsys, tmp_path):
    out = tmp_path / "half"
    result = result_of(capsys, "convert", "--model", gpt, "--out", str(out), "--dtype", "float16")
    ours, theirs = ft.load(gpt)[0], ft.load(out)[0]
    assert np.allclose(outputs(ours), outputs(theirs), atol=1e-2)
    sizes = [Path(folder, "model.safetensors").stat().st_size for folder in (gpt, out)]
    assert sizes[1] < 0.6 * sizes[0] and result["dtype"] == "float16"
    before = files_below(tmp_path)
    assert "--out wants a new or an empty folder" in refusal(capsys, "convert", "--model", gpt, "--out", str(out))
    assert "did you mean" in refusal(capsys, "convert", "--model", gpt + "x", "--out", str(tmp_path / "new"))
    assert "did you mean 'float16'?" in refusal(capsys, "convert", "--model", gpt, "--out", "x", "--dtype", "flaot16",
                                                status=2)
    assert files_below(tmp_path) == before


def test_an_adapter_is_written_for_peft_and_read_again(gpt, lora_run, capsys, tmp_path):
    """eval takes the folder of PEFT as it takes our own, and the losses agree. A bottleneck goes to AdapterHub."""
    out = str(tmp_path / "peft")
    result = result_of(capsys, "convert", "--model", gpt, "--adapter", lora_run, "--out", out)
    assert (result["library"], result["method"]) == ("PEFT", "LoRA")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    file = write_rows(tmp_path / "test.jsonl", pairs(6))
    losses = []
    for adapter in (lora_run, out):
        losses.append(result_of(capsys, "eval", "--model", gpt, "--adapter", adapter, "--data", file)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    options = ["--method", "houlsby", "--set", "m=2", "--set", "norms=no", "--steps", "2"]
    run = tuned(tmp_path, gpt, pairs(4), *options)
    hub = str(tmp_path / "hub")
    assert "AdapterHub" in succeed(capsys, "convert", "--model", gpt, "--adapter", run, "--out", hub)
    losses = []
    for adapter in (run, hub):
        losses.append(result_of(capsys, "eval", "--model", gpt, "--adapter", adapter, "--data", file)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("base", ["bert", "gpt"])
def test_a_classifier_goes_to_peft_with_the_names_of_its_classes(base, gpt, bert, capsys, tmp_path):
    model = gpt if base == "gpt" else bert
    run = tuned(tmp_path, model, labelled(16), "--steps", "30", "--lr", "3e-2", "--set", "r=4")
    out = str(tmp_path / "peft")
    succeed(capsys, "convert", "--model", model, "--adapter", run, "--out", out)
    file = write_rows(tmp_path / "test.jsonl", labelled(8))
    results = []
    for adapter in (run, out):
        results.append(result_of(capsys, "eval", "--model", model, "--adapter", adapter, "--data", file))
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5) and results[0]["rows"] == 8
    assert json.loads((tmp_path / "peft" / "labels.json").read_text()) == {"labels": ["bad", "good"]}


# ── embed ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_embed_writes_the_vectors_of_the_library(bert, capsys, tmp_path):
    texts = ["A file.", "A folder of files.", "A socket."]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    options = ["embed", "--model", bert, "--texts", str(tmp_path / "texts.txt")]
    wanted = ft.embed(*ft.load(bert), texts)
    result = result_of(capsys, *options, "--out", str(tmp_path / "a.npy"))
    assert np.array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), wanted)
    assert (result["texts"], result["width"]) == wanted.shape
    succeed(capsys, *options, "--out", str(tmp_path / "a.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == texts
    assert np.allclose([line["vector"] for line in lines], wanted, rtol=1e-6)


def test_embed_refuses_bad_files(bert, capsys, tmp_path):
    (tmp_path / "texts.txt").write_text("a\n")
    options = ["embed", "--model", bert, "--texts", str(tmp_path / "texts.txt"), "--out"]
    assert "did you mean .npy?" in refusal(capsys, *options, str(tmp_path / "a.npz"), status=2)
    assert "does not" in refusal(capsys, *options, str(tmp_path / "no" / "a.npy"))
    (tmp_path / "a.npy").mkdir()
    assert "is something else" in refusal(capsys, *options, str(tmp_path / "a.npy"))
    rows = write_rows(tmp_path / "rows.jsonl", pairs(2))
    assert "wants rows of text" in refusal(capsys, "embed", "--model", bert, "--texts", rows, "--out",
                                           str(tmp_path / "b.npy"))
    assert not (tmp_path / "b.npy").exists()
