"""The learner's commands of `tinyft`.  Nothing heavy is imported until one runs."""
from __future__ import annotations

import argparse
import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from .loading import in_words

if TYPE_CHECKING:
    from .exercise import Exercise, Law
    from .show import Page
    from .subject import Subject
    from .work import Work

# command: (its arguments, help)
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
    "read": ("subject", "the task and the laws of an exercise; or the source of a module, such as tensor or lora"),
    "debug": ("name", "step through your function with the smallest input that fails (pdb)"),
    "selftest": ("names", "test the exercises themselves: wrong answers must be caught and explained"),
}


def register(sub: argparse._SubParsersAction) -> None:
    """Add the learner's commands to the subparsers of `tinyft`.  Each calls `run` with its arguments."""
    for command, (takes, text) in COMMANDS.items():
        c = sub.add_parser(command, help=text, description=text)
        if command == "lesson":
            c.add_argument("names", nargs="*", metavar="NAME", help="lessons: autograd, 01 or 01_autograd")
        elif takes == "names":
            c.add_argument("names", nargs="*", metavar="NAME",
                           help="exercises (sum_to, autograd.sum_to) or lessons (autograd)")
        elif takes == "name":
            c.add_argument("names", nargs="?", metavar="NAME", help="an exercise; the one you changed last if left out")
        elif takes == "subject":
            c.add_argument("names", nargs=1, metavar="NAME", help="an exercise or a module")
        if command in ("check", "watch", "selftest"):
            c.add_argument("--backend", default="numpy", choices=("numpy", "strict", "cupy"),
                           help="where the arrays are (strict: CuPy's rules on NumPy)")
        if command == "check":
            c.add_argument("--all", action="store_true", help="every exercise that is started")
            c.add_argument("--gpu", dest="backend", action="store_const", const="cupy",
                           help="the same as --backend cupy")
        if command == "lesson":
            c.add_argument("--all", action="store_true",
                           help="every lesson: notebooks with results, and figures, in work/lessons; no text here")
            c.add_argument("--notebook", action="store_true",
                           help="write the lesson as a notebook without results, work/NN_name.ipynb; run nothing")
        c.add_argument("--work", type=Path, default=None,
                       help="the folder of your files (default: TINYFT_WORK, else the folder work here or above)")
        c.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command args.command, the function of its name below.  The exit status is 0 when all is well."""
    from .show import Page
    from .work import Work, find_folder
    if args.work is None:
        named = os.environ.get("TINYFT_WORK")
        args.work = Path(named) if named else find_folder(Path.cwd())
    names = getattr(args, "names", []) or []             # a list, one string, None, or no such argument
    args.names = [names] if isinstance(names, str) else list(names)
    command = globals()[f"_{args.command}"]
    succeeded = command(args, Work(args.work), Page())
    return 0 if succeeded else 1


# ── doing ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# Each command takes the arguments, the learner's folder and the page to print on; it returns True when all is well.
def _start(args: argparse.Namespace, work: Work, page: Page) -> bool:
    """Write the learner's files of the exercises in args.names, or of the first one that is not solved."""
    if not args.names and not work.next():
        page.line("All exercises are solved.")
        return True
    chosen = work.chosen(args.names) if args.names else [work.next()]
    for e in chosen:
        is_new = work.start(e)
        remark = "" if is_new else "   (it is there already; nothing was changed)"
        page.line(f"{work.path(e)}   {page.stars(e.difficulty)}  about {e.minutes} min{remark}")
    example = "" if len(chosen) == 1 else f" {chosen[0].name}"
    page.line(f"\nWrite the body, then:  tinyft check{example}")
    return True


def _check(args: argparse.Namespace, work: Work, page: Page) -> bool:
    """Check the exercises in args.names, without names the file changed last, with --all every one that is started.

    True if all are solved.  Of several, those without a file are left out; it is an error if none has a file.
    """
    chosen = work.started() if args.all else work.chosen(args.names)
    written = [e for e in chosen if work.version(e)]
    if not written:
        work.written(chosen[0] if chosen else work.chosen_one([]))           # raises: there is no file
    results = [_check_one(e, args.backend, work, page) for e in written]
    return all(results)


def _check_one(e: Exercise, backend: str, work: Work, page: Page) -> bool:
    """Check one exercise in a process of its own, print the outcomes, and save if it is solved.

    True if it is solved and that was saved.
    """
    from .isolated import check
    path = work.written(e)
    page.line(f"{e.name}   {path}")
    solved = page.report(e, check(e.name, path, backend))
    saved = _save(page, work.record, e, solved=solved)
    if solved:
        following = work.next(after=e)
        advice = f"Next:  tinyft start {following.name}" if following else "That was the last exercise."
        page.line(f"\n  All {len(e.laws)} laws hold.  {advice}")
        page.line(f"  The library's own:  tinyft diff {e.name}")
    return solved and saved


