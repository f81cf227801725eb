"""Files that belong together: processes killed at every system call, stopped ones, full disks, readers and writers."""
from __future__ import annotations

import errno
import functools
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tinyft import atomic
from tinyft.atomic import JOURNAL, read_together, sweep, write_atomically

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),       # a child here runs no thread
]

OLD = {"weights": b"old weights", "tokenizer": b"old tokenizer", "config": b"old"}
NEW = {"weights": b"new weights, longer", "extra": b"new file", "config": b"new"}
CALLS = ("open", "write", "fsync", "link", "replace", "unlink", "ftruncate", "mkdir", "lseek")

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """These tests do not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def paths(folder: Path, files: Files) -> dict[Path, bytes]:
    return {folder / name: data for name, data in files.items()}


def visible(folder: Path) -> Files:
    """{name: content} of the files that are not hidden."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def after(old: Files, new: Files) -> Files:
    """The content of a folder after both were written."""
    return dict(sorted({**old, **new}.items()))


def in_child(f: Callable[[], None]) -> int:
    """Run f in a forked process; return the process's id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            f()
            code = 0
        finally:
            os._exit(code)
    return process


def outcome(process: int) -> int:
    """The exit status of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def write_in_child(files: dict[Path, bytes], number: int, sent: signal.Signals) -> int:
    """Start a child that writes the files and gets a signal in front of its system call of this number."""
    return in_child(lambda: with_signal(number, sent, functools.partial(write_atomically, files)))


def with_signal(number: int, sent: signal.Signals, f: Callable[[], None]) -> None:
    """Run f; in front of its system call of this number the process gets the signal."""
    calls = iter(range(1, 10_000))

    def wrapped(real: Callable) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), sent)
            return real(*arguments, **named)
        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    f()


def kills(write: Callable[[], None], prepare: Callable[[], Path]) -> Iterator[tuple[int, Path]]:
    """(number, folder) for every system call of `write`: a child was killed in front of it, in a prepared folder."""
    number = 1
    while True:
        folder = prepare()
        code = outcome(in_child(lambda: with_signal(number, signal.SIGKILL, write)))
        if code == 0:
            assert number > 1
            return
        assert code == -signal.SIGKILL
        yield number, folder
        number += 1


def one_after_the_other(files: dict[Path, bytes]) -> None:
    """A wrong writer: it replaces the files one after the other."""
    for path, data in files.items():
        beside = path.with_name(f".{path.name}")
        beside.write_bytes(data)
        os.replace(beside, path)


def count_mixtures(writer: Callable[[dict[Path, bytes]], None], folder: Path, read: Callable[[Path], Files]) -> int:
    """The number of system calls of the writer at which a kill leaves neither the old files nor the new ones."""
    def prepare() -> Path:
        for path in folder.iterdir():
            path.unlink()
        for path, data in paths(folder, OLD).items():
            path.write_bytes(data)
        return folder

    found = 0
    for _ in kills(lambda: writer(paths(folder, NEW)), prepare):
        found += read(folder) not in (after(OLD, {}), after(OLD, NEW))
    return found


def read_whole(folder: Path) -> Files:
    return read_together(folder, "config", lambda: visible(folder))


def read_by_name(folder: Path) -> Files:
    """The files as a program reads them that knows no journal: without a config it reads nothing."""
    found = visible(folder)
    return found if "config" in found else after(OLD, {})


@pytest.mark.parametrize("read", [read_whole, read_by_name])
def test_a_kill_at_any_system_call_leaves_the_old_files_or_the_new_ones(read, tmp_path):
    """For our readers, and for programs that know no journal. Writing one file after the other fails both."""
    assert count_mixtures(write_atomically, tmp_path, read) == 0
    assert count_mixtures(one_after_the_other, tmp_path, read) > 0


