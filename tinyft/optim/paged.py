"""A paged optimiser: its moments lie on disk or in host memory, and are beside the tensors for a moment only.

QLoRA: Efficient Finetuning of Quantized LLMs.  Dettmers et al. 2023, §3.  arXiv:2305.14314

    for each page of θ, g, m, v:      read m, v;    update θ, m, v;    write m, v

AdamW keeps two float32 moments a parameter, twice the memory of the float32 weights, and needs them once a step, for
the update.  The equations act on each element by itself, so an update page by page gives the same bits.

    optimizer = ft.Paged(ft.AdamW(1e-4))                           pages in a file of the system's temporary folder
    optimizer = ft.Paged(ft.AdamW(1e-4), resident=1 << 28)         the first 256 MiB of the moments stay in memory
    optimizer = ft.Paged(ft.AdamW(1e-4), pages="host")             for a model on a device: pages in host memory

Departures: in the paper the driver of a GPU moves pages between the device and the host when memory is short; here an
update reads and writes every page that is not resident.  Each page is used once a step, in order, so to keep the first
ones saves as many transfers as any choice can.
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
from ..tensor import Tensor
from .buffers import Piece
from .optimizers import SGD, Adam, AdamW, Optimizer

__all__ = ["Paged"]

PAGE = 1 << 20                                 # elements of a page
PLACES = ("disk", "host")


class Paged(Optimizer):
    """AdamW, Adam or SGD with paged moments.  Its updates are those of the optimiser itself, to the bit.

    optimizer   AdamW, Adam or SGD, not started
    resident    the bytes of moments that stay beside the tensors; the others are paged
    pages       "disk": a file without a name, which is gone when the optimiser is, or when the process ends, however it
                ends.  "host": host memory, for tensors on a device
    folder      of the file; None: the system's temporary folder, which may lie in memory (tmpfs)

    A state is that of the optimiser itself: a run goes on with it, paged or not.  TypeError for another optimiser."""

    def __init__(self, optimizer: Optimizer, resident: int = 0, pages: str = "disk",
                 folder: str | os.PathLike | None = None):
        """ValueError for a number of bytes below 0, for another place, and for a folder that is not there."""
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
        """The optimiser with its hyper-parameters, and where its moments are."""
        return f"Paged({self.optimizer!r}, resident={self.resident}, pages={self.pages!r})"

    @property
    def equations(self) -> Optimizer:
        """The optimiser without pages."""
        return self.optimizer

    def start(self, named: dict[str, Tensor]) -> Paged:
        """As Optimizer.start.  OSError if there is no room for the pages on the disk."""
        self.groups = self.make_groups(named)
        self.t = 0
        left = self.resident
        for group in self.groups:
            group.lay_out(0)
            for _ in self.moment_names:
                moment = PagedArray(group.w, left, self.pages, self.folder)
                left -= moment.kept * group.w.itemsize
                group.moments.append(moment)
        return self

    def update(self, piece: Piece, lr: float) -> None:
        """The optimiser's own update, page by page."""
        self.optimizer.t = self.t
        for part in pages_of(piece.moments):
            moments = [moment.read(part) for moment in piece.moments]
            self.optimizer.update(Piece(piece.w[part], piece.g[part], moments, piece.decay), lr)
            for moment, values in zip(piece.moments, moments):
                moment.write(part, values)

    def reclaim_tensors(self) -> None:
        """As Optimizer.reclaim_tensors; pages do not move to the tensors' device, what is resident does."""
        moments = [group.moments for group in self.groups]
        try:
            for group in self.groups:
                group.moments = []
            super().reclaim_tensors()
        finally:
            for group, of_group in zip(self.groups, moments):
                group.moments = of_group
        for group in self.groups:
            for moment in group.moments:
                moment.follow(group.w)

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """As Optimizer.load_state_dict."""
        super().load_state_dict(state)
        for group in self.groups:
            for moment in group.moments:
                moment.reload()

    def named_state(self) -> dict[str, Array]:
        """As Optimizer.named_state; the moments are views of the pages on the host."""
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
    """A flat array of zeros, as long as w and of its dtype: the first `kept` elements beside w, the others in pages.

    host        all elements on the host: a mapped file, or memory.  On the device of w, those that are kept have a copy
                in `head`, which is newer
    kept        the number of resident elements, at most `budget` bytes

    A slice of it is a Window.  OSError if the disk is full."""

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
        self.like = w[:0]                                          # shows the device

    def __getitem__(self, where: slice) -> Window:
        start, stop, _ = where.indices(self.size)
        return Window(self, start, stop)

    def __setitem__(self, where: slice, values: Array) -> None:
        window = self[where]
        for part in pages_of([window]):
            window.write(part, values[part])

    def read(self, start: int, stop: int) -> Array:
        """The elements on the device of w: views to be updated in place where they lie there, else copies."""
        if stop <= self.kept:
            return self.head[start:stop]
        return array.put_like(self.host[start:stop], self.like)

    def write(self, start: int, stop: int, values: Array) -> None:
        """Put back elements that were read, and let the system take a page of a file out of memory."""
        if stop <= self.kept:
            place = self.head[start:stop]
        else:
            place = self.host[start:stop]
            values = array.asnumpy(values)
        if not array.xp(place).may_share_memory(place, values):    # else they were updated where they lie
            place[...] = values
        if stop > self.kept and self.mapped is not None:
            release_pages(self.mapped, start * self.host.itemsize, stop * self.host.itemsize)

    def follow(self, w: Array) -> None:
        """Move the resident elements to the device of w."""
        if type(w) is not type(self.like):
            self.head = array.put_like(array.asnumpy(self.head), w)
            self.like = w[:0]

    def flush(self) -> np.ndarray:
        """All elements on the host, up to date."""
        self.host[:self.kept] = array.asnumpy(self.head)
        return self.host

    def reload(self) -> None:
        """Take the resident elements from the host, after these were written to."""
        self.head[...] = array.put_like(self.host[:self.kept], self.head)


