"""Breaks one guard after the other, and looks whether a test notices: see `bin/mutants --help`.

A mutant is tried in a copy of the checkout: first by the chapter that holds it, then by the
room's tests, the quickest first, until one fails. Each is tried by a fork of this process, which
has imported the libraries and nothing of the project.
"""

import argparse
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before NumPy is imported
sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).parent]
sys.path.insert(0, str(Path(__file__).parent))
from mutations import Mutant, equivalent, in_module, in_notebook, mutants, reason

ROOT = Path(__file__).resolve().parents[2]

GUARDS = "tests/guards"
SCHEDULES = "tests/faults/test_schedules.py"


class Room(NamedTuple):
    "What is mutated, and the tests that should notice, besides the chapters."

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    chapters: tuple[str, ...] = ()  # besides those of the modules


HANDLED = (GUARDS, SCHEDULES, "tests/test_training.py")
SERVER = (*HANDLED, "tests/faults/test_servers.py")
ROOMS = {
    "scripts": Room(
        (
            "snn/backends/valkey/store.py",
            "snn/backends/valkey/residents.py",
            "snn/backends/valkey/queue.py",
        ),
        HANDLED,
    ),
    "protocol": Room(("snn/handlers/protocol.py", "snn/cloud/runs.py"), HANDLED),
    "handlers": Room(
        (
            "snn/handlers/invocation.py",
            "snn/handlers/neuron.py",
            "snn/handlers/trainer.py",
            "snn/handlers/epoch.py",
            "snn/handlers/launch.py",
        ),
        HANDLED,
    ),
    "store": Room(("snn/backends/valkey/store.py",), SERVER),
    "queue": Room(
        (
            "snn/backends/valkey/queue.py",
            "snn/backends/valkey/residents.py",
            "snn/backends/aws/invoke.py",
            "snn/cloud/seats.py",
            "snn/handlers/stay.py",
        ),
        (*HANDLED, "tests/faults/test_accidents.py", "tests/deploy/test_residents.py"),
    ),
    "limits": Room(
        ("snn/cloud/meter.py", "snn/cloud/prices.py", "snn/cloud/deadline.py"),
        (GUARDS, "tests/estimate/test_limits.py", "tests/estimate/test_money.py"),
    ),
    "checkpoint": Room(
        ("snn/handlers/checkpoint.py", "snn/handlers/watch.py", "snn/handlers/ending.py"),
        (*HANDLED, "tests/faults/test_accidents.py"),
    ),
    "api": Room(("snn/serve/guard.py", "snn/serve/request.py"), (GUARDS, "tests/serve")),
    "gate": Room(("snn/deploy/gate.py",), ("tests/deploy/test_gate.py",)),
    "teardown": Room(
        ("snn/deploy/teardown.py",),
        ("tests/deploy/test_teardown_service.py", "tests/deploy/test_stack.py"),
    ),
    "files": Room(
        (
            "snn/data/h5.py",
            "snn/data/models.py",
            "snn/data/photographs.py",
            "snn/maths/model.py",
        ),
        (
            GUARDS,
            "tests/test_bad_input.py",
            "tests/test_photographs.py",
            "tests/test_maths.py",
            "tests/test_cli.py",
            "tests/test_strangers.py",
        ),
    ),
}


# One process for each look


def prepare() -> None:
    "Import the libraries, so that no fork has to."
    for name in (
        "numpy h5py redis boto3 botocore.session msgspec PIL.Image pytest hypothesis "
        "matplotlib.pyplot IPython.core.interactiveshell execnb.shell nbdev.test typer rich "
        "aws_lambda_powertools simpy fastapi uvicorn httpx2 psutil sklearn.metrics"
    ).split():
        try:
            __import__(name)
        except ImportError:
            pass  # a test that needs it says so


def chapter(copy: Path, notebook: str, say) -> bool:
    "Does a chapter run through?"
    from nbdev.test import test_nb

    began = time.monotonic()
    with open(os.devnull, "w") as nothing:
        sys.stderr = nothing
        passed, _ = test_nb(copy / notebook, skip_flags=["notest"])
    say({"test": notebook, "seconds": time.monotonic() - began, "passed": passed})
    return passed


