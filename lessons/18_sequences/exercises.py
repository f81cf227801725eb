"""Lesson 18, beam search: the candidates, who lives on, the score, the stopping rule."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from tinyft.beam import Candidate, GNMTPenalty, Hypothesis, PowerPenalty, Prefix, Search
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import named, sizes

END = 0


def check(got, want, what, guesses):
    """close, with the guesses that differ from the expected result."""
    wrong = {words: a for words, a in guesses.items()
             if np.shape(a) != np.shape(want) or not np.allclose(a, want)}
    close(got, want, what, wrong)


# ── best_candidates ───────────────────────────────────────────────────────────────────────────────
best_candidates = Exercise(
    "beam:best_candidates", difficulty=3, minutes=25, on_host=True, lines=9,
    may_use="enumerate, zip, sorted; math.inf; Candidate(log_prob, parent, token, row). A loop "
            "over all tokens is fast enough here. (The library looks only at the `count` best of "
            "each row, which top_tokens finds.)",
    example="""
        One sentence with two live prefixes. The vocabulary has three tokens.
        >>> live = [[Prefix((1,), -1.0), Prefix((2,), -2.0)]]
        >>> log_probs = np.array([[-4.0, -2.0, -5.0], [-0.5, -3.0, -9.0]])
        >>> for candidate in list(best_candidates(log_probs, live, 3))[0]:
        ...     print(candidate)
        Candidate(log_prob=-2.5, parent=1, token=0, row=1)
        Candidate(log_prob=-3.0, parent=0, token=1, row=0)
        Candidate(log_prob=-5.0, parent=0, token=0, row=0)
        """,
    hints=(
        "A candidate is a live prefix and one more token. Its log P is that of the prefix plus "
        "that of the token. All prefixes of a sentence compete with each other.",
        "The rows of log_probs belong to the prefixes of all sentences, one after the other. So "
        "keep a counter `row` over all prefixes. `parent` begins with 0 in each sentence.",
        "Collect the candidates of a sentence in the order of parents and tokens, and sort them by "
        "-candidate.log_prob: Python's sort keeps the order of equal ones. Yield the first "
        "`count`."))


@st.composite
def a_step(draw: Callable, sentences: int = 1, prefixes: bool = True, ties: bool = False):
    """log_probs (R, V), the live prefixes of each sentence, and count.

    Without ties, no two candidates are equal."""
    counts = [draw(sizes()) + 1 if prefixes else 1 for _ in range(sentences)]
    R, V = sum(counts), draw(sizes()) + 2
    order = shuffled(draw, R * V).reshape(R, V)
    totals = -max(counts) - (order % 2 if ties else order).astype(np.float64)
    live = []
    before = []                                          # log P of the prefix of each row
    for n in counts:
        live.append([Prefix((i + 1,), -float(i)) for i in range(n)])
        before += [-float(i) for i in range(n)]
    log_probs = totals - np.array(before)[:, None]
    return named(log_probs=log_probs, live=live, count=2 * draw(st.integers(2, 3)))


def shuffled(draw, n):
    """The numbers from 0 to n − 1 in random order; a permutation of Hypothesis would be slow."""
    return np.random.default_rng(draw(st.integers(0, 999))).permutation(n)


def candidates_of(log_probs, live, count, *, gain=False, product=False, ascending=False, sort=True,
                  greedy=False, own_rows=False, parents_of_all=False, together=False, ties=None,
                  impossible=False, half=False, every=False):
    """The candidates of each sentence, with one error."""
    found = []
    row = 0
    for prefixes in live:
        mine = []
        first = row
        for parent, prefix in enumerate(prefixes):
            options = []
            for token, log_p in enumerate(log_probs[row].tolist()):
                total = prefix.log_prob + log_p
                total = log_p if gain else total
                total = prefix.log_prob * log_p if product else total
                options.append(Candidate(total, row if parents_of_all else parent, token,
                                         row - first if own_rows else row))
            options = [c for c in options if impossible or c.log_prob > -np.inf]
            mine += sorted(options, key=lambda c: -c.log_prob)[:1] if greedy else options
            row += 1
        if ties == "token":
            mine.sort(key=lambda c: -c.token)
        elif ties == "parent":
            mine.sort(key=lambda c: -c.parent)
        elif ties == "both":
            mine.reverse()
        if sort:
            mine.sort(key=lambda c: c.log_prob if ascending else -c.log_prob)
        limit = max(count // 2, 1) if half else count
        found.append(mine if every else mine[:limit])
    if together:
        every = [c for mine in found for c in mine]
        best = sorted(every, key=lambda c: -c.log_prob)[:count]
        for i, mine in enumerate(found):
            found[i] = [c for c in mine if c in best]
    return found


CANDIDATE_FAULTS = {
    "log P of the prefix is missing: it is added to that of the token": {"gain": True},
    "the logarithms are multiplied; probabilities are, so logarithms are added": {"product": True},
    "the worst candidates come first": {"ascending": True},
    "they are not sorted: they stand in the order of the parents": {"sort": False},
    "each prefix gives its best token alone: all its tokens are candidates": {"greedy": True},
    "`row` counts the prefixes of all sentences; yours begins anew in each":
        {"own_rows": True},
    "`parent` begins with 0 in each sentence; yours is the row": {"parents_of_all": True},
    "the sentences compete with each other: each has `count` candidates of its own":
        {"together": True},
    "of equal candidates the lower parent comes first, then the lower token; yours are in reverse":
        {"ties": "both"},
    "of equal candidates the lower token comes first": {"ties": "token"},
    "of equal candidates the lower parent comes first": {"ties": "parent"},
    "a token of probability 0 is no candidate": {"impossible": True},
    "there are `count` candidates for each sentence; yours are half of them": {"half": True},
    "a sentence has at most `count` candidates; yours are more": {"every": True},
}


def as_table(found):
    """Lists of candidates as an array (n, 5): sentence, log P, parent, token, row."""
    rows = []
    for sentence, mine in enumerate(found):
        for c in mine:
            if not isinstance(c, Candidate):
                raise Unusable("each sentence gets a list of Candidate(log_prob, parent, token, "
                               f"row); yours has a {type(c).__name__}")
            rows.append([sentence, *c])
    return np.array(rows, np.float64).reshape(-1, 5)


def check_candidates(f, given):
    log_probs, live, count = given
    out = f(log_probs, live, count)
    if out is None:
        raise Unusable("the result is None: return a list with a list for each sentence, or yield")
    got = list(out)
    if len(got) != len(live):
        raise Unusable(f"there are {len(live)} sentences; your answer has {len(got)} lists")
    guesses = {}
    with np.errstate(invalid="ignore"):
        for words, fault in CANDIDATE_FAULTS.items():
            guesses[words] = as_table(candidates_of(*given, **fault))
    check(as_table(got), as_table(candidates_of(*given)),
          "the candidates (each as [sentence, log P, parent, token, row])", guesses)


@best_candidates.law("one live prefix: its best tokens, best first", given=a_step(prefixes=False))
def _(f, given):
    check_candidates(f, given)


@best_candidates.law("all prefixes of a sentence compete with each other", given=a_step())
def _(f, given):
    check_candidates(f, given)


@best_candidates.law("each sentence has its own candidates", given=a_step(sentences=2))
def _(f, given):
    check_candidates(f, given)


@best_candidates.law("of equal candidates the lower parent comes first, then the lower token",
                     given=a_step(ties=True))
def _(f, given):
    check_candidates(f, given)


@best_candidates.law("a token of probability 0 is no candidate", given=a_step(),
                     seed=st.integers(0, 9))
def _(f, given, seed):
    log_probs, live, _ = given
    log_probs = log_probs.copy()
    log_probs[:, seed % log_probs.shape[1]] = -np.inf
    check_candidates(f, (log_probs, live, 2 * log_probs.shape[1]))


@best_candidates.wrong_answer("The model's probability of a token is all that counts.",
                              says="log P of the prefix is missing")
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, gain=True)


@best_candidates.wrong_answer("Probabilities of a text are multiplied.",
                              says="the logarithms are multiplied")
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, product=True)


@best_candidates.wrong_answer("sort() puts the best first.", says="the worst candidates")
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, ascending=True)


@best_candidates.wrong_answer("The search sorts them later.", says="not sorted")
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, sort=False)


@best_candidates.wrong_answer("A beam of B is B greedy searches, side by side.",
                              says="its best token alone")
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, greedy=True)


@best_candidates.wrong_answer("Row and parent are the same.", says="yours begins anew in each",
                              subtle=True)
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, own_rows=True)


@best_candidates.wrong_answer("A parent is a row of the batch.", says="yours is the row",
                              subtle=True)
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, parents_of_all=True)


@best_candidates.wrong_answer("A batch has `count` best candidates.", says="compete",
                              subtle=True)
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, together=True)


@best_candidates.wrong_answer("sorted(...)[::-1] is the same as sorting by the negative.",
                              says="the lower token comes first", subtle=True)
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, ties="token")


@best_candidates.wrong_answer("sorted(candidates, reverse=True) sorts them by log P.",
                              says="yours are in reverse", subtle=True)
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, ties="both")


@best_candidates.wrong_answer("Of equal texts the newer prefix is as good.",
                              says="the lower parent comes first", subtle=True)
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, ties="parent")


@best_candidates.wrong_answer("An impossible token comes last, so it does no harm.",
                              says="probability 0", subtle=True)
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, impossible=True)


@best_candidates.wrong_answer("B candidates are enough: no more than B can live on.",
                              says="half of them")
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, half=True)


@best_candidates.wrong_answer("The search takes as many as it needs.", says="yours are more")
def _(log_probs, live, count):
    return candidates_of(log_probs, live, count, every=True)


# ── Search.extend ─────────────────────────────────────────────────────────────────────────────────
extend = Exercise(
    "beam:Search.extend", difficulty=3, minutes=25, lines=11,
    may_use="self.beams, self.end, self.live; Prefix(tokens, log_prob, attention); "
            "self.attended(candidate, attention), which gives the attention of a new prefix; "
            "self.finish(prefix, ended=True), which keeps a finished hypothesis.",
    example="""
        B = 2. The first candidate ends, the two others live on.
        >>> from tinyft.beam import PowerPenalty, Search
        >>> search = Search(2, 0, PowerPenalty(1.0), n_best=1)
        >>> found = [Candidate(-1.0, 0, 0, 0), Candidate(-2.0, 0, 5, 0), Candidate(-3.0, 0, 7, 0)]
        >>> extend(search, found)
        [0, 0]
        >>> [prefix.tokens for prefix in search.live]
        [(5,), (7,)]
        >>> search.finished
        [Hypothesis(tokens=(0,), score=-1.0, log_prob=-1.0, ended=True)]
        """,
    hints=(
        "Go through the candidates, best first, with their ranks 0, 1, 2, ... The tokens of a "
        "candidate are those of its parent, self.live[candidate.parent], and its own.",
        "If it ends and its rank is below B, it is finished, with its end among its tokens. If it "
        "ends at rank B or later, it is dropped. If it does not end, it becomes a live prefix, "
        "unless there are B already.",
        "Fill a new list of live prefixes, and set self.live at the very end: the parents are in "
        "the old list. Collect candidate.row of each new live prefix in a second list."))


@st.composite
def a_search(draw: Callable, ends: bool = True, first: bool = False, few: bool = False):
    """Live prefixes, and candidates of the next length, best first, with all different log P.

    few: one candidate for two beams or more."""
    beams = draw(sizes()) + few
    n = 1 if first else draw(st.integers(1, beams))
    start = 0 if first else draw(st.integers(0, 2))
    tokens = range(0 if ends else 1, beams + 2)
    pairs = []
    for parent in range(n):
        pairs += [(parent, token) for token in tokens]
    count = 1 if few else 2 * beams
    chosen = [pairs[place] for place in shuffled(draw, len(pairs))[:count]]
    live = [Prefix((), 0.0)] if first else live_prefixes(n)
    return named(beams=beams, end=END, live=live, candidates=ranked(chosen, n, start))


@st.composite
def a_late_end(draw: Callable):
    """Two live prefixes, two beams or more, and an end at rank B, the first that is dropped.

    With an end at rank 0, there is a place for one more live prefix at rank B."""
    beams = draw(sizes()) + 1
    others = [(i % 2, 1 + i // 2) for i in range(beams + 1)]
    pairs = [(0, END), *others] if draw(st.booleans()) else others
    pairs.insert(beams, (1, END))
    return named(beams=beams, end=END, live=live_prefixes(2),
                 candidates=ranked(pairs, 2, start=0))


def live_prefixes(n):
    """n prefixes of two tokens, best first."""
    return [Prefix((7 + i, 5), -1.0 - i) for i in range(n)]


def ranked(pairs, n, start):
    """Pairs (parent, token) as candidates of n prefixes, best first; start: the first row."""
    candidates = []
    for rank, (parent, token) in enumerate(pairs):
        candidates.append(Candidate(-n - 1.0 - rank, parent, token, start + parent))
    return candidates


def a_state(beams, live):
    """A search in the middle: one text is finished already."""
    return Search(beams, END, GNMTPenalty(1.0), n_best=1, live=list(live),
                  finished=[Hypothesis((3, END), -2.0, -4.0, ended=True)])


@st.composite
def a_covered_search(draw: Callable):
    """A search whose prefixes have attention to two tokens of the source, and that of this step."""
    beams, _, live, candidates = draw(a_search())
    rows = max(candidate.row for candidate in candidates) + 1
    live = [prefix._replace(attention=np.array([1.0, 2.0 + i])) for i, prefix in enumerate(live)]
    attention = [np.array([0.25 + row, 0.75]) for row in range(rows)]
    return named(beams=beams, end=END, live=live, candidates=candidates, attention=attention)


def extended(self, candidates, attention=(), *, every=False, end_takes_place=False,
             ended_lives=False, forget=False, no_end=False, parents=False, before=False,
             twice=False, cut=False, stops=False, wide=False, late=False, fill=False,
             late_end_lives=False, blind=False):
    """Search.extend with one error."""
    rows = []
    live = []
    limit = 2 * self.beams if wide else self.beams
    if forget:
        self.finished = []
    for rank, candidate in enumerate(candidates):
        parent = self.live[candidate.parent]
        own = (candidate.token,)
        attended = 0.0 if blind else self.attended(candidate, attention)
        tokens = own + parent.tokens if before else parent.tokens + own
        log_p = candidate.log_prob + (parent.log_prob if twice else 0)
        ends = candidate.token == self.end
        if ends and (every or rank < self.beams):
            text = tokens[:-1] if no_end else tokens
            self.finish(Prefix(text, log_p, attended), ended=not cut)
        has_place = rank < self.beams if end_takes_place else len(live) < limit
        if late:
            has_place = len(live) < limit and rank >= len(candidates) - limit
        may_live = not ends or ended_lives or (late_end_lives and rank >= self.beams)
        if has_place and may_live:
            live.append(Prefix(tokens, log_p, attended))
            rows.append(candidate.parent if parents else candidate.row)
        if stops and ends:
            break
    while fill and live and len(live) < self.beams:
        live.append(live[-1])
        rows.append(rows[-1])
    self.live = live
    return rows


EXTEND_FAULTS = {
    "a candidate that ends at rank B or later is finished, too": {"every": True},
    "those that ended took places of the live: fewer than B live on": {"end_takes_place": True},
    "a text that has ended lives on": {"ended_lives": True},
    "a candidate that ends at rank B or later lives on; it is dropped": {"late_end_lives": True},
    "the texts that had finished before are lost": {"forget": True},
    "the end is missing: a finished text has its end, which counts": {"no_end": True},
    "these are candidate.parent, the numbers in the sentence; candidate.row is wanted":
        {"parents": True},
    "the new token stands before the others": {"before": True},
    "log P of the prefix is added a second time: the candidate's has it": {"twice": True},
    "a text with an end is kept as one that was cut off": {"cut": True},
    "the search of this length stops at the first end": {"stops": True},
    "more than B live on": {"wide": True},
    "the last candidates live on; they come best first": {"late": True},
    "equal prefixes live on: they would stay equal, and find the same texts": {"fill": True},
}


def rows_of_texts(texts):
    """Prefixes or hypotheses as an array: log P, of hypotheses score and ended, then length and
    tokens; -1 fills up."""
    rows = []
    for text in texts:
        facts = [text.log_prob]
        if isinstance(text, Hypothesis):
            facts += [text.score, text.ended]
        rows.append([*facts, len(text.tokens), *text.tokens])
    table = np.full((len(rows), max(map(len, rows), default=0)), -1.0)
    for place, row in zip(table, rows):
        place[:len(row)] = row
    return table


def check_extend(f, given):
    beams, _, live, candidates = given

    def run(function):
        state = a_state(beams, live)
        rows = function(state, list(candidates))
        if rows is None:
            raise Unusable("extend returns the rows of the parents; yours returned None")
        for text in state.live:
            if not isinstance(text, Prefix):
                raise Unusable("self.live is a list of Prefix(tokens, log_prob); yours has a "
                               f"{type(text).__name__}")
        return (rows_of_texts(state.live), rows_of_texts(state.finished),
                np.array(list(rows), np.int64))

    got, want = run(f), run(extended)
    guesses = {}
    for words, fault in EXTEND_FAULTS.items():
        guesses[words] = run(lambda self, found, fault=fault: extended(self, found, **fault))
    names = ("the live prefixes (each as [log P, length, tokens])",
             "the finished texts (each as [log P, score, ended, length, tokens])", "the rows")
    for i, name in enumerate(names):
        check(got[i], want[i], name, {words: found[i] for words, found in guesses.items()})


@extend.law("no candidate ends: the first B live on", given=a_search(ends=False))
def _(f, given):
    check_extend(f, given)


@extend.law("a candidate that ends at rank B or later is dropped", given=a_late_end())
def _(f, given):
    check_extend(f, given)


@extend.law("those among the first B that end are finished, and the first B others live on",
            given=a_search())
def _(f, given):
    check_extend(f, given)


@extend.law("fewer than B candidates: fewer live on", given=a_search(ends=False, few=True))
def _(f, given):
    check_extend(f, given)


@extend.law("the first length: the empty prefix is the only parent", given=a_search(first=True))
def _(f, given):
    check_extend(f, given)


@extend.law("with a coverage penalty: a new prefix has the attention that self.attended gives",
            given=a_covered_search())
def _(f, given):
    beams, _, live, candidates, attention = given

    def run(function):
        state = a_state(beams, live)
        function(state, list(candidates), attention)
        return np.array([prefix.attention for prefix in state.live])

    want = run(extended)
    close(run(f), want, "the attention of the live prefixes", {
        "the attention of a new prefix is missing": np.zeros(len(want))})


@extend.wrong_answer("Attention is a matter of the model, not of the search.",
                     says="attention of a new prefix is missing", subtle=True)
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, blind=True)


@extend.wrong_answer("Every text that ends is a result.", says="rank B or later is finished")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, every=True)


@extend.wrong_answer("B candidates survive, whether they end or not.", says="took places")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, end_takes_place=True)


@extend.wrong_answer("A text may still get better after its end.", says="has ended lives on")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, ended_lives=True)


@extend.wrong_answer("A candidate that is not finished is live.", says="rank B or later lives on")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, late_end_lives=True)


@extend.wrong_answer("The finished texts are those of this length.", says="are lost")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, forget=True)


@extend.wrong_answer("The end is no part of the text.", says="the end is missing")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, no_end=True)


@extend.wrong_answer("The parent's number tells its row.", says="candidate.row is wanted")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, parents=True)


@extend.wrong_answer("The new token comes first.", says="stands before")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, before=True)


@extend.wrong_answer("A candidate holds the log P of its token.", says="a second time")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, twice=True)


@extend.wrong_answer("`ended` is for texts that the search stopped.", says="cut off")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, cut=True)


@extend.wrong_answer("The first end is the best one, so stop there.", says="stops at the first end")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, stops=True)


@extend.wrong_answer("All candidates that do not end live on.", says="more than B")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, wide=True)


@extend.wrong_answer("A list of candidates is sorted like any other: the best is the last.",
                     says="they come best first")
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, late=True)


@extend.wrong_answer("B prefixes live at every length, so the last one fills the gaps.",
                     says="equal prefixes", subtle=True)
def _(self, candidates, attention=()):
    return extended(self, candidates, attention, fill=True)


# ── Search.finish ─────────────────────────────────────────────────────────────────────────────────
finish = Exercise(
    "beam:Search.finish", difficulty=1, minutes=10,
    may_use="self.lp(n), the length penalty of n tokens; self.penalty(prefix), the coverage "
            "penalty; self.finished, a list; Hypothesis(tokens, score, log_prob, ended).",
    example="""
        >>> from tinyft.beam import PowerPenalty, Search
        >>> search = Search(2, 0, PowerPenalty(1.0), n_best=1)
        >>> finish(search, Prefix((5, 0), -3.0), ended=True)             # -3 / 2
        >>> search.finished
        [Hypothesis(tokens=(5, 0), score=-1.5, log_prob=-3.0, ended=True)]
        """,
    hints=(
        "The score is log P divided by the length penalty, plus the coverage penalty.",
        "The length is that of this text, len(prefix.tokens). If the text has ended, its end is "
        "among the tokens, and counts.",
        "self.finished.append(Hypothesis(prefix.tokens, score, prefix.log_prob, ended))"))
PENALTIES = {"n": PowerPenalty(1.0), "sqrt n": PowerPenalty(0.5), "1 / n": PowerPenalty(-1.0),
             "((5 + n) / 6)": GNMTPenalty(1.0)}


@st.composite
def a_text(draw: Callable, ended: bool = True):
    """A prefix of n + 1 tokens, with its end if it has ended; and the name of a penalty."""
    n = draw(sizes())
    tokens = tuple(range(1, n + 1)) + ((END,) if ended else (n + 1,))
    log_prob = -6.0 * draw(st.integers(1, 4))
    return named(tokens=tokens, log_prob=log_prob, lp=draw(st.sampled_from(sorted(PENALTIES))))


def score_of(prefix, lp, *, length=None, how="divide"):
    n = len(prefix.tokens) if length is None else length
    results = {"divide": prefix.log_prob / lp(n), "multiply": prefix.log_prob * lp(n),
               "none": prefix.log_prob, "subtract": prefix.log_prob - lp(n),
               "probability": np.exp(prefix.log_prob) / lp(n)}
    return results[how]


LIVE = [Prefix((4, 4, 4, 4, 4), -20.0)]
EARLIER = Hypothesis((9,), -1.0, -1.0, ended=False)


def a_finish(f, tokens, log_prob, lp, *, ended, coverage=0.0, attention=0.0):
    """The text that f, the learner's finish, appends to a search with one finished text."""
    state = Search(3, END, lp, 1, coverage, live=list(LIVE), finished=[EARLIER])
    f(state, Prefix(tokens, log_prob, attention), ended=ended)
    for text in state.finished:
        if not isinstance(text, Hypothesis):
            raise Unusable("self.finished is a list of Hypothesis(tokens, score, log_prob, ended); "
                           f"yours has a {type(text).__name__}")
    if EARLIER not in state.finished:
        raise Unusable("a text that had finished before is lost: append the new one")
    if len(state.finished) != 2:
        raise Unusable("self.finished had one text, and should have two after the call; it has "
                       f"{len(state.finished)}")
    return [text for text in state.finished if text != EARLIER][0]