def _save(page: Page, record: Callable, e: Exercise, **facts: int | bool) -> bool:
    """Call work.record or work.take_hint.  False, and a line with the reason, if the progress cannot be saved."""
    try:
        record(e, **facts)
    except OSError as error:
        page.line(f"\n  The progress is not saved: {error.strerror or error}")
        return False
    return True


def _watch(args: argparse.Namespace, work: Work, page: Page) -> bool:
    """Check a file whenever it is saved, until Ctrl-C ends it.  It never starts the next exercise by itself."""
    from . import checker  # noqa: F401    imported once, so that the forked checks have it already
    checked: dict[str, tuple] = {}                       # {exercise: the version of its file when it was checked}
    page.line(f"watching {work.folder}; Ctrl-C ends it")
    while True:
        chosen = work.chosen(args.names) if args.names else work.started()
        versions = {e.name: work.version(e) for e in chosen if work.version(e)}
        changed = [e for e in chosen if e.name in versions and checked.get(e.name) != versions[e.name]]
        if not checked and not args.names:               # at first only the file that was changed last
            changed = changed[:1]
        for e in changed:
            page.line()
            try:
                _check_one(e, args.backend, work, page)
            except ValueError as error:                  # an editor has just moved the file away
                page.line(str(error))
        checked.update(versions)
        time.sleep(0.3)


def _reset(args: argparse.Namespace, work: Work, page: Page) -> bool:
    e = work.chosen_one(args.names)
    backup = work.reset(e)
    remark = f"; yours is kept as {backup}" if backup else ""
    page.line(f"{work.path(e)} is as at the start{remark}")
    return _save(page, work.record, e, solved=False)


def _debug(args: argparse.Namespace, work: Work, page: Page) -> bool:
    """Step with the debugger through the first law that fails. True if all laws hold, so there is nothing to step.

    The function runs in this process, not in one of its own as for `check`: a debugger needs the terminal.
    """
    from .checker import ONE_CALL, Trial, limited
    from .loading import Refused, Stop
    from .subject import Subject
    e = work.chosen_one(args.names)
    if e.suffix != ".py":
        raise ValueError(f"{work.path(e)} is no Python: there is no stepping through it here")
    path = work.written(e).resolve()
    try:
        with limited(ONE_CALL):
            function = e.load(path)
        subject = Subject(e, function)
    except (Refused, Stop) as reason:
        raise ValueError(str(reason)) from None
    if not inspect.isfunction(subject.f):
        raise ValueError(f"{e.function} in {work.path(e)} wants to be a function written with `def`, "
                         f"got a {type(subject.f).__name__}: there is no stepping through it here")
    for law in e.laws:
        trial = Trial(law, subject, str(path))
        problem = trial.search()
        if problem:
            page.problem(e, law.title, problem)
            page.line("\n  n: next line   s: step in   p NAME: print   c: go on   q: quit")
            _step_through(law, subject, path, trial.inputs, page)
            return False
    page.line(f"{e.name}: all laws hold, there is nothing to step through")
    return True


def _step_through(law: Law, subject: Subject, path: Path, inputs: dict[str, Any], page: Page) -> None:
    """Run a law on the inputs under pdb, which stops at the first line of the learner's function, in the file `path`.

    It stops in each function inside it too, such as the pullbacks of an op, which are called later.
    """
    import bdb
    import pdb
    debugger = pdb.Pdb(readrc=False)
    first, *inner = _first_lines(subject.f.__code__)
    for line in {first, *inner}:                         # a lambda may share its line with the `return`
        debugger.set_break(str(path), line, temporary=line not in inner)
    debugger.rcLines = ["continue"]                      # its first command: go from the law to the breakpoint
    try:
        debugger.runcall(law.test, subject, **inputs)
    except bdb.BdbQuit:
        page.line("  stopped")
    except Exception as error:
        page.line(f"  it ended with {in_words(error)}")


def _first_lines(code: CodeType) -> list[int]:
    """The first line of a function's body, and of every function and lambda inside it."""
    inside = [line for _, _, line in code.co_lines() if line and line > code.co_firstlineno]
    lines = [min(inside, default=code.co_firstlineno)]   # a function may stand in one line
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and not constant.co_name.endswith("comp>"):
            lines += _first_lines(constant)
    return lines


def _selftest(args: argparse.Namespace, work: Work, page: Page) -> bool:
    from .checker import use_backend
    from .exercise import exercises
    from .selftest import selftest
    use_backend(args.backend)
    return selftest(work.chosen(args.names) if args.names else list(exercises().values()), page)


# ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _status(args: argparse.Namespace, work: Work, page: Page) -> bool:
    """Print every exercise under its lesson, with its state, and the number of exercises solved."""
    from .exercise import exercises, of_lesson
    from .folders import lessons
    for lesson in lessons().values():
        page.line(f"\n{lesson.title}   (tinyft lesson {lesson.name})")
        for e in of_lesson(lesson.name):
            _status_line(e, work, page)
    every = exercises().values()
    solved = sum(work.solved(e) for e in every)
    page.line(f"\n{solved} of {len(every)} solved")
    return True


