"""The learner's commands of `tinyft`.  Nothing heavy is imported until one runs."""
from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .exercise import Exercise
    from .work import Work

COMMANDS = {
    "lesson": ("names", "run a lesson; without a name: the list of lessons"),
    "start": ("names", "write the file of an exercise, or of all of a lesson; without a name: the next one"),
    "check": ("names", "check what you wrote; without a name: the file you changed last"),
    "watch": ("names", "check again whenever a file is saved"),
    "hint": ("name", "the next of three hints, each telling more"),
    "solution": ("name", "the library's own source of it"),
    "diff": ("name", "yours and the library's, line by line"),
    "reset": ("name", "begin again; your file is kept as a .bak"),
    "status": ("", "all exercises, and what is solved"),
    "read": ("what", "what is asked and which laws are checked; or the source of a module, such as tensor or lora"),
    "debug": ("name", "step through your function with the smallest input that fails (pdb)"),
    "selftest": ("names", "test the exercises themselves: wrong answers must be caught and explained"),
}


def register(sub: argparse._SubParsersAction) -> None:
    """Add the commands to the parser of `tinyft`."""
    for command, (takes, text) in COMMANDS.items():
        c = sub.add_parser(command, help=text, description=text)
        if takes == "names":
            c.add_argument("names", nargs="*", metavar="NAME", help="exercises (sum_to, autograd.sum_to) or lessons (autograd)")
        elif takes:
            c.add_argument("names", nargs=1 if takes == "what" else "?", metavar="NAME", help="an exercise; the one you changed last if left out")
        if command in ("check", "watch", "selftest"):
            c.add_argument("--backend", default="numpy", choices=("numpy", "strict", "cupy"),
                           help="where the arrays are (strict: CuPy's rules on NumPy)")
        if command == "check":
            c.add_argument("--all", action="store_true", help="every exercise that is started")
            c.add_argument("--gpu", dest="backend", action="store_const", const="cupy", help="the same as --backend cupy")
        if command == "lesson":
            c.add_argument("--all", action="store_true", help="every lesson: notebooks and figures in work/lessons, no text here")
        c.add_argument("--work", type=Path, default=Path(os.environ.get("TINYFT_WORK", "work")), help="the folder of your files (default: work)")
        c.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """One command.  Its exit status is 0 when all is well."""
    from .show import Page
    from .work import Work
    names = getattr(args, "names", []) or []
    args.names = [names] if isinstance(names, str) else list(names)
    return int(not globals()[f"_{args.command}"](args, Work(args.work), Page()))


# ── doing ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _start(args: argparse.Namespace, work: Work, page) -> bool:
    if not args.names and not work.next():
        page.line("All exercises are solved.")
        return True
    chosen = work.chosen(args.names) if args.names else [work.next()]
    for e in chosen:
        fresh = work.start(e)
        there = "" if fresh else "   (it is there already; nothing was changed)"
        page.line(f"{work.path(e)}   {page.stars(e.difficulty)}  about {e.minutes} min{there}")
    page.line(f"\nWrite the body, then:  tinyft check{'' if len(chosen) == 1 else ' ' + chosen[0].name}")
    return True


def _check(args: argparse.Namespace, work: Work, page) -> bool:
    chosen = work.started() if args.all else work.chosen(args.names)
    chosen = [e for e in chosen if work.path(e).exists()] if len(chosen) > 1 else chosen
    return all([_check_one(e, args.backend, work, page) for e in chosen])


def _check_one(e: Exercise, backend: str, work: Work, page) -> bool:
    from .isolated import check
    path = work.written(e)
    page.line(f"{e.name}   {path}")
    right = page.report(e, check(e.name, path, backend))
    if right != work.solved(e):
        work.record(e, solved=right)
    if right:
        after = work.next()
        page.line(f"\n  All {len(e.laws)} laws hold.  " + (f"Next:  tinyft start {after.name}" if after else "That was the last exercise."))
        page.line(f"  The library's own:  tinyft diff {e.name}")
    return right


def _watch(args: argparse.Namespace, work: Work, page) -> bool:
    """Until Ctrl-C.  It never goes on to the next exercise by itself."""
    from . import checker  # noqa: F401    imported once, so that each check begins with it
    seen: dict[str, int] = {}
    page.line(f"watching {work.folder}; Ctrl-C ends it")
    while True:
        chosen = work.chosen(args.names) if args.names else work.started()
        stamps = {e.name: work.path(e).stat().st_mtime_ns for e in chosen if work.path(e).exists()}
        changed = [e for e in chosen if e.name in stamps and seen.get(e.name) != stamps[e.name]]
        # at first only the file that was changed last
        for e in changed if seen or args.names else changed[:1]:
            page.line()
            _check_one(e, args.backend, work, page)
        seen.update(stamps)
        time.sleep(0.3)


def _reset(args: argparse.Namespace, work: Work, page) -> bool:
    e = work.one(args.names)
    kept = work.reset(e)
    page.line(f"{work.path(e)} is as at the start" + (f"; yours is kept as {kept}" if kept else ""))
    return True