def check_finish(f, given, ended):
    tokens, log_prob, name = given
    lp = PENALTIES[name]
    got = a_finish(f, tokens, log_prob, lp, ended=ended)
    prefix = Prefix(tokens, log_prob)
    n = len(tokens)
    guesses = {
        "the end is not counted: it is one of the n tokens": score_of(
            prefix, lp, length=n - 1),
        "log P is multiplied with the penalty; it is divided by it": score_of(
            prefix, lp, how="multiply"),
        "it is log P: the length penalty is missing": log_prob,
        "the penalty is subtracted; log P is divided by it": score_of(
            prefix, lp, how="subtract"),
        "it is the probability, divided by the penalty": score_of(
            prefix, lp, how="probability"),
        "it is the penalty of the live prefixes' length: each text has its own": score_of(
            prefix, lp, length=len(LIVE[0].tokens)),
        "it is the mean of log P, whatever self.lp is": log_prob / n,
        "the number of finished texts is taken for the length": score_of(
            prefix, lp, length=2)}
    check(float(got.score), score_of(prefix, lp), "the score", guesses)
    check(float(got.log_prob), log_prob, "log_prob", {
        "it is the score; log_prob stays without the penalty": got.score})
    close(bool(got.ended), ended, "ended", {"it is always True": True, "it is always False": False})
    close(np.array(got.tokens), np.array(tokens), "the tokens", {
        "the end is removed; it stays": np.array(tokens[:-1])})


