"""Writes the lock files anew, with the newest releases that fit pyproject.toml: `python requirements/lock.py` (needs uv).

There is one file for each extra, and base.txt for none. Each names the extras that it builds upon and then what it adds,
by version and hash, for every system and every Python from 3.11 on. bin/venv installs from them.
"""

import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent / "pyproject.toml"
LOWEST = "3.11"
Pins = dict[str, str]  # `name==version ; marker`: its lines, with hashes


def parents(extra: str, extras: dict[str, list[str]]) -> list[str]:
    "The extras that one builds upon, as in `snn[notebooks,serve]`; base where it names none."
    named = [re.match(r"snn\[(.+)\]", requirement) for requirement in extras[extra]]
    return [name for match in named if match for name in match[1].split(",")] or ["base"]


def resolve(options: list[str], build: list[str], constraints: Path | None = None) -> Pins:
    "What uv would install, for all systems at once."
    command = ["uv", "pip", "compile", PROJECT, "-", "--universal", "--generate-hashes"]
    command += ["--python-version", LOWEST, "--no-emit-index-url", "--no-emit-find-links"]
    command += ["--no-header", "--no-annotate", "--quiet", *options]
    if constraints:
        command += ["--constraints", constraints]
    done = subprocess.run(
        command, input="\n".join(build), text=True, stdout=subprocess.PIPE, check=True
    )
    blocks = re.findall(r"^\S.*(?:\n\s.*)*", done.stdout, re.M)
    return {block.partition(" \\\n")[0]: block for block in blocks}


def write(path: Path, pins: Pins, upon: list[str]) -> None:
    "Write a lock file: what it builds upon, and what it adds."
    first = [
        "# Written by lock.py; what bin/venv installs.",
        *(f"-r {name}.txt" for name in upon),
    ]
    path.write_text("\n".join([*first, *(pins[pin] for pin in sorted(pins))]) + "\n")


def main() -> None:
    "Resolve all extras together, so that all files agree; then each alone, within that."
    project = tomllib.loads(PROJECT.read_text())
    extras, build = (
        project["project"]["optional-dependencies"],
        project["build-system"]["requires"],
    )
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(folder, "everything.txt")
        write(everything, resolve(["--all-extras"], build), [])
        known = {"base": resolve([], build, everything)}
        write(FOLDER / "base.txt", known["base"], [])
        for extra in extras:
            known[extra] = resolve(["--extra", extra], build, everything)
        for extra in extras:
            upon = parents(extra, extras)
            there = set().union(*(known[name] for name in upon))
            added = {pin: text for pin, text in known[extra].items() if pin not in there}
            write(FOLDER / f"{extra}.txt", added, upon)


if __name__ == "__main__":
    main()