@pytest.mark.parametrize("links", [True, False])
def test_the_next_writer_finishes_what_a_kill_left(links, tmp_path, monkeypatch):
    """The folder holds the last files and nothing else, also on a file system without links."""
    if not links:
        monkeypatch.setattr(os, "link", raise_permission)

    def prepare() -> Path:
        write_atomically(paths(tmp_path, OLD))
        return tmp_path

    last = {"weights": b"last weights", "config": b"last"}
    left = 0
    for _ in kills(lambda: write_atomically(paths(tmp_path, NEW)), prepare):
        left += bool(hidden(tmp_path))
        write_atomically(paths(tmp_path, last))
        assert visible(tmp_path) in (after(OLD, last), after({**OLD, "extra": NEW["extra"]}, last))
        assert hidden(tmp_path) == []
        (tmp_path / "extra").unlink(missing_ok=True)
    assert left > 5, "a kill in the middle leaves something behind"


def raise_permission(*_: Any) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_a_reader_that_is_killed_while_it_undoes_leaves_that_to_the_next_one(tmp_path):
    numbers = [1]                                        # the last is that of a system call in the middle of the moves

    def prepare() -> Path:
        while True:
            write_atomically(paths(tmp_path, OLD))
            (tmp_path / "extra").unlink(missing_ok=True)
            outcome(write_in_child(paths(tmp_path, NEW), numbers[-1], signal.SIGKILL))
            if not (tmp_path / "config").exists():
                return tmp_path
            numbers.append(numbers[-1] + 1)

    for _ in kills(lambda: read_whole(tmp_path), prepare):
        assert read_whole(tmp_path) == after(OLD, {})


def test_the_files_of_a_stopped_writer_stay_and_it_can_go_on(tmp_path):
    """A sweep and another writer in the folder leave the temporary files of a living process alone."""
    path = tmp_path / "checkpoint"
    number = 0
    while True:
        number += 1
        writer = write_in_child({path: b"first"}, number, signal.SIGSTOP)
        _, status = os.waitpid(writer, os.WUNTRACED)
        if os.WIFEXITED(status):
            break
        is_begun = bool(hidden(tmp_path))
        sweep(path)
        write_atomically({path: b"second"})
        assert path.read_bytes() == b"second"
        os.kill(writer, signal.SIGCONT)
        assert outcome(writer) == 0
        if is_begun:
            assert path.read_bytes() in (b"first", b"second")
        assert hidden(tmp_path) == []
    assert number > 5


def test_a_sweep_in_the_same_process_leaves_open_temporaries_alone(tmp_path, monkeypatch):
    """Two runs in two threads of one process."""
    path = tmp_path / "checkpoint"
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        sweep(path)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_atomically({path: b"content"})
    assert path.read_bytes() == b"content"


def test_leftovers_of_killed_writers_and_of_earlier_versions_are_swept_and_other_files_stay(tmp_path):
    left = [".checkpoint.0123abcd", ".checkpoint.0123abcd.tinyft", ".other.0123abcd.tinyft"]
    kept = [".gitignore", ".other.0123abcd", "checkpoint", "x.0123abcd.tinyft"]
    for name in left + kept:
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / ".pipe.0123abcd.tinyft")                                # opening it would wait for ever
    sweep(tmp_path / "checkpoint")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, ".pipe.0123abcd.tinyft"])


def test_without_locks_only_old_leftovers_are_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    for name, age in ((".a.0123abcd.tinyft", 0.0), (".b.0123abcd.tinyft", 2 * atomic.STALE)):
        (tmp_path / name).write_text("x")
        changed = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (changed, changed))
    write_atomically(paths(tmp_path, NEW))
    assert visible(tmp_path) == after({}, NEW)
    assert hidden(tmp_path) == [".a.0123abcd.tinyft"]


def test_readers_and_writers_beside_each_other_see_files_of_one_saving(tmp_path):
    """Two processes write in turns and all the time; every read is whole."""
    def write() -> None:
        for i in range(100_000):
            letter = b"ab"[i % 2:][:1]
            write_atomically(paths(tmp_path, {"weights": letter * 9, "config": letter}))

    write_atomically(paths(tmp_path, {"weights": b"a" * 9, "config": b"a"}))
    writers = [in_child(write), in_child(write)]
    seen: set[bytes] = set()
    reads = 0
    try:
        while reads < 200 or seen != {b"a", b"b"}:
            reads += 1
            files = read_together(tmp_path, "config", lambda: read_two(tmp_path))
            assert files["weights"] == files["config"] * 9
            seen.add(files["config"])
    finally:
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
            outcome(writer)


