"""Files that are written whole or not at all, also if the process is killed.

    write_atomically    writes one file, or several files of a folder that belong together
    read_together       reads files that belong together, never half of one saving and half of another
    sweep               removes the temporary files that killed processes left

One file is replaced by a rename. Several files have a journal: while they are replaced, the hidden file JOURNAL lists
them, and each old file has a second name. A process that is killed at this moment leaves the journal behind, and the
next reader or writer moves the old files back. Programs that know no journal see no mixture either: the last of the
files, such as config.json, is missing from the first change to the last.

A living writer holds a lock (flock) on its temporary files and on the journal. The system releases the lock when the
process ends; a server of NFS does so for all hosts that share the folder. On a file system without locks, a file counts
as left by a killed process once it has not changed for STALE seconds.
"""
from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

try:
    import fcntl
except ImportError:                                      # Windows
    fcntl = None

__all__ = ["is_file_name", "read_together", "recover", "sweep", "write_atomically"]

JOURNAL = ".tinyft-journal"
LARGEST_JOURNAL = 1 << 20                                # bytes
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.tinyft")     # .config.json.1b2c3d4e.tinyft
SECOND_NAME = re.compile(r"\..*\.[0-9a-f]{8}\.tinyft-old")
STALE = 3600.0                                           # seconds
WAIT = 10.0                                              # seconds to wait for another process that replaces files
ATTEMPTS = 50                                            # of read_together, while other processes write

T = TypeVar("T")


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def write_atomically(files: Mapping[str | os.PathLike, bytes]) -> None:
    """Write files of one folder, all or none, also if the disk is full, or if the process is stopped or killed.

    files: {path: content}. The folder is made if it is missing. Of several files the last one is missing while the
    others are replaced, so it should be the one that other programs read first. All are on the disk at the end.

    OSError, in one sentence, if the files cannot be written. After any exception every file is as it was.
    """
    content = {Path(path): data for path, data in files.items()}
    folders = {path.parent for path in content}
    if len(folders) != 1:
        raise ValueError(f"write_atomically wants files of one folder, got files of {len(folders)} folders")
    (folder,) = folders
    path = folder
    try:
        with _folder(folder) as made, contextlib.ExitStack() as stack:
            recover(folder)
            sweep(*content)
            new = {}
            for path, data in content.items():
                new[path] = stack.enter_context(_temporary(path, data))
            for new_folder in made:
                _flush(new_folder.parent)
            _replace(folder, new)
    except OSError as e:
        number = e.errno or errno.EIO
        reason = e.strerror or e
        raise OSError(number, f"could not write {path} ({reason}); what was there before is untouched") from e


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[list[Path]]:
    """Make a folder and those above it; gives those that were missing. They stay unless the body raises."""
    missing = []
    existing = folder
    while not existing.exists():
        missing.append(existing)
        existing = existing.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield missing
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):           # another process has written a file there
                path.rmdir()
        raise


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """The path of a new hidden file beside `path` with this content, for the length of a `with`.

    The content is on the disk. The file is locked, so `sweep` in another process leaves it alone."""
    beside, file = _create(path)
    try:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if fcntl is None:                                # Windows moves no open file
            file.close()
        yield beside
    finally:
        beside.unlink(missing_ok=True)
        with contextlib.suppress(OSError):               # a full disk raises a second time
            file.close()


def _create(path: Path) -> tuple[Path, BinaryIO]:
    """(path, open file) of a new, locked, empty temporary file beside `path`."""
    while True:
        beside = _beside(path)
        file = open(beside, "xb")                        # x: raises if the name exists
        if _lock(file.fileno()) is not False and _is_at(file.fileno(), beside):
            return beside, file
        file.close()                                     # a sweep took the file before it was locked


def _beside(path: Path) -> Path:
    """A new hidden name beside a file, with the beginning of its name: a name has at most 255 bytes."""
    return path.with_name(f".{path.name[:50]}.{os.urandom(4).hex()}.tinyft")