@finish.law("the score is log P / lp(n), n counts the end", given=a_text())
def _(f, given):
    check_finish(f, given, ended=True)


@finish.law("the same for a text that is cut off", given=a_text(ended=False))
def _(f, given):
    check_finish(f, given, ended=False)


@finish.law("the coverage penalty is added to the score", given=a_text(),
            attention=st.sampled_from(((0.5, 1.5), (0.25, 0.5))))
def _(f, given, attention):
    tokens, log_prob, name = given
    lp = PENALTIES[name]
    prefix = Prefix(tokens, log_prob, np.array(attention))
    got = a_finish(f, tokens, log_prob, lp, ended=True, coverage=0.5, attention=prefix.attention)
    penalty = 0.5 * np.log(np.minimum(attention, 1)).sum()
    check(float(got.score), score_of(prefix, lp) + penalty, "the score with coverage = 0.5", {
        "the coverage penalty is missing: self.penalty(prefix)": score_of(prefix, lp)})


@finish.law("texts that had finished before stay", given=a_text())
def _(f, given):
    tokens, log_prob, name = given
    a_finish(f, tokens, log_prob, PENALTIES[name], ended=True)


def add_text(self, prefix, score, *, ended):
    score += self.penalty(prefix)
    self.finished.append(Hypothesis(prefix.tokens, score, prefix.log_prob, ended))


