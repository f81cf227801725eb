"""Lesson 13: codes in a stream of bytes, and the windows of a text whose perplexity is measured."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from tinyft.array import asarray, asnumpy
from tinyft.learn.diagnose import Unusable, close
from tinyft.learn.exercise import Exercise
from tinyft.learn.sizes import draw_array, named, sizes

PACKING = "compress.packing:"


def check(got, want, what, guesses):
    """close with the dtype, and with the guesses that differ from the expected result."""
    wrong = {words: a for words, a in guesses.items() if not np.array_equal(a, want)}
    close(got, want, what, wrong, dtype=True)


@st.composite
def some_codes(draw: Callable, bits: tuple = (4, 2, 1), times: int = 1, columns: bool = False):
    """Codes (n,) or (n, columns), and their bits."""
    b = draw(st.sampled_from(bits))
    n = draw(st.integers(1, times * draw(sizes())))
    shape = (n, draw(sizes()) + 1) if columns else (n,)
    codes = draw_array(draw, shape, [*range(1, 2**b), 0], np.uint8)
    return named(codes=codes, bits=b)


def by_columns(pack_one: Callable):
    """A function of codes (n, ...) from one of codes (n,): the columns are independent."""
    def pack_all(codes, bits):
        flat = np.asarray(codes).reshape(len(codes), -1)
        streams = [pack_one(column.tolist(), bits) for column in flat.T]
        return np.array(streams, np.uint8).T.reshape(-1, *codes.shape[1:])
    return pack_all


@by_columns
def right_stream(codes, bits):
    number = sum(q << bits * k for k, q in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@by_columns
def high_bits_first(codes, bits):
    length = -(-len(codes) * bits // 8)
    number = 0
    for q in codes:
        number = number << bits | q
    return list((number << 8 * length - bits * len(codes)).to_bytes(length, "big"))


@by_columns
def whole_codes_in_a_byte(codes, bits):
    per_byte = 8 // bits
    out = [0] * -(-len(codes) // per_byte)
    for k, q in enumerate(codes):
        out[k // per_byte] |= q << bits * (k % per_byte)
    return out


@by_columns
def cut_at_the_byte(codes, bits):
    out = [0] * -(-len(codes) * bits // 8)
    for k, q in enumerate(codes):
        byte, shift = divmod(bits * k, 8)
        out[byte] |= q << shift & 255
    return out


@by_columns
def one_byte_each(codes, bits):
    return codes


@by_columns
def low_bits_in_the_next_byte(codes, bits):
    out = [0] * -(-len(codes) * bits // 8)
    for k, q in enumerate(codes):
        byte, shift = divmod(bits * k, 8)
        out[byte] |= q << shift & 255
        if shift + bits > 8:
            out[byte + 1] |= q & (1 << shift + bits - 8) - 1
    return out


def guessed_streams(codes, bits):
    """{mistake: result}"""
    return {"every code has a byte of its own": one_byte_each(codes, bits),
            "the first code is in the high bits of a byte; it belongs into the low ones":
                high_bits_first(codes, bits),
            "no code crosses the end of a byte, so bits stay unused": whole_codes_in_a_byte(
                codes, bits),
            "a code that crosses the end of a byte loses its high bits": cut_at_the_byte(
                codes, bits),
            "the next byte has got the low bits again; its bits are q >> (8 - shift)":
                low_bits_in_the_next_byte(codes, bits)}


# ── pack ──────────────────────────────────────────────────────────────────────────────────────────
pack = Exercise(
    f"{PACKING}pack", difficulty=4, minutes=30, lines=12, closed=(f"{PACKING}_period",),
    may_use="check_codes(codes, bits), which raises the errors; packed_length(n, bits), the number "
            "of bytes; xp(codes).zeros(shape, np.uint8), where xp(codes) is the module that made "
            "codes, NumPy or CuPy; divmod, <<, >> and |.  A loop over the codes is fine; the "
            "library's loop is over at most 8 codes, and treats all that lie alike at once.",
    example="""
        >>> pack(np.array([1, 2, 3, 4], np.uint8), 4)
        array([33, 67], dtype=uint8)
        >>> [f"{byte:08b}" for byte in pack(np.array([5, 3, 7], np.uint8), 3)]
        ['11011101', '00000001']
        """,
    hints=(
        "Code k begins at bit b k of the stream: byte, shift = divmod(bits * k, 8).",
        "codes[k] << shift puts it there.  In uint8 the bits that leave the byte are lost, which "
        "is right for this byte: stream[byte] |= codes[k] << shift.",
        "If shift + bits > 8, the rest goes into the next byte: stream[byte + 1] |= codes[k] >> "
        "(8 - shift).  First make the codes uint8 with astype(np.uint8)."))


def packed(f, codes, bits):
    out = f(codes, bits)
    check(out, right_stream(codes, bits), f"the stream of {bits}-bit codes",
          guessed_streams(codes, bits))


@pack.law("8 bits: every code is a byte", given=some_codes(bits=(8,)))
def _(f, given):
    packed(f, *given)


@pack.law("4, 2 and 1 bits: a byte holds 2, 4 or 8 codes, the first in its low bits",
          given=some_codes(times=2))
def _(f, given):
    packed(f, *given)


@pack.law("3, 5, 6 and 7 bits: a code may begin in one byte and end in the next",
          given=some_codes(bits=(3, 5, 6, 7), times=3))
def _(f, given):
    packed(f, *given)


@pack.law("the other axes hold independent streams", given=some_codes(bits=(4, 3), columns=True))
def _(f, given):
    packed(f, *given)


@pack.law("codes of other integers, such as int64, give uint8 as well",
          given=some_codes(bits=(4, 3)))
def _(f, given):
    codes, bits = given
    packed(f, codes.astype(np.int64), bits)


def refused(f, error, codes, bits, why):
    """f raises this error for these arguments."""
    try:
        f(codes, bits)
    except error:
        return
    raise Unusable(f"{why}: raise {error.__name__} (check_codes does)")


@pack.law("a code out of range and bits outside 1 ... 8 raise ValueError",
          bits=st.sampled_from((2, 3)))
def _(f, bits):
    refused(f, ValueError, np.array([2**bits]), bits, f"{2**bits} takes more than {bits} bits")
    refused(f, ValueError, np.array([-1]), bits, "-1 is no code")
    refused(f, ValueError, np.array([1]), 9, "9 bits are more than a byte")


@pack.law("codes that are no integers raise TypeError", bits=st.sampled_from((2, 3)))
def _(f, bits):
    refused(f, TypeError, np.array([1.0]), bits, "1.0 is a float")


def wrong_pack(make: Callable, checked: bool = True):
    """A wrong answer from a function on the host."""
    def pack(codes, bits):
        from tinyft.compress.packing import check_codes
        if checked:
            check_codes(codes, bits)
        return asarray(make(asnumpy(codes), bits))
    return pack


pack.wrong_answer("Every code takes a byte.", says="a byte of its own")(wrong_pack(one_byte_each))
pack.wrong_answer("The first code is the left one, in the high bits.",
                  says="belongs into the low ones")(wrong_pack(high_bits_first))
pack.wrong_answer("A code lies inside of one byte.", says="bits stay unused",
                  subtle=True)(wrong_pack(whole_codes_in_a_byte))
pack.wrong_answer("The bits that leave the byte are not needed.", says="loses its high bits",
                  subtle=True)(wrong_pack(cut_at_the_byte))
pack.wrong_answer("The next byte gets the bits that are left over, the low ones.",
                  says="got the low bits again", subtle=True)(wrong_pack(low_bits_in_the_next_byte))


@pack.wrong_answer("There is one stream, whatever the axes.", says="its shape is", subtle=True)
def _(codes, bits):
    from tinyft.compress.packing import check_codes
    check_codes(codes, bits)
    return asarray(right_stream(asnumpy(codes).reshape(-1), bits))


@pack.wrong_answer("The stream has the dtype of the codes.", says="dtype", subtle=True)
def _(codes, bits):
    from tinyft.compress.packing import check_codes
    check_codes(codes, bits)
    return asarray(right_stream(asnumpy(codes), bits).astype(codes.dtype))


@pack.wrong_answer("Whoever calls it gives codes of b bits.", says="takes more than", subtle=True)
def _(codes, bits):
    if codes.dtype.kind not in "iu":
        raise TypeError("no integers")
    return asarray(right_stream(asnumpy(codes).astype(int) % 2**bits, bits))


# ── unpack ────────────────────────────────────────────────────────────────────────────────────────
unpack = Exercise(
    f"{PACKING}unpack", difficulty=3, minutes=25, lines=12, closed=(f"{PACKING}_period",),
    may_use="check_stream(stream, bits, n), which raises the errors; xp(stream).empty(shape, "
            "np.uint8), where xp(stream) is the module that made the stream, NumPy or CuPy; "
            "divmod, <<, >>, | and &.  A loop over the codes is fine.",
    example="""
        >>> unpack(np.array([33, 67], np.uint8), 4, 3)
        array([1, 2, 3], dtype=uint8)
        >>> unpack(np.array([0b11011101, 0b00000001], np.uint8), 3, 3)
        array([5, 3, 7], dtype=uint8)
        """,
    hints=(
        "Code k begins at bit b k: byte, shift = divmod(bits * k, 8).  stream[byte] >> shift "
        "brings its first bit to the place 0.",
        "The bits of later codes come with it.  `& mask` removes them, with mask = (1 << bits) - 1."
        "  It keeps the lowest `bits` bits.",
        "If shift + bits > 8, the code goes on in the next byte: before the mask, "
        "q | stream[byte + 1] << (8 - shift)."))


def right_codes(stream, bits, n, mask=True, crosses=True):
    flat = np.asarray(stream).reshape(len(stream), -1)
    out = np.empty((n, flat.shape[1]), np.uint8)
    for k in range(n):
        byte, shift = divmod(bits * k, 8)
        q = flat[byte].astype(int) >> shift
        if crosses and shift + bits > 8:
            q = q | flat[byte + 1].astype(int) << 8 - shift
        out[k] = q & ((1 << bits) - 1 if mask else 255)
    return out.reshape(n, *stream.shape[1:])


def from_high_bits(stream, bits, n):
    flat = np.asarray(stream).reshape(len(stream), -1)
    out = np.empty((n, flat.shape[1]), np.uint8)
    for j, column in enumerate(flat.T):
        number = int.from_bytes(bytes(column.tolist()), "big")
        for k in range(n):
            out[k, j] = number >> 8 * len(column) - bits * (k + 1) & (1 << bits) - 1
    return out.reshape(n, *stream.shape[1:])


def all_codes(stream, bits, n):
    return right_codes(stream, bits, 8 * len(stream) // bits)


def guessed_codes(stream, bits, n):
    """{mistake: result}"""
    return {"the first code is read from the high bits of a byte; it is in the low ones":
                from_high_bits(stream, bits, n),
            "the bits of the codes behind it are still there: a mask is missing": right_codes(
                stream, bits, n, mask=False),
            "a code that crosses the end of a byte has lost its high bits": right_codes(
                stream, bits, n, crosses=False),
            "there are more than n codes: the last byte may be filled in part only": all_codes(
                stream, bits, n)}


def unpacked(f, codes, bits, stream=None):
    stream = right_stream(codes, bits) if stream is None else stream
    n = len(codes)
    check(f(stream, bits, n), codes, f"the codes of {bits} bits",
          guessed_codes(stream, bits, n))


@unpack.law("8 bits: every byte is a code", given=some_codes(bits=(8,)))
def _(f, given):
    unpacked(f, *given)


@unpack.law("4, 2 and 1 bits: the first code is in the low bits of its byte",
            given=some_codes(times=2))
def _(f, given):
    unpacked(f, *given)


@unpack.law("3, 5, 6 and 7 bits: a code may begin in one byte and end in the next",
            given=some_codes(bits=(3, 5, 6, 7), times=3))
def _(f, given):
    unpacked(f, *given)


@unpack.law("the other axes hold independent streams", given=some_codes(bits=(4, 3), columns=True))
def _(f, given):
    unpacked(f, *given)


@unpack.law("what stands behind the first n codes is left out", given=some_codes(bits=(4, 8, 3)),
            more=st.integers(1, 2))
def _(f, given, more):
    codes, bits = given
    stream = np.concatenate([right_stream(codes, bits), np.full(more, 255, np.uint8)])
    unpacked(f, codes, bits, stream)


@unpack.law("a stream that is too short raises ValueError, one of int64 TypeError",
            bits=st.sampled_from((4, 3)))
def _(f, bits):
    for error, stream, why in ((ValueError, np.zeros(1, np.uint8), f"1 byte holds no 5 codes of "
                                                                   f"{bits} bits"),
                               (TypeError, np.zeros(9, np.int64), "a stream is of uint8")):
        try:
            f(stream, bits, 5)
        except error:
            continue
        raise Unusable(f"{why}: raise {error.__name__} (check_stream does)")


def wrong_unpack(make: Callable, **settings):
    """A wrong answer from a function on the host."""
    def unpack(stream, bits, n):
        from tinyft.compress.packing import check_stream
        check_stream(stream, bits, n)
        return asarray(make(asnumpy(stream), bits, n, **settings))
    return unpack


unpack.wrong_answer("The first code is the left one, in the high bits.",
                    says="it is in the low ones")(wrong_unpack(from_high_bits))
unpack.wrong_answer("A shift to the right leaves the code alone.",
                    says="a mask is missing")(wrong_unpack(right_codes, mask=False))
unpack.wrong_answer("A code lies inside of one byte.", says="lost its high bits",
                    subtle=True)(wrong_unpack(right_codes, crosses=False))
unpack.wrong_answer("The number of codes follows from the length of the stream.",
                    says="more than n codes")(wrong_unpack(all_codes))


@unpack.wrong_answer("A stream has one axis.", says="its shape is", subtle=True)
def _(stream, bits, n):
    from tinyft.compress.packing import check_stream
    check_stream(stream, bits, n)
    return asarray(right_codes(asnumpy(stream), bits, n).reshape(n, -1)[:, 0])


@unpack.wrong_answer("Codes are whole numbers, so int64.", says="dtype")
def _(stream, bits, n):
    from tinyft.compress.packing import check_stream
    check_stream(stream, bits, n)
    return asarray(right_codes(asnumpy(stream), bits, n).astype(np.int64))


@unpack.wrong_answer("What is not there is 0.", says="holds no 5 codes", subtle=True)
def _(stream, bits, n):
    if stream.dtype != np.uint8:
        raise TypeError("no bytes")
    flat = asnumpy(stream)
    more = np.zeros((9, *flat.shape[1:]), np.uint8)
    return asarray(right_codes(np.concatenate([flat, more]), bits, n))


# ── window_batches ────────────────────────────────────────────────────────────────────────────────
window_batches = Exercise(
    "train.corpus:window_batches", difficulty=3, minutes=20, on_host=True, lines=8,
    may_use="np.stack(list of rows); slices; labels.astype(np.int64); IGNORE, the label (−100) of "
            "a position that does not count; yield.",
    example="""
        >>> tokens = np.array([11, 12, 13, 14, 15, 16])
        >>> first, second = window_batches(tokens, range(0, 3, 2), 4, new=2, batch_size=1)
        >>> first["ids"], first["labels"]
        (array([[11, 12, 13]]), array([[12, 13, 14]]))
        >>> second["ids"], second["labels"]
        (array([[13, 14, 15]]), array([[-100,   15,   16]]))
        """,
    hints=(
        "A window of `length` tokens has length − 1 inputs, all but its last token, and length − 1 "
        "labels, all but its first one.",
        "Take batch_size of the starts at a time, and stack tokens[start:start + length].  Labels "
        "before the last `new` ones become IGNORE: labels[:, :-new] = IGNORE.",
        "The very first window keeps all its labels, since nobody has predicted these tokens yet: "
        "in the first batch, write to labels[1:, :-new] instead.  labels wants to be a copy: "
        "rows[:, 1:].astype(np.int64)."))


@st.composite
def windows(draw: Callable, overlap: bool | None = None, most: int = 0):
    """tokens, starts, length, new and batch_size, as corpus_perplexity makes them."""
    length = draw(sizes()) + (2 if overlap else 1)
    stride = draw(st.integers(1, length - 2)) if overlap else length
    count = 1 if most else draw(sizes()) + 1
    batch_size = draw(st.sampled_from((1, 2, 3)))
    starts = range(0, stride * (count - 1) + 1, stride)
    tokens = np.arange(starts[-1] + length) + 11
    return named(tokens=tokens, starts=starts, length=length, new=min(stride, length - 1),
                 batch_size=batch_size)


def right_windows(tokens, starts, length, new, whole_first=True):
    rows = np.stack([tokens[start:start + length] for start in starts])
    labels = rows[:, 1:].copy()
    labels[int(whole_first):, :-new] = -100
    return rows, labels


def batches_of(f, given):
    found = list(f(*given))
    for batch in found:
        if not isinstance(batch, dict) or set(batch) != {"ids", "labels"}:
            raise Unusable("a batch should be a dict with 'ids' and 'labels'; "
                           f"yours is {batch!r:.60}")
    return found


def joined(f, given, name):
    parts = [np.asarray(batch[name]) for batch in batches_of(f, given)]
    if not parts:
        raise Unusable("it yields no batch")
    if len({part.shape[1:] for part in parts}) > 1:
        raise Unusable(f"the {name} of two batches have rows of different lengths")
    return np.concatenate(parts)


def check_windows(f, given):
    tokens, starts, length, new, size = given
    rows, labels = right_windows(*given[:4])
    close(joined(f, given, "ids"), rows[:, :-1], "the ids of all windows",
          {"the last token of a window has no label, so it is no input": rows})
    first_of_batches = labels.copy()
    first_of_batches[::size] = rows[::size, 1:]
    kept_first = rows[:, 1:].copy()
    kept_first[1:, new:] = -100
    guesses = {"the labels are the inputs; the label of a position is the token after it":
                   rows[:, :-1],
               "every window counts whole, so tokens in two windows count twice": rows[:, 1:],
               "the first window has lost labels: nobody else predicts its first tokens":
                   right_windows(*given[:4], whole_first=False)[1],
               "only the very first window counts whole, not the first one of every batch":
                   first_of_batches,
               "the first `new` labels count; the new tokens are the last ones": kept_first}
    close(joined(f, given, "labels"), labels, "the labels of all windows", guesses)


@window_batches.law("one window: the inputs are all tokens but the last, the labels all but the "
                    "first", given=windows(most=1))
def _(f, given):
    check_windows(f, given)


@window_batches.law("a batch has batch_size windows, the last one what remains", given=windows())
def _(f, given):
    count, size = len(given[1]), given[4]
    want = [min(size, count - first) for first in range(0, count, size)]
    got = [len(batch["ids"]) for batch in batches_of(f, given)]
    close(np.array(got), np.array(want), f"the windows of each batch, for batch_size {size}",
          {"the last batch is lost": want[:-1]})


@window_batches.law("windows without overlap: every label counts", given=windows())
def _(f, given):
    check_windows(f, given)


@window_batches.law("windows that overlap: only the first one counts whole, of the others the "
                    "last `new` labels", given=windows(overlap=True))
def _(f, given):
    check_windows(f, given)


@window_batches.law("the labels are int64", given=windows(overlap=True))
def _(f, given):
    tokens, *rest = given
    narrow = [tokens.astype(np.uint16), *rest]
    close(joined(f, narrow, "labels"), right_windows(*given[:4])[1].astype(np.int64),
          "the labels for tokens of uint16", dtype=True)


def wrong_windows(label_of: Callable):
    """A wrong answer from a function that returns the labels of a batch."""
    def window_batches(tokens, starts, length, new, batch_size):
        for first in range(0, len(starts), batch_size):
            chosen = starts[first:first + batch_size]
            rows = np.stack([tokens[start:start + length] for start in chosen])
            labels = label_of(rows.astype(np.int64), new, first == 0)
            yield {"ids": rows[:, :-1], "labels": labels}
    return window_batches


@window_batches.wrong_answer("The model shifts the labels itself.", says="the token after it")
@wrong_windows
def _(rows, new, is_first):
    labels = rows[:, :-1].copy()
    labels[int(is_first):, :-new] = -100
    return labels


@window_batches.wrong_answer("Every prediction counts.", says="count twice")
@wrong_windows
def _(rows, new, is_first):
    return rows[:, 1:]


@window_batches.wrong_answer("All windows are alike.", says="first window has lost labels")
@wrong_windows
def _(rows, new, is_first):
    labels = rows[:, 1:].copy()
    labels[:, :-new] = -100
    return labels


@window_batches.wrong_answer("The first window of a batch counts whole.",
                             says="not the first one of every batch")
@wrong_windows
def _(rows, new, is_first):
    labels = rows[:, 1:].copy()
    labels[1:, :-new] = -100
    return labels


@window_batches.wrong_answer("The new tokens are the first ones.", says="the last ones")
@wrong_windows
def _(rows, new, is_first):
    labels = rows[:, 1:].copy()
    labels[int(is_first):, new:] = -100
    return labels


@window_batches.wrong_answer("Only whole batches are given out.", says="the last batch is lost")
def _(tokens, starts, length, new, batch_size):
    rows, labels = right_windows(tokens, starts, length, new)
    for first in range(0, max(1, len(starts) - batch_size + 1), batch_size):
        rows_now = rows[first:first + batch_size, :-1]
        yield {"ids": rows_now, "labels": labels[first:first + batch_size].astype(np.int64)}


@window_batches.wrong_answer("Labels have the dtype of the tokens.", says="labels", subtle=True)
def _(tokens, starts, length, new, batch_size):
    rows, labels = right_windows(tokens.astype(np.int64), starts, length, new)
    labels = labels.astype(tokens.dtype)
    for first in range(0, len(starts), batch_size):
        last = first + batch_size
        yield {"ids": rows[first:last, :-1], "labels": labels[first:last]}