def _status_line(e: Exercise, work: Work, page: Page) -> None:
    """Print one exercise: its name, difficulty, minutes, state, and the number of hints taken."""
    if work.solved(e):
        state = "solved"
    else:
        state = "started" if work.path(e).exists() else ""
    sign = page.sign("right" if work.solved(e) else "todo")
    taken = work.hints(e)
    hints = f"   {taken} hint{'s' * (taken != 1)}" if taken else ""
    page.line(f"  {sign} {e.name:<30} {page.stars(e.difficulty)} {e.minutes:>3} min  {state}{hints}")


def _hint(args: argparse.Namespace, work: Work, page: Page) -> bool:
    """Print the next hint of an exercise, and save that it was taken.  After the last, print the last again."""
    e = work.chosen_one(args.names)
    saved = _save(page, work.take_hint, e)
    n = work.hints(e)
    page.line(f"{e.name}, hint {n} of {len(e.hints)}\n")
    page.block(e.hints[n - 1], 2)
    if n == len(e.hints):
        page.line(f"\n  That was the last.  The answer:  tinyft solution {e.name}")
    else:
        page.line(f"\n  More:  tinyft hint {e.name}")
    return saved


def _solution(args: argparse.Namespace, work: Work, page: Page) -> bool:
    e = work.chosen_one(args.names)
    comment = "#" if e.suffix == ".py" else "//"
    page.line(f"{comment} {e.file}\n")
    page.line(e.source())
    return True


def _diff(args: argparse.Namespace, work: Work, page: Page) -> bool:
    """Print the differences between the learner's function and the library's, with all lines of both."""
    import difflib
    e = work.chosen_one(args.names)
    solution = e.source()
    text = work.written(e).read_text(encoding="utf-8", errors="replace")
    # The learner's function, without the text above it. find gives -1 for a line that is not there.
    if e.is_op and "@op" in text:
        start = text.find("@op")
    else:
        start = max(text.find(f"def {e.function}"), text.find(solution.splitlines()[0]), 0)     # Python, CUDA C
    names = (f"yours   {work.path(e)}", e.file)
    for line in difflib.unified_diff(text[start:].splitlines(), solution.splitlines(), *names, n=99, lineterm=""):
        colour = {"+": "right", "-": "wrong"}.get(line[:1], "")
        page.line(page.paint(line, colour))
    return True


def _read(args: argparse.Namespace, work: Work, page: Page) -> bool:
    """Print the task and the laws of the exercise args.names[0], or the source of the module of this name."""
    from .exercise import exercises, near_names
    name = args.names[0]
    for e in exercises().values():
        if name in (e.name, e.function):
            page.line(f"{e.name}   {page.stars(e.difficulty)}  about {e.minutes} min\n")
            page.line(f"{e.head()}\n")
            if e.guide():
                page.line(f"{e.guide()}\n")
            page.line("It is right when:")
            for law in e.laws:
                page.block(law.title, 4, first=f"  {page.sign('todo')} ")
            return True
    package = Path(__file__).parent.parent
    module = name.replace("/", ".").removesuffix(".py").split(".")[-1]
    is_name = module.isidentifier()                      # no pattern such as "*"
    found = package.rglob(f"{module}.py") if is_name else ()
    files = sorted(found, key=lambda p: len(p.parts))    # of two, the one less deep
    if not files:
        names = {path.stem for path in package.rglob("*.py")} | {e.function for e in exercises().values()}
        suggestion = near_names(name, sorted(names)) or ": try tensor, ops, nn, edit or lora"
        raise ValueError(f"there is neither an exercise nor a module {name!r}{suggestion}; "
                         "`tinyft status` lists the exercises")
    page.line(f"# {files[0].relative_to(package.parent).as_posix()}\n")
    page.line(files[0].read_text(encoding="utf-8").rstrip())
    return True


def _lesson(args: argparse.Namespace, work: Work, page: Page) -> bool:
    """Run the lessons in args.names, or with --all every lesson; without either, list them.  True if all of them ran.
    """
    from . import reading
    from .exercise import of_lesson
    from .folders import lessons
    if args.all:
        return reading.run_all(args.work / "lessons", page)
    if not args.names:
        for lesson in lessons().values():
            mine = of_lesson(lesson.name)
            solved = sum(work.solved(e) for e in mine)
            page.line(f"  tinyft lesson {lesson.name:<14} {lesson.title:<26} {solved} of {len(mine)} exercises solved")
        return True
    if args.notebook:
        results = [reading.write_notebook(name, args.work, page) for name in args.names]
    else:
        results = [reading.read(name, args.work / "lessons", page) for name in args.names]
    return all(results)