@finish.wrong_answer("The end is no word, so it has no length.", says="the end is not counted")
def _(self, prefix, *, ended):
    length = len(prefix.tokens) - ended
    add_text(self, prefix, score_of(prefix, self.lp, length=length), ended=ended)


@finish.wrong_answer("A penalty makes the score smaller, so multiply.", says="is multiplied")
def _(self, prefix, *, ended):
    add_text(self, prefix, score_of(prefix, self.lp, how="multiply"), ended=ended)


@finish.wrong_answer("log P and the length are all that a score needs.",
                     says="coverage penalty is missing", subtle=True)
def _(self, prefix, *, ended):
    score = score_of(prefix, self.lp)
    self.finished.append(Hypothesis(prefix.tokens, score, prefix.log_prob, ended))


@finish.wrong_answer("The probability of a text is its score.",
                     says="the length penalty is missing")
def _(self, prefix, *, ended):
    add_text(self, prefix, prefix.log_prob, ended=ended)


@finish.wrong_answer("A penalty is subtracted.", says="is subtracted")
def _(self, prefix, *, ended):
    add_text(self, prefix, score_of(prefix, self.lp, how="subtract"), ended=ended)


@finish.wrong_answer("A score should be a probability.", says="it is the probability")
def _(self, prefix, *, ended):
    add_text(self, prefix, score_of(prefix, self.lp, how="probability"), ended=ended)