class Watcher:
    "A plugin of pytest: the quickest file first, without tests that take long; says how each ended."

    def __init__(self, say, known: dict[str, float], longest: float):
        self.say, self.known, self.longest = say, known, longest

    def pytest_collection_modifyitems(self, items):
        cost = Counter()
        for item in items:
            item.nodeid_ = item.nodeid.replace(os.sep, "/")
            cost[item.path] += self.known.get(item.nodeid_, 0)
        quick = [item for item in items if self.known.get(item.nodeid_, 0) <= self.longest]
        items[:] = sorted(quick, key=lambda item: (cost[item.path], str(item.path)))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.say(
                {
                    "test": report.nodeid,
                    "seconds": report.duration,
                    "passed": not report.failed,
                }
            )


def tests(copy: Path, names: tuple[str, ...], known: dict, longest: float, say) -> bool:
    "Do the tests pass?"
    import pytest

    options = ["-q", "-x", "-p", "no:cacheprovider", "-n", "0", "-o", "addopts="]
    return not pytest.main([*names, *options], plugins=[Watcher(say, known, longest)])


def ends_well(copy: Path, look, seconds: float) -> tuple[bool, list[dict]]:
    "Fork, and look at the copy; whether all was well, and what was said. To hang is not."
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        alone(copy, reads, writes, look)
    os.close(writes)
    said, good = heard(reads, time.monotonic() + seconds)
    end_all(child)
    return good, said


def alone(copy: Path, reads: int, writes: int, look) -> None:
    "The fork's life; does not come back."
    code = 1
    try:
        os.close(reads)
        os.setsid()
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path.insert(0, str(copy))
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        say = lambda fact: os.write(writes, json.dumps(fact).encode() + b"\n")
        say({"all": bool(look(say))})
        code = 0
    finally:
        os._exit(code)


def heard(reads: int, deadline: float) -> tuple[list[dict], bool]:
    "What a fork says until it ends, hangs or has said all."
    text = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([reads], [], [], left)[0] or not (more := os.read(reads, 65536)):
            break
        text += more
        if b'"all"' in text:
            break
    os.close(reads)
    facts = [json.loads(line) for line in text.splitlines() if line.endswith(b"}")]
    said = [fact for fact in facts if "test" in fact]
    return said, any(fact.get("all") for fact in facts)


def end_all(child: int) -> None:
    "End a fork with all that it has started."
    import psutil

    try:
        family = psutil.Process(child).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    os.waitpid(child, 0)


# The copy


def copied(folder: Path) -> Path:
    "A copy of the files that git knows or would add."
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return folder


def put(copy: Path, mutant: Mutant) -> dict[Path, str]:
    "Write a mutant into the copy; returns what was there."
    changes = {mutant.cell.module: in_module, mutant.cell.notebook: in_notebook}
    before = {copy / name: (copy / name).read_text() for name in changes}
    for path, change in zip(before, changes.values()):
        write(path, change(mutant, before[path]))
    return before


def write(path: Path, text: str) -> None:
    "Write a file, and forget what was compiled of it: a time in whole seconds would hide the change."
    path.write_text(text)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


# A room


TIMES = ROOT / ".venv" / "mutants.json"  # seconds of each chapter and test when last tried


def baseline(copy: Path, room: Room, chapters: list[str], longest: float) -> dict[str, float]:
    "Seconds of each chapter and test without a mutation; all that will be used must pass."
    known = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    looks = [lambda say, name=name: chapter(copy, name, say) for name in chapters]
    looks.append(lambda say: tests(copy, room.tests, known, longest, say))
    for look in looks:
        good, said = ends_well(copy, look, 1200)
        if not good:
            worst = [fact["test"] for fact in said if not fact["passed"]]
            sys.exit(f"fails without a mutation: {worst or said[-1:]}; run bin/test first")
        known |= {fact["test"]: fact["seconds"] for fact in said}
    TIMES.write_text(json.dumps(known))
    return known