class Window:
    """A stretch of a PagedArray, in place of a view: what it holds is read when it is needed."""

    def __init__(self, whole: PagedArray, start: int, stop: int):
        self.whole = whole
        self.start = start
        self.stop = stop

    def read(self, part: slice) -> Array:
        """Elements of the window, as PagedArray.read."""
        return self.whole.read(self.start + part.start, self.start + part.stop)

    def write(self, part: slice, values: Array) -> None:
        """Put back elements of the window that were read."""
        self.whole.write(self.start + part.start, self.start + part.stop, values)

    def copy(self) -> Array:
        """All elements, beside w."""
        m = array.xp(self.whole.like)
        parts = [self.read(part) for part in pages_of([self])]
        return m.concatenate(parts) if parts else self.whole.like.copy()


def pages_of(windows: list[Any]) -> Iterator[slice]:
    """The stretches of some windows of one place that are updated at a time.

    A stretch lies in one page, and in the resident part of every array or outside it."""
    first = windows[0]
    kept = {window.whole.kept for window in windows}
    for part in cut_into_pages(first.start, first.stop, PAGE, kept):
        yield slice(part.start - first.start, part.stop - first.start)


def cut_into_pages(start: int, stop: int, page: int, kept: Iterable[int] = ()) -> list[slice]:
    """The elements start ... stop − 1 as slices, in order. None is empty, and none reaches into a second page.

    Page k has the elements k page ... (k + 1) page − 1 of the whole array, counted from 0 and not from `start`.
    kept: the first `kept` elements of an array are resident, and no slice has both resident and paged ones."""
    parts = []
    while start < stop:
        page_end = (start // page + 1) * page
        end = min([stop, page_end, *(k for k in kept if k > start)])
        parts.append(slice(start, end))
        start = end
    return parts


def map_file(nbytes: int, folder: str | os.PathLike | None) -> mmap.mmap:
    """A file of zeros, mapped into memory.  It has no name, and is gone with the mapping.

    OSError if the disk has no room for it: a mapping that finds the disk full would end the process."""
    with tempfile.TemporaryFile(dir=folder) as file:
        reserve(file.fileno(), nbytes)
        return mmap.mmap(file.fileno(), nbytes)


def reserve(descriptor: int, nbytes: int) -> None:
    """Make an open file so many bytes long, with room on the disk where the system can reserve it."""
    if hasattr(os, "posix_fallocate"):                             # not on macOS and Windows
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        os.ftruncate(descriptor, nbytes)


def release_pages(mapped: mmap.mmap, start: int, stop: int) -> None:
    """Take the whole pages between two bytes of a mapped file out of the process's memory.  The file keeps them."""
    size = mmap.PAGESIZE
    start = -(-start // size) * size
    stop = stop // size * size
    advice = getattr(mmap, "MADV_DONTNEED", None)                  # None on Windows
    if stop > start and advice is not None:
        with contextlib.suppress(OSError):
            mapped.madvise(advice, start, stop - start)