@finish.wrong_answer("All texts of the search have the length of the step.",
                     says="the live prefixes' length")
def _(self, prefix, *, ended):
    length = len(self.live[0].tokens)
    add_text(self, prefix, score_of(prefix, self.lp, length=length), ended=ended)


@finish.wrong_answer("A length penalty is a mean over the tokens.", says="whatever self.lp is")
def _(self, prefix, *, ended):
    add_text(self, prefix, prefix.log_prob / len(prefix.tokens), ended=ended)


@finish.wrong_answer("log_prob and score say the same.", says="without the penalty")
def _(self, prefix, *, ended):
    score = score_of(prefix, self.lp)
    self.finished.append(Hypothesis(prefix.tokens, score, score, ended))


@finish.wrong_answer("The end has done its work, so it is removed.", says="the end is removed")
def _(self, prefix, *, ended):
    score = score_of(prefix, self.lp)
    self.finished.append(Hypothesis(prefix.tokens[:-1], score, prefix.log_prob, ended))


@finish.wrong_answer("What is finished has ended.", says="always True", subtle=True)
def _(self, prefix, *, ended):
    add_text(self, prefix, score_of(prefix, self.lp), ended=True)


@finish.wrong_answer("One text is wanted, so one is kept.", says="had finished before is lost")
def _(self, prefix, *, ended):
    score = score_of(prefix, self.lp)
    self.finished = [Hypothesis(prefix.tokens, score, prefix.log_prob, ended)]


