"""`make real` on a small random model: the tasks as conversations, the run, the report, the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken

import tinyft as ft
from tinyft import array, data
from tinyft.chat import chat_prompt
from tinyft.commands.rows import make_batches
from tinyft.data import IGNORE
from tinyft.data.files import read_rows
from tinyft.data.scores import token_f1
from tinyft.real import Settings, __main__, chat_task, demo, memory, report, run
from tinyft.real.demo import answer, open_base
from tinyft.real.tasks import LABELS, alternating, different_lengths, read_label, summarise

pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="the demonstration is for processor cores")

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The directory of a random Llama with the shipped tokenizer and ChatML."""
    tokenizer = data.shipped_tokenizer()
    tokenizer.encode_special_tokens = False
    tokenizer.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    tokenizer.chat_template = CHATML
    tokenizer.special_tokens = {"eos": "<|im_end|>"}     # as SmolLM2's: the end of a turn is the end of a text
    config = ft.LlamaConfig(vocab=2050, positions=512, width=16, layers=1, heads=2, key_value_heads=1, hidden=32,
                            tied=False, std=0.3)
    path = tmp_path_factory.mktemp("real") / "model"
    ft.save(ft.Llama(config, seed=0), path, tokenizer)
    return path


def small(folder, **changes) -> Settings:
    settings = {"model": str(folder), "steps": 4, "batch": 4, "test": 6, "valid": 3, "shots": 2, "evaluate_every": 2}
    return Settings(**{**settings, **changes})


# ---------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", ["names", "intact"])
def test_a_task_is_a_conversation(name):
    """The instruction first, then the solved examples of training, then the prompt; the test prompt is not solved."""
    task = chat_task(name, test=20)
    assert len(task.test.prompts) == len(task.test.responses) == 20
    messages = task.messages("A sentence.", shots=2)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[0]["content"] == task.instruction and messages[-1]["content"] == "A sentence."
    pairs = dict(zip(*task.train, strict=True))
    assert all(pairs[messages[i]["content"]] == messages[i + 1]["content"] for i in (1, 3))
    assert not set(task.test.prompts) & set(task.train.prompts)


def test_the_shots_show_different_answers():
    names = ["a", "b_c", "d", "e_f_g", "h_i", "j"]
    assert different_lengths(names) == (1, 0, 3, 2, 4, 5)
    assert alternating(np.array([1, 1, 0, 1, 0])) == (2, 0, 4, 1)
    task = chat_task("intact", test=5)
    shown = [message["content"] for message in task.messages("x", 4) if message["role"] == "assistant"]
    assert shown == ["swapped", "intact", "swapped", "intact"]


@pytest.mark.parametrize("text, label", [
    ("intact", "intact"), ("Swapped.", "swapped"), ("It is intact, not swapped.", "intact"), ("yes", ""), ("", ""),
])
def test_the_label_in_an_answer(text, label):
    assert read_label(text) == label and label in (*LABELS, "")


def test_perfect_and_empty_answers():
    task = chat_task("names", test=30)
    perfect, empty = task.score(task.test.responses), task.score([""] * 30)
    assert all((values == 1).all() for values in perfect.values()) and all((v == 0).all() for v in empty.values())
    assert summarise(perfect["exact"])[0] == 1 and 0.8 < summarise(perfect["exact"])[1] < 1  # Wilson: no point
    mean, low, high = summarise(np.array([0.0, 0.5, 1.0, 0.5]))
    assert mean == 0.5 and 0 < low < 0.5 < high < 1


def test_the_model_learns_the_answer_and_its_end(folder, tmp_path):
    """`tinyft tune` reads the conversations: only the response and the mark of its end have labels."""
    s = small(folder)
    task = chat_task("names", test=6)
    demo.write_examples(s, task, tmp_path)
    model, tokenizer = open_base(s)
    rows = read_rows(tmp_path / "train.jsonl")
    assert rows.kind == "chat" and len(rows.rows) == len(task.train.prompts)
    made = make_batches(rows, model, tokenizer, 4, 256, 0, chat=False, template=None)
    batch = next(made.batches)
    for ids, mask, labels in zip(batch["ids"], batch["mask"], batch["labels"], strict=True):
        learned = tokenizer.decode(labels[labels != IGNORE].tolist(), skip_special_tokens=False)
        shown = tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False)
        response = learned.removesuffix("<|im_end|>")
        prompt = shown.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        assert learned == response + "<|im_end|>" and dict(zip(*task.train))[prompt] == response
        assert shown == chat_prompt(task.messages(prompt), tokenizer) + response


def test_batched_answers_are_those_of_one_prompt_at_a_time(folder):
    s = small(folder)
    model, tokenizer = open_base(s)
    task = chat_task("names", test=6)
    together = answer(task, task.test.prompts, model, tokenizer, shots=1)
    alone = [answer(task, [prompt], model, tokenizer, shots=1)[0] for prompt in task.test.prompts]
    assert together == alone and len(set(together)) > 1