def read_two(folder: Path) -> Files:
    return {"config": (folder / "config").read_bytes(), "weights": (folder / "weights").read_bytes()}


def test_a_reader_waits_for_a_writer_and_gives_up_on_a_stopped_one(tmp_path, monkeypatch):
    write_atomically(paths(tmp_path, OLD))
    number = 1
    while True:                                          # stop a writer in the middle of its moves
        writer = write_in_child(paths(tmp_path, NEW), number, signal.SIGSTOP)
        os.waitpid(writer, os.WUNTRACED)
        if not (tmp_path / "config").exists():
            break
        os.kill(writer, signal.SIGCONT)
        outcome(writer)
        number += 1
    monkeypatch.setattr(atomic, "WAIT", 0.0)
    with pytest.raises(OSError, match="half of a saving.*another process is writing to this folder"):
        read_whole(tmp_path)
    with pytest.raises(OSError, match="could not write .*another process"):
        write_atomically(paths(tmp_path, OLD))
    monkeypatch.setattr(atomic, "WAIT", 60.0)
    continued = threading.Thread(target=os.kill, args=(writer, signal.SIGCONT))
    continued.start()
    files = read_whole(tmp_path)
    continued.join()
    assert files == after(OLD, NEW)
    assert outcome(writer) == 0


