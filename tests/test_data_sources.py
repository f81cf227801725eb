"""Sources and targets as batches of an encoder-decoder: tinyft/data/sources.py."""
from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import host, wrong_answers
from test_data_files import words_tokenizer

import tinyft as ft
from tinyft import data
from tinyft.data.names import Pairs
from tinyft.train import compute_loss, read_batch

END = 5                                                  # the id of <|endoftext|> in this tokenizer
START = 0
PAIRS = [("a b c", "d"), ("b", "a c d"), ("c d", "")]


def batches_of(pairs, **changes):
    settings = {"batch_size": 3, "max_source": 8, "max_target": 8, "start": START} | changes
    return data.source_batches(pairs, words_tokenizer("<|endoftext|>"), **settings)


def rows_of(batch, ids, mask):
    return [row[real].tolist() for row, real in zip(batch[ids], batch[mask])]


def test_a_batch_holds_sources_with_an_end_and_targets_between_start_and_end():
    batch = next(batches_of(PAIRS).once())
    assert rows_of(batch, "source_ids", "source_mask") == [[1, 2, 3, END], [2, END], [3, 4, END]]
    assert rows_of(batch, "ids", "mask") == [[START, 4, END], [START, 1, 3, 4, END], [START, END]]
    assert "labels" not in batch


def test_the_forms_of_pairs_give_the_same_batches():
    sources, targets = zip(*PAIRS)
    wanted = next(batches_of(PAIRS).once())
    for form in (Pairs(sources, targets), Pairs(list(sources), list(targets)), tuple(PAIRS), [list(p) for p in PAIRS]):
        found = next(batches_of(form).once())
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_long_source_is_cut_on_the_right_and_a_long_target_is_refused():
    batch = next(batches_of(PAIRS, max_source=3).once())
    assert rows_of(batch, "source_ids", "source_mask") == [[1, 2, END], [2, END], [3, 4, END]]
    assert next(batches_of(PAIRS, max_target=4).once())["mask"].sum() == 10
    with pytest.raises(ValueError, match="row 1: a target of 3 tokens and the end do not fit into 3"):
        batches_of(PAIRS, max_target=3)


def test_padding_never_goes_beyond_the_longest_texts():
    """A model has no position there."""
    for max_source, max_target in ((3, 4), (5, 6)):
        batch = next(batches_of(PAIRS, max_source=max_source, max_target=max_target).once())
        assert batch["source_ids"].shape[1] <= max_source and batch["ids"].shape[1] <= max_target + 1


@pytest.mark.parametrize("pairs, error, words", [
    ([("a", "b"), ("", "c")], ValueError, "row 1: a source wants at least one token, got an empty text"),
    ([], ValueError, "at least one example"),
    ([("a", 1)], TypeError, "pairs wants a list of pairs"),
    ([("a", "b", "c")], TypeError, "pairs wants a list of pairs"),
    ("ab", TypeError, "pairs wants a list of pairs"),
    ((["a"], ["b", "c"]), TypeError, "pairs wants a list of pairs"),
    (Pairs(["a"], ["b", "c"]), ValueError, "one target for each source, got 2 and 1"),
])
def test_pairs_that_cannot_be_learned_are_refused(pairs, error, words):
    with pytest.raises(error, match=words):
        batches_of(pairs)


def test_a_tokenizer_without_an_end_wants_one():
    with pytest.raises(ValueError, match="source_batches"):
        data.source_batches(PAIRS, words_tokenizer(), 2, 8, 8, start=0)
    batch = next(data.source_batches(PAIRS, words_tokenizer(), 3, 8, 8, start=0, end=4).once())
    assert rows_of(batch, "source_ids", "source_mask")[0] == [1, 2, 3, 4]


def small_model():
    config = ft.Seq2SeqConfig(vocab=8, positions=16, width=16, layers=1, heads=2, start=START, std=0.3)
    return ft.Seq2Seq(config, seed=0)


def loss_by_hand(model, pairs) -> float:
    """The mean − log p of every target token, the end included, row by row and without padding."""
    total, count = 0.0, 0
    for source, target in pairs:
        batch = next(batches_of([(source, target)], batch_size=1).once())
        real, text = batch["source_ids"][batch["source_mask"]], batch["ids"][batch["mask"]]
        logits = model(text[None, :-1], source_ids=real[None]).data[0]
        logits = host(logits).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log_probs[np.arange(len(text) - 1), text[1:]].sum()
        count += len(text) - 1
    return total / count


def without_the_last_token(batch):
    """The end is not learned: the model would never stop."""
    mask = batch["mask"].copy()
    for row in mask:
        row[row.sum() - 1] = False
    return batch | {"mask": mask}


def without_the_source_mask(batch):
    """The padding of the source is read."""
    return batch | {"source_mask": np.ones_like(batch["source_mask"])}


def without_the_mask(batch):
    """The padding of the target is learned."""
    return batch | {"mask": np.ones_like(batch["mask"])}


@wrong_answers
def test_wrong_batches_have_another_loss():
    model = small_model()
    batch = next(batches_of(PAIRS).once())
    wanted = loss_by_hand(model, PAIRS)
    for wrong in (without_the_last_token, without_the_source_mask, without_the_mask):
        found = float(compute_loss(model, read_batch(wrong(batch)))[1].data)
        assert abs(found - wanted) > 1e-3, wrong.__doc__


def test_the_loss_is_that_of_every_target_token():
    model = small_model()
    batch = next(batches_of(PAIRS).once())
    assert float(compute_loss(model, read_batch(batch))[1].data) == pytest.approx(loss_by_hand(model, PAIRS), rel=1e-5)


def test_the_stream_can_be_resumed():
    first = batches_of(PAIRS * 5, batch_size=2, seed=3)
    for _ in range(5):
        next(first)
    second = batches_of(PAIRS * 5, batch_size=2, seed=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(9):
        ours, theirs = next(first), next(second)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError):
        batches_of(PAIRS[::-1] * 5, batch_size=2).load_state_dict(first.state_dict())


FROZEN = {                                               # of batches_of(PAIRS), as older versions wrote them
    "before PadPairs had limits": "631cbb7556cdfd549226242d35210521",
    "while the limits counted": "71168d66f0a07ae1ff0d21bb8792a1b9",
}


@pytest.mark.parametrize("content", FROZEN.values(), ids=FROZEN)
def test_a_position_of_an_older_version_is_gone_to(content):
    """Limits that cut no row change the padding alone. Other sources, or the same ones cut, are other examples."""
    state = batches_of(PAIRS).state_dict()
    batches_of(PAIRS).load_state_dict({**state, "content": content, "batch": 1})
    assert state["content"] == batches_of(PAIRS, max_source=9, max_target=9).state_dict()["content"]
    for other in (batches_of(PAIRS, max_source=3), batches_of([("a b c", "c"), *PAIRS[1:]])):
        with pytest.raises(ValueError, match="got one of other examples"):
            other.load_state_dict({**state, "content": content})
    with pytest.raises(ValueError, match="got one of other examples"):
        batches_of(PAIRS).load_state_dict({**state, "content": "0" * 32})
