"""One case: a command in a process of its own, what it leaves behind, and the judgement."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

TIME_LIMIT = 120  # seconds a case; the slowest takes some 10 on a free core
ADDRESS_SPACE = 4 << 30  # bytes that a case may map beyond what is mapped after the imports
PEAK = 1 << 30  # bytes that a case may hold beyond what is held after the imports
LONGEST_MESSAGE = 20  # lines, for a list of the keys in which two recipes differ

GOOD = ("ran", "refused")
FAILURES = (
    *("traceback", "hang", "memory", "killed", "foreign files", "silent", "wrong result", "no message"),
    *("late", "refused wrongly"),
)


@dataclass
class Outcome:
    """Outcome of a case.

    Attributes:
        name: one of GOOD or FAILURES.
        detail: the message, or where the traceback ends, without what differs between two cases of one kind.
        peak: bytes of memory beyond what is held after the imports.
        printed: all that the command printed.
    """

    name: str
    detail: str
    peak: int = 0
    printed: str = ""

    @property
    def kind(self) -> tuple[str, str]:
        return self.name, self.detail


@dataclass
class Plan:
    """What a case does and what must come of it.

    Attributes:
        argv: the command line of hfkd.
        expected: "run", "refuse" or "either".
        check: called after a command that ended well; returns what is wrong with its results, or None.
        own: the folders, below that of the case, which belong to hfkd.
        lazy: whether a mistake can only be found while training.
    """

    argv: list[str]
    expected: str
    check: Callable[[Records], str | None]
    own: tuple[str, ...] = ("out",)
    lazy: bool = False


class Records:
    """What a command did, recorded in its process: exit code, whether it trained, and the images that it evaluated."""

    code = 0
    trained = False
    eval_images: int | None = None


def expected_of(changes: list) -> str:
    """Return what must come of a list of changes, each of which ends with its own expectation."""
    verdicts = {change[-1] for change in changes}
    return "refuse" if "refuse" in verdicts else "either" if "either" in verdicts else "run"


def run_case(sort: ModuleType, case: dict, ground: Path, folder: Path) -> Outcome:
    """Build a case in an empty folder, run and judge it."""
    for name in ("notes.txt", "out/notes.txt", "out/data/own.bin"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"own {name}")
    plan = sort.build(case, ground, folder)
    before = snapshot(folder) | snapshot(ground)
    said, report = folder.with_name(f"{folder.name}.said"), folder.with_name(f"{folder.name}.report")
    code, peak = in_child(lambda: _command(plan, said, report), folder)
    changed = foreign_changes(before, snapshot(folder) | snapshot(ground), [folder / name for name in plan.own])
    printed = said.read_text(errors="replace") if said.exists() else ""
    found = json.loads(report.read_text()) if report.exists() else {"held": 0, "trained": False, "wrong": None}
    peak -= found["held"]
    for path in (said, report):
        path.unlink(missing_ok=True)
    name, detail = judge(plan, code, peak, printed, found, changed)
    return Outcome(name, _without_names(detail, folder, ground), max(peak, 0), printed)


def judge(plan: Plan, code: int | None, peak: int, printed: str, found: dict, changed: list[str]) -> tuple[str, str]:
    """Return the name of the outcome and a detail."""
    messages = re.findall(r"^hfkd [a-z-]+: error: .*", printed, flags=re.MULTILINE)
    if code is None:
        return "hang", f"longer than {TIME_LIMIT} s"
    if peak > PEAK or "MemoryError" in printed or "Cannot allocate memory" in printed:
        return "memory", f"{peak >> 28 << 8} MiB and more"
    if code < 0:
        return "killed", signal.Signals(-code).name
    if "Traceback (most recent call last)" in printed:
        return "traceback", _end_of_traceback(printed)
    if changed:
        return "foreign files", changed[0]
    if code == 0:
        if plan.expected == "refuse":
            return "silent", "runs, though it must be refused"
        return ("wrong result", found["wrong"]) if found["wrong"] else ("ran", "")
    if code not in (1, 2) or len(messages) != 1 or _lines_from(messages[0], printed) > LONGEST_MESSAGE:
        return "no message", f"exit code {code}, {len(messages)} messages: {printed[-300:]}"
    if code == 2 and found["trained"] and not plan.lazy:
        return "late", messages[0]
    if code == 1 and plan.expected == "refuse" and not plan.lazy:
        return "late", f"exit code 1: {messages[0]}"
    if plan.expected == "run":
        return "refused wrongly", messages[0]
    return "refused", messages[0]


def _lines_from(message, printed):
    return printed[printed.index(message) :].strip().count("\n") + 1


def _end_of_traceback(printed):
    files = re.findall(r'File "(?:.*/)?(hfkd/[^"]+)", line \d+, in (\S+)', printed)
    where = ":".join(files[-1]) if files else "outside hfkd"
    return f"{where}: {printed.rstrip().splitlines()[-1][:160]}"


def _without_names(text, folder, ground):
    text = text.replace(str(folder), "FOLDER").replace(str(ground), "GROUND")
    return re.sub(r"0x[0-9a-f]+", "0x", text)


# ---- The process of a case -----------------------------------------------------------------------------------------


def in_child(work: Callable[[], None], folder: Path) -> tuple[int | None, int]:
    """Run a function in a forked process and return its exit code, None after TIME_LIMIT, and its peak memory."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 71
        try:
            os.setpgid(0, 0)  # what it starts ends with it
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_AS, (_mapped() + ADDRESS_SPACE,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (1, 1))  # 0 would not hold back a program that collects cores
            work()
            code = Records.code
        finally:
            os._exit(code)
    deadline = time.monotonic() + TIME_LIMIT
    done, status, usage = os.wait4(pid, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.02)
        done, status, usage = os.wait4(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # also what a command that has ended left running
    if not done:
        return None, os.wait4(pid, 0)[2].ru_maxrss << 10
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss << 10


def _command(plan: Plan, said: Path, report: Path) -> None:
    """Run hfkd's command line, with its output in a file, and write down what came of it."""
    redirect(said)
    _record()
    found = {"held": _resident(), "trained": False, "wrong": None}
    report.write_text(json.dumps(found))
    Records.code = hfkd(plan.argv)
    sys.stdout.flush()
    found["trained"] = Records.trained
    if Records.code == 0:
        redirect(Path(os.devnull))
        try:
            found["wrong"] = plan.check(Records)
        except Exception as error:
            found["wrong"] = f"{type(error).__name__}: {error}"
    report.write_text(json.dumps(found))


def hfkd(argv: list[str]) -> int:
    """Run a command of hfkd in this process and return its exit code."""
    from hfkd.cli import main

    try:
        main(argv)
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def redirect(path):
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # Not the streams of a test runner, which keep what is written.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115


def _record():
    from hfkd.training.trainer import DistillationTrainer

    step, evaluate = DistillationTrainer.training_step, DistillationTrainer.evaluate

    def recorded_step(self, *args, **kwargs):
        Records.trained = True
        return step(self, *args, **kwargs)

    def recorded_evaluate(self, *args, **kwargs):
        data = self.eval_dataset
        Records.eval_images = data.num_rows if hasattr(data, "num_rows") else len(data)
        return evaluate(self, *args, **kwargs)

    DistillationTrainer.training_step, DistillationTrainer.evaluate = recorded_step, recorded_evaluate


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# ---- Files ---------------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, str]:
    """Return the mode, size and content of all files below a folder, by path."""
    found = {}
    for parent, below, files in os.walk(folder):
        for name in (*below, *files):
            path = os.path.join(parent, name)
            info = os.lstat(path)
            content = ""
            if stat.S_ISREG(info.st_mode):
                content = f"{info.st_size} {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
            elif stat.S_ISLNK(info.st_mode):
                content = os.readlink(path)
            found[path] = f"{info.st_mode:o} {content}"
    return found


def foreign_changes(before: dict[str, str], after: dict[str, str], own: list[Path]) -> list[str]:
    """Return what happened to files that are not hfkd's: those below `own` folders may be added, the rest may not."""
    ours = tuple(f"{folder}/" for folder in own)
    foreign = ("notes.txt", "own.bin", "data")  # in a run's folder, too
    changes = []
    for path, state in before.items():
        if path.startswith(ours) and os.path.basename(path) not in foreign:
            continue
        if after.get(path) != state:
            changes.append(f"{'changed' if path in after else 'removed'}: {path}")
    new = [path for path in after if path not in before and not path.startswith(ours) and Path(path) not in own]
    return changes + [f"added: {path}" for path in new]


def strict_json(path: Path) -> dict:
    """Read JSON that holds no NaN and no Infinity."""

    def refuse(constant):
        raise ValueError(f"{path.name} holds {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)
