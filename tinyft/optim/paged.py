"""A paged optimiser: its moments are stored on disk or in host memory, and an update loads one page at a time.

QLoRA: Efficient Finetuning of Quantized LLMs.  Dettmers et al. 2023, §3.  arXiv:2305.14314

    for each page of θ, g, m, v:      read m, v;    update θ, m, v;    write m, v

AdamW stores two float32 moments for each parameter: twice the memory of the float32 weights.  A step uses them once, in
the update.  The equations act on each element by itself, so an update page by page gives the same bits.

    optimizer = ft.Paged(ft.AdamW(1e-4))                           pages in a file of the system's temporary folder
    optimizer = ft.Paged(ft.AdamW(1e-4), resident=1 << 28)         the first 256 MiB of the moments stay in memory
    optimizer = ft.Paged(ft.AdamW(1e-4), pages="host")             for a model on a device: pages in host memory

Departures: in the paper the driver of a GPU moves pages between the device and the host when memory is short; here an
update reads and writes every page that is not resident.  A step uses every page once, in order.  So it does not matter
which pages are resident, only how many: the first ones are.
"""
from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .. import array, checks
from ..array import Array
from ..keywords import checked_keywords
from ..tensor import Tensor
from .buffers import Piece
from .optimizers import SGD, Adam, AdamW, Optimizer

__all__ = ["Paged"]

PAGE = 1 << 20                                 # elements of a page
PLACES = ("disk", "host")


@checked_keywords
class Paged(Optimizer):
    """AdamW, Adam or SGD with paged moments.  Its updates are those of the optimiser itself, to the bit.

    optimizer   AdamW, Adam or SGD, before its `start`
    resident    at most so many bytes of the moments stay on the device of the tensors; the others are paged
    pages       "disk": in a file without a name, which is deleted with the optimiser or at the end of the process, even
                if it is killed.  "host": in host memory, for tensors on a device
    folder      in which the file is created; None: the system's temporary folder, which may be in memory (tmpfs)

    state_dict is that of the optimiser itself: a run can be resumed from it with or without pages."""

    def __init__(self, optimizer: Optimizer, resident: int = 0, pages: str = "disk",
                 folder: str | os.PathLike | None = None):
        """TypeError for another optimiser.  ValueError for resident < 0, for other pages than "disk" and "host", and
        for a folder that does not exist."""
        if type(optimizer) not in (AdamW, Adam, SGD):
            raise TypeError(f"Paged wants AdamW, Adam or SGD, got {checks.brief(optimizer)}")
        super().__init__(optimizer.lr, optimizer.weight_decay, optimizer.rules)
        self.optimizer = optimizer
        self.moment_names = optimizer.moment_names
        self.resident = checks.whole("Paged: resident", resident, least=0)
        self.pages = checks.one_of("Paged: pages", pages, PLACES)
        if folder is not None:
            checks.instance("Paged: folder", folder, (str, os.PathLike), "the path of a folder")
            if not os.path.isdir(folder):
                raise ValueError(f"Paged: folder wants a folder that is there, got {checks.brief(os.fspath(folder))}")
        self.folder = folder

    def __repr__(self) -> str:
        """The optimiser with its hyper-parameters, and the place of its moments."""
        return f"Paged({self.optimizer!r}, resident={self.resident}, pages={self.pages!r})"

    @property
    def equations(self) -> Optimizer:
        """The optimiser without pages."""
        return self.optimizer

    def start(self, named: dict[str, Tensor]) -> Paged:
        """As Optimizer.start.  OSError if the disk has no room for the pages."""
        self.groups = self.make_groups(named)
        self.t = 0
        left = self.resident                                       # bytes that may still stay resident
        for group in self.groups:
            group.lay_out(0)                                       # no moments: they are added here
            for _ in self.moment_names:
                moment = PagedArray(group.w, left, self.pages, self.folder)
                left -= moment.kept * group.w.itemsize
                group.moments.append(moment)
        return self

    def update(self, piece: Piece, lr: float) -> None:
        """The update of the optimiser itself, page by page.  The moments of the piece are Windows."""
        self.optimizer.t = self.t
        for part in pages_of(piece.moments):
            moments = [moment.read(part) for moment in piece.moments]
            self.optimizer.update(Piece(piece.w[part], piece.g[part], moments, piece.decay), lr)
            for moment, values in zip(piece.moments, moments):
                moment.write(part, values)

    def reclaim_tensors(self) -> None:
        """As Optimizer.reclaim_tensors.  Resident moments follow the tensors to another device; pages do not move."""
        paged = [group.moments for group in self.groups]
        try:
            for group in self.groups:
                group.moments = []                                 # a group would move them as ordinary arrays
            super().reclaim_tensors()
        finally:
            for group, moments in zip(self.groups, paged):
                group.moments = moments
        for group in self.groups:
            for moment in group.moments:
                moment.follow(group.w)

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """As Optimizer.load_state_dict."""
        super().load_state_dict(state)
        for group in self.groups:
            for moment in group.moments:
                moment.reload()                                    # the state was written to the host

    def named_state(self) -> dict[str, Array]:
        """As Optimizer.named_state, but the moments are host arrays: views of the pages, up to date."""
        paged = [group.moments for group in self.groups]
        try:
            for group, moments in zip(self.groups, paged):
                group.moments = [moment.flush() for moment in moments]
            return super().named_state()
        finally:
            for group, moments in zip(self.groups, paged):
                group.moments = moments