# ── Search.is_done ────────────────────────────────────────────────────────────────────────────────
is_done = Exercise(
    "beam:Search.is_done", difficulty=2, minutes=15, lines=5,
    may_use="self.live, best first; self.finished, in any order; self.n_best; sorted.",
    example="""
        One text has the score -2. The best live prefix has log P = -6.
        >>> from tinyft.beam import Hypothesis, PowerPenalty, Prefix, Search
        >>> search = Search(2, 0, PowerPenalty(1.0), n_best=1)
        >>> search.finished = [Hypothesis((5, 0), -2.0, -4.0, True)]
        >>> search.live = [Prefix((7, 7), -6.0)]
        >>> is_done(search, 2.0)                                         # at best -6 / 2 = -3
        True
        >>> is_done(search, 4.0)                                         # at best -6 / 4 = -1.5
        False
        """,
    hints=(
        "log P of a prefix can only fall, since each further token adds a logarithm of at most 0. "
        "So the best score that it can reach is its present log P / reach.",
        "If the n_best-th of the finished scores is at least as good as that, no live prefix can "
        "come among the n_best. The best live prefix is self.live[0].",
        "Without a live prefix the answer is True. With fewer than n_best finished texts it is "
        "False. Else compare sorted(scores, reverse=True)[self.n_best - 1] with the bound."))