def test_content_and_names_are_on_the_disk_before_the_call_returns(tmp_path, monkeypatch):
    """The folder is flushed after the last move: else a power failure can undo the rename."""
    events = []
    replace = os.replace

    def log_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("folder" if is_folder else "file")

    def log_replace(*arguments: Any) -> None:
        events.append("move")
        replace(*arguments)

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    write_atomically({tmp_path / "one": b"1"})
    assert events == ["file", "move", "folder"]
    events.clear()
    write_atomically({tmp_path / "new" / "one": b"1", tmp_path / "new" / "two": b"2"})
    first_move = events.index("move")
    assert events[:first_move].count("file") == 3        # two files and the journal
    assert events[:first_move].count("folder") >= 2      # the parent of the new folder, and the new folder
    assert events[first_move:].index("folder") == 2      # after two moves


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_fault_at_any_system_call_leaves_every_file_as_it_was(fault, tmp_path, monkeypatch):
    """An exception, not a kill: nothing hidden is left, and a folder that was made is removed."""
    folder = tmp_path / "made" / "here"
    for call in ("open", "write", "fsync", "link", "replace"):
        number = 0
        while True:
            number += 1
            with monkeypatch.context() as patched:
                raised = raise_at(patched, call, number, fault)
                try:
                    write_atomically(paths(folder, OLD))
                except type(fault):
                    assert not (tmp_path / "made").exists()
                    continue
            if not raised:                               # there are fewer calls than that
                break
            for path in sorted(tmp_path.rglob("*"), reverse=True):          # a fault that may be ignored
                path.rmdir() if path.is_dir() else path.unlink()
        assert visible(folder) == after({}, OLD)
        assert hidden(folder) == []
        for path in sorted(tmp_path.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def raise_at(patched: pytest.MonkeyPatch, call: str, number: int, fault: BaseException) -> list[bool]:
    """Let the os function raise the fault in its call of this number. The list is filled when that happens."""
    real = getattr(os, call)
    calls = iter(range(1, 10_000))
    raised: list[bool] = []

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            raised.append(True)
            raise fault
        return real(*arguments, **named)

    patched.setattr(os, call, wrapped)
    return raised


def test_a_folder_that_cannot_be_mended_is_refused_in_one_sentence(tmp_path, monkeypatch):
    """As on a read-only disk. Finished changes need no mending."""
    second = ".config.0123abcd.tinyft-old"
    (tmp_path / second).write_bytes(b"old")
    journal = tmp_path / JOURNAL
    journal.write_text(f'open\n{json.dumps({"config": second})}\n')
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", read_only)
        with pytest.raises(OSError, match="holds half of a saving, which could not be undone .Read-only") as e:
            read_whole(tmp_path)
        assert "\n" not in str(e.value)
        assert e.value.errno == errno.EROFS
        (tmp_path / "config").write_bytes(b"new")
        journal.write_text(f'done\n{json.dumps({"config": second})}\n')
        assert read_whole(tmp_path) == {"config": b"new"}
    write_atomically(paths(tmp_path, OLD))
    assert hidden(tmp_path) == []


FORGED = {
    "another folder": b'open\n{"../victim": null}\n',
    "an absolute path": b'open\n{"/tmp/victim": null}\n',
    "the folder above": b'open\n{"..": null}\n',
    "a second name elsewhere": b'open\n{"config": "../victim"}\n',
    "a second name that is none": b'open\n{"config": "victim"}\n',
    "no names": b'open\n[1, 2]\n',
    "no JSON": b"open\n{\n",
    "cut off": b'open\n{"victim": null}',
    "another state": b'half\n{"victim": null}\n',
    "nothing": b"",
    "bytes": b"\xff\xfe\x00",
    "deep": b"open\n" + b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("content", FORGED.values(), ids=list(FORGED))
def test_a_forged_journal_changes_nothing(content, tmp_path):
    """It may come with a downloaded folder."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "victim", folder / "victim", folder / "config"):
        path.write_bytes(b"mine")
    (folder / JOURNAL).write_bytes(content)
    assert read_whole(folder) == {"config": b"mine", "victim": b"mine"}
    assert (tmp_path / "victim").read_bytes() == b"mine"
    reads = []
    with pytest.raises(ValueError, match="damaged"):
        read_together(folder, "config", lambda: raise_damage(reads))
    assert len(reads) == 1, "an error is not taken for the work of another process"
    write_atomically(paths(folder, {"a": b"1", "b": b"2"}))
    assert visible(folder) == {"a": b"1", "b": b"2", "config": b"mine", "victim": b"mine"}
    assert hidden(folder) == []


def raise_damage(reads: list[int]) -> None:
    reads.append(1)
    raise ValueError("config is damaged")


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_a_journal_that_is_no_file_is_neither_read_nor_written(kind, tmp_path):
    """Reading a pipe would wait for ever, and writing to a link would change another file."""
    write_atomically(paths(tmp_path, OLD))
    journal = tmp_path / JOURNAL
    if kind == "pipe":
        os.mkfifo(journal)
    elif kind == "folder":
        journal.mkdir()
    else:
        journal.symlink_to(tmp_path / "config")
    assert read_whole(tmp_path) == after(OLD, {})
    with pytest.raises(OSError, match="could not write"):
        write_atomically(paths(tmp_path, NEW))
    assert visible(tmp_path) == after(OLD, {})


def test_links_are_replaced_and_what_they_point_to_stays(tmp_path):
    """Caches of models are folders of links. A dangling link is a name like any other."""
    (tmp_path / "blob").write_bytes(b"blob")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "weights").symlink_to(tmp_path / "blob")
    (folder / "config").symlink_to(tmp_path / "nothing")
    write_atomically(paths(folder, {"weights": b"w", "config": b"c"}))
    assert visible(folder) == {"config": b"c", "weights": b"w"}
    assert not (folder / "weights").is_symlink()
    assert (tmp_path / "blob").read_bytes() == b"blob"


def test_names_that_cannot_be_written_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "folder", tmp_path / ("n" * 300), tmp_path / "a\0b"):
        for others in ({}, {path.parent / "other": b"2"}):
            with pytest.raises((OSError, ValueError)) as e:
                write_atomically({**others, path: b"1"})
            assert "\n" not in str(e.value)
    assert visible_names(tmp_path) == ["file", "folder"]
    with pytest.raises(ValueError, match="files of one folder, got files of 2 folders"):
        write_atomically({tmp_path / "a": b"", tmp_path / "folder" / "b": b""})
    longest = tmp_path / ("é" * 127)                     # 254 bytes
    write_atomically({longest: b"1"})
    assert longest.read_bytes() == b"1"


def visible_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