# ── storage ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class PagedArray:
    """A flat array with the size and dtype of w, zeros at first.  The first `kept` elements are resident on the device
    of w; the others are read from pages on the host, and written back.

    kept    the number of resident elements: as many as `budget` bytes hold, at most all
    head    (kept,) on the device of w: the resident elements.  A view of `host` if w is on the host
    host    (size,): a mapped file if `pages` is "disk", else host memory.  Holds all elements, but on a device its
            first `kept` are out of date until flush()
    like    an empty array on the device of w

    a[start:stop] is a Window.  OSError if the disk has no room."""

    def __init__(self, w: Array, budget: int, pages: str, folder: str | os.PathLike | None = None):
        self.size = w.size
        self.kept = min(w.size, max(budget, 0) // w.itemsize)
        self.mapped = None
        if pages == "disk" and w.size > self.kept:
            self.mapped = map_file(w.nbytes, folder)
            self.host = np.frombuffer(self.mapped, w.dtype)
        else:
            self.host = np.zeros(w.size, w.dtype)
        self.head = array.put_like(self.host[:self.kept], w)
        self.like = w[:0]

    def __getitem__(self, where: slice) -> Window:
        start, stop, _ = where.indices(self.size)
        return Window(self, start, stop)

    def __setitem__(self, where: slice, values: Array) -> None:
        window = self[where]
        for part in pages_of([window]):
            window.write(part, values[part])

    def read(self, start: int, stop: int) -> Array:
        """The elements start ... stop − 1 on the device of w, to be updated in place and passed to `write`.

        They are all resident or all paged.  They are a view, or a copy if they are paged and w is on a device."""
        if stop <= self.kept:
            return self.head[start:stop]
        return array.put_like(self.host[start:stop], self.like)

    def write(self, start: int, stop: int, values: Array) -> None:
        """Store the elements start ... stop − 1, as `read` gave them or new ones.

        If they are in a mapped file, the system may then remove them from memory."""
        if stop <= self.kept:
            place = self.head[start:stop]
        else:
            place = self.host[start:stop]
            values = array.asnumpy(values)
        if not array.xp(place).may_share_memory(place, values):    # a view was updated in place already
            place[...] = values
        if stop > self.kept and self.mapped is not None:
            release_pages(self.mapped, start * self.host.itemsize, stop * self.host.itemsize)

    def follow(self, w: Array) -> None:
        """Move the resident elements to the device of w, if it is another one than before."""
        if type(w) is not type(self.like):
            self.head = array.put_like(array.asnumpy(self.head), w)
            self.like = w[:0]

    def flush(self) -> np.ndarray:
        """All elements on the host, (size,), up to date: not a copy."""
        self.host[:self.kept] = array.asnumpy(self.head)
        return self.host

    def reload(self) -> None:
        """Copy the resident elements from `host` to `head`, after somebody wrote to `host`."""
        self.head[...] = array.put_like(self.host[:self.kept], self.head)


class Window:
    """The elements start ... stop − 1 of a PagedArray, `whole`.  It stands for a view, but reads only on demand."""

    def __init__(self, whole: PagedArray, start: int, stop: int):
        self.whole = whole
        self.start = start
        self.stop = stop

    def read(self, part: slice) -> Array:
        """A part of the window, as PagedArray.read; `part` counts from the start of the window."""
        return self.whole.read(self.start + part.start, self.start + part.stop)

    def write(self, part: slice, values: Array) -> None:
        """Store a part of the window, as PagedArray.write."""
        self.whole.write(self.start + part.start, self.start + part.stop, values)

    def copy(self) -> Array:
        """A copy of all elements, on the device of w."""
        m = array.xp(self.whole.like)
        parts = [self.read(part) for part in pages_of([self])]
        return m.concatenate(parts) if parts else self.whole.like.copy()


def pages_of(windows: list[Any]) -> Iterator[slice]:
    """The parts in which windows are updated, as slices that count from the start of a window.

    The windows have the same start and stop, in arrays of one size.  A part is within one page, and in each array its
    elements are all resident or all paged."""
    first = windows[0]
    kept = {window.whole.kept for window in windows}
    for part in cut_into_pages(first.start, first.stop, PAGE, kept):
        yield slice(part.start - first.start, part.stop - first.start)


def cut_into_pages(start: int, stop: int, page: int, kept: Iterable[int] = ()) -> list[slice]:
    """The elements start ... stop − 1 as slices, in order. None is empty, and none reaches into a second page.

    page   the elements of a page: page k has k·page ... (k + 1)·page − 1, counted from 0 and not from `start`
    kept   a number for each array: its first so many elements are resident. No slice has both resident and paged ones
           of an array"""
    parts = []
    while start < stop:
        page_end = (start // page + 1) * page
        end = min([stop, page_end, *(k for k in kept if k > start)])
        parts.append(slice(start, end))
        start = end
    return parts


def map_file(nbytes: int, folder: str | os.PathLike | None) -> mmap.mmap:
    """A file of zeros, mapped into memory.  It has no name, and is deleted with the mapping.

    OSError if the disk has no room for it.  So the room is reserved at once: a write to a mapping on a full disk would
    end the process."""
    with tempfile.TemporaryFile(dir=folder) as file:
        reserve(file.fileno(), nbytes)
        return mmap.mmap(file.fileno(), nbytes)


def reserve(descriptor: int, nbytes: int) -> None:
    """Set the length of an open file to `nbytes`, and reserve the room on the disk if the system can."""
    if hasattr(os, "posix_fallocate"):                             # not on macOS and Windows
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        os.ftruncate(descriptor, nbytes)


def release_pages(mapped: mmap.mmap, start: int, stop: int) -> None:
    """Remove the system's pages between two bytes of a mapped file from the process's memory.  The file keeps them.

    A page that is only partly between them stays, as its other bytes may be in use."""
    size = mmap.PAGESIZE
    start = -(-start // size) * size                               # up to the next page
    stop = stop // size * size                                     # down to the page before
    advice = getattr(mmap, "MADV_DONTNEED", None)                  # None on Windows
    if stop > start and advice is not None:
        with contextlib.suppress(OSError):                         # it is advice: without it only memory is lost
            mapped.madvise(advice, start, stop - start)