@st.composite
def a_moment(draw: Callable, several: bool = False, enough: bool = True):
    """Scores of finished texts, n_best, B, log P of the live prefixes, and reach."""
    n_best = draw(sizes()) + 1 if several else 1
    count = n_best + draw(st.integers(0, 2)) if enough else draw(st.integers(0, n_best - 1))
    scores = draw(st.permutations([-float(i) for i in range(1, count + 1)]))
    return named(scores=list(scores), n_best=n_best, beams=draw(st.integers(1, 3)),
                 reach=draw(st.sampled_from((2.0, 3.0, 0.5, 4.0))))


LIVE_LOG_PROBS = np.arange(1, 25) / -2.0


def done(scores, n_best, beams, reach, live, *, kth=None, how="divide", strict=False, worst=False,
         at_beams=False, at_first=False, fewer=False):
    """is_done for one state, with one error. live: log P of the prefixes, best first."""
    if at_beams:
        return len(scores) >= beams
    if at_first:
        return len(scores) >= 1
    if fewer and scores:
        n_best = min(n_best, len(scores))
    if len(scores) < n_best:
        return False
    ordered = sorted(scores, reverse=True)
    score = ordered[n_best - 1 if kth is None else kth]
    log_prob = live[-1 if worst else 0]
    bounds = {"divide": log_prob / reach, "multiply": log_prob * reach, "none": log_prob}
    return score > bounds[how] if strict else score >= bounds[how]