def noticed(copy: Path, mutant: Mutant, room: Room, known: dict, longest: float) -> str:
    "The first chapter or test that fails, or does not come to an end; empty if none."
    names = [mutant.cell.notebook, *room.chapters]
    for name in dict.fromkeys(names):
        look = lambda say, name=name: chapter(copy, name, say)
        if not ends_well(copy, look, 20 + 5 * known[name])[0]:
            return name
    mine = [seconds for test, seconds in known.items() if test.startswith(room.tests)]
    quick = [seconds for seconds in mine if seconds <= longest]
    look = lambda say: tests(copy, room.tests, known, longest, say)
    good, said = ends_well(copy, look, 60 + 4 * sum(quick))
    if good:
        return ""
    failed = [fact["test"] for fact in said if not fact["passed"]]
    return failed[0] if failed else f"no end after {said[-1]['test'] if said else 'nothing'}"


def try_room(name: str, given: argparse.Namespace, copy: Path, tell) -> Counter:
    "Try a room's mutants, and tell what became of each; returns how many ended how."
    room, known_equivalent = ROOMS[name], equivalent()
    if given.quick:
        room = room._replace(tests=(GUARDS,))
    found = mutants(copy, room.modules, lua=name == "scripts")
    most, dice = given.most, random.Random(given.seed)
    chosen = found if len(found) <= most else dice.sample(found, most)
    chosen = [m for m in chosen if given.only in m.place]
    chapters = dict.fromkeys([*room.chapters, *(m.cell.notebook for m in chosen)])
    known, count = baseline(copy, room, list(chapters), given.longest), Counter()
    for number, mutant in enumerate(chosen, start=1):
        if why := reason(mutant, known_equivalent):
            kind, who = "equivalent", why
        else:
            before = put(copy, mutant)
            try:
                who = noticed(copy, mutant, room, known, given.longest)
            finally:
                for path, text in before.items():
                    write(path, text)
            kind = "noticed" if who else "survived"
        count[kind] += 1
        tell(name, mutant, kind, who)
        counts = ", ".join(f"{n} {kind}" for kind, n in count.items())
        print(f"\r{name} {number}/{len(chosen)}: {counts}   ", end="", file=sys.stderr)
    print(file=sys.stderr)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bin/mutants",
        description="Break the code on purpose, one small change at a time, and look whether a "
        "chapter or a test notices. Each mutant takes some seconds, a room some minutes.",
    )
    parser.add_argument(
        "room", nargs="*", metavar="ROOM", help=f"of {', '.join(ROOMS)}; all if none is named"
    )
    parser.add_argument(
        "--most", type=int, default=40, help="mutants a room, drawn at random (default 40)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument(
        "--longest",
        type=float,
        default=2,
        help="seconds; tests that take longer are left out (default 2)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only the chapters and tests/guards: some minutes less",
    )
    parser.add_argument("--only", default="", help="mutants whose file and line hold this")
    parser.add_argument("--to", type=Path, help="a file: a line of JSON for each mutant")
    given = parser.parse_args()
    unknown = [name for name in given.room if name not in ROOMS]
    if unknown:
        parser.error(f"there is no room {unknown[0]}; it may be one of {', '.join(ROOMS)}")

    def tell(room: str, mutant: Mutant, kind: str, who: str) -> None:
        was, now = mutant.change
        if kind == "survived":
            print(f"\n{mutant.place}\n  - {was}\n  + {now}", flush=True)
        if given.to:
            with given.to.open("a") as file:
                facts = dict(
                    room=room, place=mutant.place, was=was, now=now, kind=kind, who=who
                )
                print(json.dumps(facts), file=file)

    prepare()
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        table = {name: try_room(name, given, copy, tell) for name in given.room or ROOMS}
    print("\nroom        noticed  equivalent  survived")
    for name, count in table.items():
        tried = count["noticed"] + count["survived"]
        part = f"({count['noticed'] / max(1, tried):.0%})"
        print(
            f"{name:11} {count['noticed']:3} {part:6} {count['equivalent']:7} {count['survived']:9}"
        )


if __name__ == "__main__":
    main()