def _debug(args: argparse.Namespace, work: Work, page) -> bool:
    """In this process, as a debugger needs the terminal."""
    import pdb

    from .checker import Trial
    from .loading import Refused
    from .subject import Subject
    e = work.one(args.names)
    path = work.path(e)
    if e.suffix != ".py":
        raise ValueError(f"{path} is no Python: there is no stepping through it here")
    try:
        subject = Subject(e, e.load(path.resolve()))
    except Refused as refusal:
        raise ValueError(str(refusal)) from None
    for law in e.laws:
        trial = Trial(law, subject, str(path.resolve()))
        problem = trial.search()
        if problem:
            page.problem(e, law.title, problem)
            page.line("\n  n: next line   s: step in   p NAME: print   c: go on   q: quit")
            debugger, code = pdb.Pdb(readrc=False), subject.f.__code__
            first = min(line for _, _, line in code.co_lines() if line and line > code.co_firstlineno)
            debugger.set_break(str(path.resolve()), first, temporary=True)
            debugger.rcLines = ["continue"]  # from the law to the learner's first line
            try:
                debugger.runcall(law.test, subject, **trial.inputs)
            except Exception as error:
                page.line(f"  it ended with {type(error).__name__}: {error}")
            return False
    page.line(f"{e.name}: all laws hold, there is nothing to step through")
    return True


def _selftest(args: argparse.Namespace, work: Work, page) -> bool:
    from .checker import use_backend
    from .exercise import exercises
    from .selftest import selftest
    use_backend(args.backend)
    return selftest(work.chosen(args.names) if args.names else list(exercises().values()), page)


# ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _status(args: argparse.Namespace, work: Work, page) -> bool:
    from .exercise import exercises, of_lesson
    from .folders import lessons
    for lesson in lessons().values():
        page.line(f"\n{lesson.title}   (tinyft lesson {lesson.name})")
        for e in of_lesson(lesson.name):
            sign = "right" if work.solved(e) else "todo"
            taken = f"   {work.hints(e)} hint{'s' * (work.hints(e) != 1)}" if work.hints(e) else ""
            state = "solved" if work.solved(e) else "started" if work.path(e).exists() else ""
            page.line(f"  {page.sign(sign)} {e.name:<30} {page.stars(e.difficulty)} {e.minutes:>3} min  {state}{taken}")
    every = exercises().values()
    page.line(f"\n{sum(work.solved(e) for e in every)} of {len(every)} solved")
    return True


def _hint(args: argparse.Namespace, work: Work, page) -> bool:
    e = work.one(args.names)
    n = min(work.hints(e) + 1, len(e.hints))
    work.record(e, hints=n)
    page.line(f"{e.name}, hint {n} of {len(e.hints)}\n")
    page.block(e.hints[n - 1], 2)
    page.line("\n  That was the last.  The answer:  tinyft solution " + e.name if n == len(e.hints) else f"\n  More:  tinyft hint {e.name}")
    return True


def _solution(args: argparse.Namespace, work: Work, page) -> bool:
    e = work.one(args.names)
    page.line(f"{'#' if e.suffix == '.py' else '//'} {e.file}\n")
    page.line(e.source())
    return True


def _diff(args: argparse.Namespace, work: Work, page) -> bool:
    import difflib

    e = work.one(args.names)
    text = work.written(e).read_text(encoding="utf-8", errors="replace")
    mine = text[text.find("@op") if e.is_op and "@op" in text else max(text.find(f"def {e.function}"), text.find(e.source().splitlines()[0]), 0):]
    for line in difflib.unified_diff(mine.splitlines(), e.source().splitlines(), f"yours   {work.path(e)}", e.file, n=99, lineterm=""):
        page.line(page.paint(line, "right" if line[:1] == "+" else "wrong" if line[:1] == "-" else ""))
    return True


def _read(args: argparse.Namespace, work: Work, page) -> bool:
    from .exercise import exercises
    name, every = args.names[0], exercises()
    found = [e for n, e in every.items() if name in (n, e.function)]
    if found:
        e = found[0]
        page.line(f"{e.name}   {page.stars(e.difficulty)}  about {e.minutes} min\n\n{e.head()}\n\nIt is right when:")
        for law in e.laws:
            page.block(law.title, 4, f"  {page.sign('todo')} ")
        return True
    root = Path(__file__).parent.parent
    files = sorted((p for p in root.rglob("*.py") if p.stem == name.replace("/", ".").removesuffix(".py").split(".")[-1]), key=lambda p: len(p.parts))
    if not files:
        raise ValueError(f"there is neither an exercise nor a module {name!r}: try tensor, ops, nn, edit, lora, or `tinyft status`")
    page.line(f"# {files[0].relative_to(root.parent).as_posix()}\n")
    page.line(files[0].read_text(encoding="utf-8").rstrip())
    return True


def _lesson(args: argparse.Namespace, work: Work, page) -> bool:
    from . import reading
    from .exercise import of_lesson
    from .folders import lessons
    if args.all:
        return reading.run_all(args.work / "lessons", page)
    if not args.names:
        for lesson in lessons().values():
            mine = of_lesson(lesson.name)
            page.line(f"  tinyft lesson {lesson.name:<14} {lesson.title:<26} {sum(work.solved(e) for e in mine)} of {len(mine)} exercises solved")
        return True
    return all([reading.read(name, args.work / "lessons", page) for name in args.names])