DONE_FAULTS = {
    "it is done when B texts have finished: a live prefix may still be better": {"at_beams": True},
    "it is done with the first finished text: a live prefix may still be better":
        {"at_first": True},
    "the live prefix is taken without its length penalty": {"how": "none"},
    "log P is multiplied with reach; it is divided by it": {"how": "multiply"},
    "the best finished score is compared; it is the n_best-th": {"kth": 0},
    "the worst finished score is compared; it is the n_best-th": {"kth": -1},
    "the worst live prefix is compared; it is the best one": {"worst": True},
    "a live prefix that can only reach the same score does not matter": {"strict": True},
    "with fewer than n_best finished texts it is not done": {"fewer": True},
}


def check_done(f, given, faults=DONE_FAULTS):
    scores, n_best, beams, reach = given
    states = [(log_prob, log_prob - 2) for log_prob in LIVE_LOG_PROBS]

    def run(function):
        return np.array([function(*state) for state in states])

    def answer(best, other):
        live = [Prefix((1,), best), Prefix((2,), other)]
        search = Search(beams, END, PowerPenalty(1.0), n_best, live=live)
        search.finished = [Hypothesis((END,), score, score, ended=True) for score in scores]
        out = f(search, reach)
        if not isinstance(out, (bool, np.bool_)):
            raise Unusable(f"is_done returns True or False; yours returned {type(out).__name__}")
        return bool(out)

    guesses = {}
    for words, fault in faults.items():
        guesses[words] = run(lambda *live, fault=fault: done(*given, live, **fault))
    want = run(lambda *live: done(*given, live))
    what = "is_done for live prefixes of log P = -0.5, -1, -1.5, ... -12"
    check(run(answer), want, what, guesses)


@is_done.law("done if no live prefix can reach the best finished score", given=a_moment())
def _(f, given):
    check_done(f, given)


@is_done.law("n_best texts are wanted: their last score counts", given=a_moment(several=True))
def _(f, given):
    check_done(f, given)


@is_done.law("not done with fewer than n_best finished texts",
             given=a_moment(several=True, enough=False))
def _(f, given):
    check_done(f, given)


@is_done.law("done if no prefix lives", given=a_moment())
def _(f, given):
    scores, n_best, beams, reach = given
    search = Search(beams, END, PowerPenalty(1.0), n_best, live=[])
    search.finished = [Hypothesis((END,), score, score, ended=True) for score in scores]
    close(f(search, reach), not search.live, "is_done without a live prefix", {
        "with no live prefix nothing can come any more": False})


def done_with(self, reach, **fault):
    """done for a Search."""
    if not self.live:
        return True
    scores = [h.score for h in self.finished]
    live = [prefix.log_prob for prefix in self.live]
    return done(scores, self.n_best, self.beams, reach, live, **fault)


@is_done.wrong_answer("B texts have finished, so the beam is full.", says="when B texts")
def _(self, reach):
    return done_with(self, reach, at_beams=True)


@is_done.wrong_answer("The first text that ends is the best one.", says="the first finished text")
def _(self, reach):
    return done_with(self, reach, at_first=True)


@is_done.wrong_answer("A finished score is compared with log P.", says="without its length penalty")
def _(self, reach):
    return done_with(self, reach, how="none")


@is_done.wrong_answer("A longer text is worse, so its log P grows with reach.",
                      says="is multiplied with reach")
def _(self, reach):
    return done_with(self, reach, how="multiply")


@is_done.wrong_answer("If the best text is found, the search is done.",
                      says="the best finished score", subtle=True)
def _(self, reach):
    return done_with(self, reach, kth=0)


@is_done.wrong_answer("Every finished text must be out of reach.", says="the worst finished score")
def _(self, reach):
    return done_with(self, reach, kth=-1)


@is_done.wrong_answer("The live prefixes are sorted like numbers: the best is the last.",
                      says="the worst live prefix")
def _(self, reach):
    return done_with(self, reach, worst=True)


@is_done.wrong_answer("A prefix that ties may still come first.", says="reach the same score")
def _(self, reach):
    return done_with(self, reach, strict=True)


@is_done.wrong_answer("Nothing lives, so nothing is done.", says="nothing can come", subtle=True)
def _(self, reach):
    return bool(self.live) and done_with(self, reach)


@is_done.wrong_answer("With fewer texts, the last of them counts.",
                      says="with fewer than n_best", subtle=True)
def _(self, reach):
    return done_with(self, reach, fewer=True)