def _replace(folder: Path, new: Mapping[Path, Path]) -> None:
    """Replace files of one folder, {path: temporary file with the new content}, all or none."""
    *others, last = new
    if not others:
        os.replace(new[last], last)
        _flush(folder)
        return
    with _journal(folder) as descriptor:
        second_names = {}
        for path in new:
            second = f"{_beside(path).name}-old"
            second_names[path.name] = second if os.path.lexists(path) else None
        _write(descriptor, b"open\n" + json.dumps(second_names).encode() + b"\n")
        for name, second in second_names.items():
            if second is not None:
                _keep(folder / name, folder / second)
        _flush(folder)
        last.unlink(missing_ok=True)
        for path in new:
            os.replace(new[path], path)
        _flush(folder)
        _write(descriptor, b"done")


def _keep(path: Path, second: Path) -> None:
    """Give a file a second name, or copy it."""
    try:
        os.link(path, second)
    except OSError:                                      # a file system without links
        copy = _beside(path)                             # `sweep` removes it after a kill
        try:
            shutil.copy2(path, copy, follow_symlinks=False)
            os.replace(copy, second)                     # whole or not at all: _settle may move it back
        finally:
            copy.unlink(missing_ok=True)


def _write(descriptor: int, data: bytes) -> None:
    """Write data over the beginning of an open file, and flush it to the disk."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(descriptor)


def _flush(folder: Path) -> None:
    """Flush the names in a folder to the disk: a rename is safe from a power failure only then."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:                                      # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:                                      # some file systems cannot; the content is on the disk anyway
        pass
    finally:
        os.close(descriptor)


# ── locks and leftovers ──────────────────────────────────────────────────────────────────────────────────────────────
def _lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed: True if that worked, False if another process holds it.

    None if the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _take(descriptor: int) -> bool:
    """True if no living process holds an open file. The file is locked then, where there are locks."""
    locked = _lock(descriptor)
    if locked is None:
        return time.time() - os.fstat(descriptor).st_mtime > STALE
    return locked


