"""Breaks one guard after the other, and looks whether a test notices: see `bin/mutants --help`.

Python is mutated by cosmic-ray's operators; the Lua in the store's scripts, which no tool knows,
by a small mutator of our own. All of it happens in a copy of the checkout.
"""

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GUARDS = "tests/guards"
SCHEDULES = "tests/faults/test_schedules.py"


class Room(NamedTuple):
    "What is mutated, and the tests that should notice."

    modules: tuple[str, ...]
    tests: tuple[str, ...]


HANDLED = (GUARDS, SCHEDULES, "tests/test_training.py")
ROOMS = {
    "scripts": Room(
        ("snn/cloud/store.py", "snn/cloud/residents.py", "snn/cloud/bus.py"), HANDLED
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
    "store": Room(("snn/cloud/store.py",), HANDLED),
    "queue": Room(
        ("snn/cloud/bus.py", "snn/cloud/residents.py", "snn/handlers/stay.py"),
        (*HANDLED, "tests/faults/test_accidents.py", "tests/deploy/test_residents.py"),
    ),
    "limits": Room(
        ("snn/cloud/meter.py", "snn/cloud/prices.py"),
        (GUARDS, "tests/estimate/test_limits.py", "tests/estimate/test_money.py"),
    ),
    "checkpoint": Room(
        ("snn/handlers/checkpoint.py", "snn/handlers/watch.py"),
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
        ),
    ),
}


class Mutant(NamedTuple):
    "A module with one thing changed."

    module: str
    line: int  # of the change, from 1
    was: str
    now: str
    source: str  # of the whole module


def changed(module: str, before: str, after: str) -> Mutant:
    "A mutant, with the first line that differs."
    pairs = enumerate(zip(before.splitlines(), after.splitlines() + [""] * 3), start=1)
    line, was, now = next((n, a, b) for n, (a, b) in pairs if a != b)
    return Mutant(module, line, was.strip(), now.strip(), after)


# Python

OPERATORS = re.compile(
    "core/(ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Is_IsNot|IsNot_Is)"
    "|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|Mod_Add|FloorDiv_Mul)"
    "|AddNot|ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd"
    "|ReplaceBreakWithContinue|ReplaceContinueWithBreak|NumberReplacer"
    "|ZeroIterationForLoop|ReplaceUnaryOperator_Delete_Not)$"
)


def python_mutants(module: str, source: str) -> Iterator[Mutant]:
    "What cosmic-ray makes of a module."
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    for name in filter(OPERATORS.match, operator_names()):
        for occurrence in range(10_000):
            mutated = mutate_code(source.encode(), get_operator(name)(), occurrence)
            if mutated is None:
                break
            text = mutated.decode() if isinstance(mutated, bytes) else mutated
            if text != source and parses(text):
                yield changed(module, source, text)


def parses(source: str) -> bool:
    "Is it still Python?"
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


# Lua

SWAPS = (
    ("==", "~="),
    ("~=", "=="),
    (">=", ">"),
    (" < ", " <= "),
    (" > ", " >= "),
    (" and ", " or "),
    (" or ", " and "),
    ("'RIGHT', 'LEFT'", "'LEFT', 'RIGHT'"),
    ("HSETNX", "HSET"),
    ("math.max", "math.min"),
    ("first and ", ""),
    ("not ", ""),
)
WHOLE = re.compile(r"^\s*(redis\.call\(.*\)|if .* end|elseif .* end)\s*$")


def lua_lines(source: str) -> Iterator[int]:
    "Numbers of the lines inside scripts, from 0."
    inside = False
    for number, line in enumerate(source.splitlines()):
        if inside and line.startswith('"""'):
            inside = False
        elif inside:
            yield number
        elif re.match(r'[A-Z]+ = ([A-Z]+ \+ )?"""$', line):
            inside = True


def lua_mutants(module: str, source: str) -> Iterator[Mutant]:
    "Each line of a script without what can be left out of it, and with each comparison turned."
    lines = source.splitlines(keepends=True)
    for number in lua_lines(source):
        line = lines[number]
        replaced = {line.replace(a, b, 1) for a, b in SWAPS if a in line}
        if WHOLE.match(line):
            replaced.add("\n")
        for text in sorted(replaced - {line}):
            yield changed(
                module, source, "".join([*lines[:number], text, *lines[number + 1 :]])
            )


# Tests


def noticed(mutant: Mutant, copy: Path, tests: tuple[str, ...], seconds: float) -> bool:
    "Does a test fail, or not come to an end?"
    path = copy / mutant.module
    original = path.read_text()
    path.write_text(mutant.source)
    try:
        return not passes(copy, tests, seconds)
    finally:
        path.write_text(original)


def passes(copy: Path, tests: tuple[str, ...], seconds: float) -> bool:
    "Do all tests pass, in time?"
    command = [
        sys.executable,
        "-m",
        "pytest",
        *tests,
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "--timeout",
        str(seconds),
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        try:
            os.killpg(process.pid, 9)
        except ProcessLookupError:
            pass


def copied(folder: Path) -> Path:
    "A copy of the files that git knows or would add."
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return folder


def mutants_of(name: str) -> list[Mutant]:
    "All mutants of a room."
    found = []
    for module in ROOMS[name].modules:
        source = (ROOT / module).read_text()
        found += (lua_mutants if name == "scripts" else python_mutants)(module, source)
    return found


def try_room(name: str, most: int, seed: int, seconds: float) -> tuple[int, int]:
    "Try a room's mutants; prints who survives; returns how many were noticed, and of how many."
    found = mutants_of(name)
    chosen = found if len(found) <= most else random.Random(seed).sample(found, most)
    room = ROOMS[name]
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        if not passes(copy, room.tests, seconds):
            sys.exit(f"{name}: the tests fail without a mutation; run bin/test first")
        count = 0
        for number, mutant in enumerate(chosen, start=1):
            good = noticed(mutant, copy, room.tests, seconds)
            count += good
            print(f"\r{name} {number}/{len(chosen)}, noticed {count}", end="", file=sys.stderr)
            if not good:
                print(
                    f"\n{mutant.module}:{mutant.line}\n  - {mutant.was}\n  + {mutant.now}",
                    flush=True,
                )
    print(file=sys.stderr)
    return count, len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bin/mutants",
        description="Break the code on purpose, one "
        "small change at a time, and look whether a test notices.",
    )
    parser.add_argument(
        "room", nargs="*", metavar="ROOM", help=f"of {', '.join(ROOMS)}; all if none is named"
    )
    parser.add_argument(
        "--most", type=int, default=40, help="mutants a room, drawn at random (default 40)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=300,
        help="until tests that hang have noticed (default 300)",
    )
    given = parser.parse_args()
    unknown = [name for name in given.room if name not in ROOMS]
    if unknown:
        parser.error(f"there is no room {unknown[0]}; it may be one of {', '.join(ROOMS)}")
    table = {
        name: try_room(name, given.most, given.seed, given.seconds)
        for name in given.room or ROOMS
    }
    print("\nroom        noticed")
    for name, (count, total) in table.items():
        print(f"{name:11} {count} of {total} ({count / total:.0%})")


if __name__ == "__main__":
    main()
