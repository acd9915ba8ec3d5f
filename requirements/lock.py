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
ALONE = ["checkov"]  # pins too much to share an environment with; .ci/run installs it
Pins = dict[str, str]  # `name==version ; marker`: its lines, with hashes


def parents(extra: str, extras: dict[str, list[str]]) -> list[str]:
    "The extras that one builds upon, as in `snn[notebooks,serve]`; base where it names none."
    named = [re.match(r"snn\[(.+)\]", requirement) for requirement in extras[extra]]
    return [name for match in named if match for name in match[1].split(",")] or ["base"]


def resolve(names: list[str], *options: str | Path) -> Pins:
    "What uv would install of what is named, and of what the options add, for all systems at once."
    command = ["uv", "pip", "compile", "-", "--universal", "--generate-hashes"]
    command += ["--python-version", LOWEST, "--no-emit-index-url", "--no-emit-find-links"]
    command += ["--no-header", "--no-annotate", "--quiet", *options]
    done = subprocess.run(
        command, input="\n".join(names), text=True, stdout=subprocess.PIPE, check=True
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
    extras = project["project"]["optional-dependencies"]
    build = project["build-system"]["requires"]
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(folder, "everything.txt")
        write(everything, resolve(build, PROJECT, "--all-extras"), [])
        within = (PROJECT, "--constraints", everything)
        known = {name: resolve(build, *within, "--extra", name) for name in extras}
        known["base"] = resolve(build, *within)
    write(FOLDER / "base.txt", known["base"], [])
    for name in extras:
        upon = parents(name, extras)
        there = set().union(*(known[parent] for parent in upon))
        added = {pin: text for pin, text in known[name].items() if pin not in there}
        write(FOLDER / f"{name}.txt", added, upon)
    for name in ALONE:
        write(FOLDER / f"{name}.txt", resolve([name]), [])


if __name__ == "__main__":
    main()