def _is_at(descriptor: int, path: Path) -> bool:
    """True if the open file is still the one of this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _open(path: Path, flags: int) -> int:
    """A descriptor of an ordinary file. Follows no link, and does not wait for a pipe. OSError for anything else."""
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path.name} is no ordinary file")
    return descriptor


def sweep(*paths: str | os.PathLike) -> None:
    """Remove the temporary files that killed processes left beside these files. Those of living processes stay."""
    files = [Path(path) for path in paths]
    earlier = re.compile("|".join(rf"\.{re.escape(file.name)}\.[0-9a-f]{{8}}" for file in files))
    for folder in {file.parent for file in files}:
        names = os.listdir(folder) if folder.is_dir() else []
        for name in names:
            if TEMPORARY.fullmatch(name) or earlier.fullmatch(name):
                with contextlib.suppress(OSError):       # another process removes the file too, or owns it
                    _remove_if_left(folder / name)


def _remove_if_left(path: Path) -> None:
    """Remove a temporary file, unless a living process holds it."""
    descriptor = _open(path, os.O_RDWR)
    try:
        if _take(descriptor):
            path.unlink()
    finally:
        os.close(descriptor)


# ── the journal ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Content: "open" or "done", a line break, and a line of JSON, {name of a file: second name of the old one, or null}.
# "open" is written before the first change, "done" after the last. A line of JSON that is cut off means no change yet.
@contextlib.contextmanager
def _journal(folder: Path) -> Iterator[int]:
    """The descriptor of the folder's journal, locked and empty, for the length of a `with`.

    At its end all changes are undone, unless the journal says "done". What a killed process left is settled first."""
    path = folder / JOURNAL
    descriptor = _lock_journal(path)
    try:
        _settle(folder, descriptor)
        try:
            yield descriptor
        except BaseException:
            _write(descriptor, b"open")                  # even after "done": the caller is told that nothing changed
            raise
        finally:
            _settle(folder, descriptor)
            path.unlink()
    finally:
        os.close(descriptor)


def _lock_journal(path: Path) -> int:
    """The descriptor of a journal, new or old, locked. TimeoutError if another process holds it for WAIT seconds."""
    deadline = time.monotonic() + WAIT
    while True:
        try:
            descriptor = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            is_free = _lock(descriptor) is not False
        except FileExistsError:
            try:
                descriptor = _open(path, os.O_RDWR)
            except FileNotFoundError:
                continue
            is_free = _take(descriptor)
        if is_free and _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, "another process is writing to this folder")
        time.sleep(0.01)


def _settle(folder: Path, descriptor: int) -> None:
    """Undo the changes that an open journal lists, or remove the old files of one that is done; then empty it."""
    state, second_names = _read_journal(descriptor)
    for name, second in second_names.items():
        path = folder / name
        if state == b"open" and second is None:          # there was no such file
            path.unlink(missing_ok=True)
        elif state == b"open" and os.path.lexists(folder / second):
            os.replace(folder / second, path)            # does nothing if both are names of one file
        if second is not None:
            (folder / second).unlink(missing_ok=True)
    os.ftruncate(descriptor, 0)


def _read_journal(descriptor: int) -> tuple[bytes, dict[str, str | None]]:
    """(b"open" or b"done", {name: second name}) of a journal; (b"done", {}) for one that lists no change."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    state, _, line = os.read(descriptor, LARGEST_JOURNAL).partition(b"\n")
    try:
        second_names = json.loads(line) if line.endswith(b"\n") else {}
    except (ValueError, RecursionError):
        second_names = {}
    if state not in (b"open", b"done") or not isinstance(second_names, dict):
        return b"done", {}
    for name, second in second_names.items():            # names inside the folder only, whoever wrote the journal
        is_second = second is None or (isinstance(second, str) and SECOND_NAME.fullmatch(second))
        if not is_second or not is_file_name(name) or not is_file_name(second or name):
            return b"done", {}
    return state, second_names


def is_file_name(name: Any) -> bool:
    """True for a bare file name, with no path that leads to another folder, and of a length that systems accept."""
    if not isinstance(name, str) or not name.isprintable() or len(name.encode(errors="replace")) > 255:
        return False
    return name not in ("", ".", "..") and not {"/", "\\", os.sep} & set(name)


def recover(folder: Path) -> None:
    """Undo the changes of a killed process that was replacing files of this folder.

    Waits while a living process replaces them. OSError if the folder cannot be written."""
    try:
        if _is_changing(folder):
            with _journal(folder):                       # settles what the journal lists
                pass
    except OSError as e:
        reason = e.strerror or e
        raise OSError(e.errno, f"{folder} holds half of a saving, which could not be undone ({reason})") from e


def _is_changing(folder: Path) -> bool:
    """True if the folder has a journal with changes that are not done."""
    try:
        descriptor = _open(folder / JOURNAL, os.O_RDONLY)
    except OSError:                                      # none, or something else under its name
        return False
    try:
        state, _ = _read_journal(descriptor)
        return state == b"open"
    finally:
        os.close(descriptor)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_together(folder: Path, last: str, read: Callable[[], T]) -> T:
    """read(), for a function that reads several files of a folder: all are of one saving.

    last: the name of the file that write_atomically writes last. If it was replaced meanwhile, all are read again."""
    for _ in range(ATTEMPTS):
        recover(folder)
        before = _identify(folder / last)
        try:
            result = read()
        except (OSError, ValueError):
            if before == _identify(folder / last) and not _is_changing(folder):
                raise
        else:
            if before == _identify(folder / last):
                return result
    raise TimeoutError(errno.ETIMEDOUT, f"{folder} was written by another process all the time")


def _identify(path: Path) -> tuple[int, ...] | None:
    """Facts that differ from file to file; None if there is none."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