# ---------------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("task", ["names", "intact"])
def test_a_run_writes_its_report(folder, tmp_path, task):
    """The rows, their intervals, the answers, the learning curve, the figure; an adapter that gives the answers."""
    said = []
    s = small(folder, task=task)
    run(s, tmp_path / "out", said.append, memory=False)
    found = json.loads((tmp_path / "out" / "real.json").read_text())
    kinds = [row["kind"] for row in found["rows"].values()]
    assert kinds[-3:] == ["base", "base", "tuned"] and set(kinds[:-3]) == {"simple"}
    for name, row in found["rows"].items():
        assert len(found["answers"][name]) == 6
        for metric in found["metrics"]:
            mean, low, high = row[metric]
            assert 0 <= low <= mean <= high <= 1
    assert len(found["curve"]["loss"]) == 4 and [step for step, _ in found["curve"]["points"]] == [0, 2, 4]
    assert set(found["seconds"]) == {"simple", "zero-shot", "2-shot", "training", "LoRA", "all"}
    assert (tmp_path / "out" / "real.png").read_bytes().startswith(b"\x89PNG")
    text = "\n".join(said)
    assert all(name in text for name in found["rows"]) and found["prompts"][0] in found["prompts"]
    model, tokenizer = open_base(s)
    ft.load_adapter(model, tmp_path / "out" / "tune" / "adapter")
    prepared = chat_task(task, test=6)
    assert answer(prepared, prepared.test.prompts, model, tokenizer) == found["answers"]["LoRA"]


def test_training_lowers_the_loss_and_replaces_an_earlier_run(folder, tmp_path):
    s = small(folder, steps=30, lr=0.03, evaluate_every=30)
    task = chat_task("names", test=6)
    losses = []
    for _ in range(2):
        demo.write_examples(s, task, tmp_path)
        demo.tune(s, tmp_path, lambda text: None)
        [first, last] = demo.read_log(tmp_path / "tune" / "log.jsonl")["points"]
        assert first[0] == 0 and last[0] == 30 and last[1] < first[1] - 0.1
        losses.append(last[1])
    assert losses[0] == losses[1]


def test_the_verdict_reads_the_paired_interval():
    """The best row without training counts; a constant difference has a point as its interval."""
    task = chat_task("names", test=20)
    true = list(task.test.responses)
    answers = {"copy words": ["a"] * 20, "zero-shot": true[:10] + ["a"] * 10, "LoRA": true}
    rows = {}
    for name, kind in (("copy words", "simple"), ("zero-shot", "base"), ("LoRA", "tuned")):
        rows[name] = {"kind": kind, **{m: summarise(v) for m, v in task.score(answers[name]).items()}}
    found = {"rows": rows, "answers": answers, "metrics": list(task.metrics), "prompts": list(task.test.prompts),
             "responses": true, "settings": {"task": "names", "test": 20, "seed": 0}}
    words = report.verdict(found)
    assert words.startswith("token F1: LoRA - zero-shot (the best without training) = +0.") and words.endswith("better")
    assert f"{(1 - token_f1(true, answers['zero-shot'])).mean():+.3f}" in words
    for tuned, conclusion in ((["a"] * 20, "worse"), (answers["zero-shot"], "no difference shown")):
        assert report.verdict({**found, "answers": {**answers, "LoRA": tuned}}).endswith(conclusion)
    assert "1.000 [" in report.table(found) and true[0] in report.samples({**found, "prompts": found["prompts"][:1]})


def test_memory_is_measured_in_another_process(folder, tmp_path):
    """Its peak holds an interpreter and the model, and not what this process holds; a failure is one sentence."""
    ballast = np.ones(60_000_000)                        # 480 MB
    demo.write_examples(small(folder), chat_task("names", test=6), tmp_path)
    measured = memory.measure(small(folder), tmp_path, packed=False)
    assert 30e6 < measured["peak_bytes"] < ballast.nbytes and measured["step_seconds"] > 0
    assert "base in float32" in report.memory([measured]) and not measured["packed"]
    with pytest.raises(RuntimeError, match="exit status 1: FileNotFoundError"):
        memory.measure(small(folder / "absent"), tmp_path, packed=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl", "valid.jsonl"]


def test_the_readme_shows_the_measured_table():
    """And its intervals are those of the stored answers."""
    root = Path(__file__).resolve().parents[1]
    found = json.loads((root / "tests" / "benchmarks" / "results" / "real.json").read_text(encoding="utf-8"))
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert report.table(found) in readme
    task = chat_task(found["settings"]["task"], found["settings"]["test"], found["settings"]["seed"])
    assert found["prompts"] == list(task.test.prompts) and found["responses"] == list(task.test.responses)
    for name, row in found["rows"].items():
        scores = task.score(found["answers"][name])
        assert all(row[metric] == pytest.approx(summarise(values)) for metric, values in scores.items())
    difference = report.verdict(found).partition(" = +")[2].partition(":")[0]  # 0.053 [+0.007, +0.103]
    assert difference.replace("+", "") in " ".join(readme.split())


# ---------------------------------------------------------------------------------------------------- refusals


def test_without_the_model_one_sentence_names_the_command(tmp_path, capsys):
    missing = tmp_path / "absent.gguf"
    assert __main__.main(["--model", str(missing), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "make real-assets" in message and str(missing) in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_refused_before_the_work(folder, tmp_path):
    other = tmp_path / "tune" / "notes.txt"
    other.parent.mkdir()
    other.write_text("mine")
    said = []
    with pytest.raises(ValueError, match="--out wants a new or an empty folder, got .* notes.txt"):
        run(small(folder), tmp_path, said.append, memory=False)
    assert said == [] and other.read_text() == "mine" and list(tmp_path.iterdir()) == [other.parent]


@pytest.mark.parametrize("changes, message", [
    ({"steps": 251}, "steps wants a whole number from 1 to 250"), ({"test": 201}, "test wants .* from 1 to 200"),
    ({"task": "package"}, "one of 'names', 'intact'"), ({"packed": 1}, "packed"), ({"lr": 0}, "lr"),
    ({"batch": 0}, "batch"), ({"shots": -1}, "shots"), ({"seed": -1}, "seed"), ({"model": 3}, "path"),
])
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Settings(**changes)
