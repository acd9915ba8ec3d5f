"""The lock files hold all that pyproject.toml asks for, for each Python, by version and hash."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {"base": [], **PROJECT["project"]["optional-dependencies"]}
SYSTEMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]


def blocks(extra: str) -> list[str]:
    "What a lock file and those that it builds upon install: a requirement with its hashes each."
    text = (ROOT / "requirements" / f"{extra}.txt").read_text()
    upon = re.findall(r"^-r (\S+)\.txt$", text, re.M)
    own = re.findall(r"^[^\s#-].*(?:\n\s.*)*", text, re.M)
    return [*own, *(block for name in upon for block in blocks(name))]


def environment(python: str, system: str, machine: str) -> dict[str, str]:
    "Where a requirement with a condition is looked at."
    return default_environment() | {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "sys_platform": system,
        "platform_machine": machine,
        "platform_system": system.capitalize(),
        "os_name": "posix",
    }


def holds(requirement: Requirement, place: dict[str, str], extra: str = "") -> bool:
    "Does a requirement hold there?"
    return not requirement.marker or requirement.marker.evaluate(place | {"extra": extra})


def locked(extra: str, place: dict[str, str]) -> dict[str, str]:
    "The version of each package that would be installed."
    pins = [Requirement(block.partition("\\")[0]) for block in blocks(extra)]
    found = {}
    for pin in pins:
        if holds(pin, place):
            (version,) = pin.specifier
            assert version.operator == "=="
            name = canonicalize_name(pin.name)
            assert found.setdefault(name, version.version) == version.version, pin
    return found


def asked(extra: str) -> list[str]:
    "What pyproject.toml asks for with an extra, with what that builds upon."
    found = list(PROJECT["project"]["dependencies"])
    for requirement in EXTRAS[extra]:
        upon = re.match(r"snn\[(.+)\]", requirement)
        found += [r for n in upon[1].split(",") for r in asked(n)] if upon else [requirement]
    return found


def missing(requirements: list[Requirement], have: dict[str, str]) -> list[str]:
    "Which of these are not in the lock, or in another version."
    fits = lambda r: (
        (version := have.get(canonicalize_name(r.name)))
        and r.specifier.contains(version, prereleases=True)
    )
    return [str(requirement) for requirement in requirements if not fits(requirement)]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("python", ["3.11.0", "3.11.14", "3.12.0", "3.13.0", "3.13.12"])
def test_the_lock_holds_what_the_project_asks_for(extra, python):
    for system, machine in SYSTEMS:
        place = environment(python, system, machine)
        wanted = [
            Requirement(text) for text in [*asked(extra), *PROJECT["build-system"]["requires"]]
        ]
        assert missing([r for r in wanted if holds(r, place)], locked(extra, place)) == []


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_lock_holds_what_its_packages_ask_for(extra):
    "As far as they are installed here in the version of the lock."
    have = locked(extra, default_environment())
    todo, seen = [(Requirement(text), "") for text in asked(extra)], set()
    while todo:
        wanted, within = todo.pop()
        name = canonicalize_name(wanted.name)
        if not holds(wanted, default_environment(), within):
            continue
        assert missing([wanted], have) == [], f"{wanted} in {extra}"
        for key in {(name, part) for part in ["", *wanted.extras]} - seen:
            seen.add(key)
            try:
                package = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue
            if package.version == have[name]:
                todo += [(Requirement(text), key[1]) for text in package.requires or []]


def test_each_package_has_its_hashes_and_no_file_names_an_index():
    for extra in EXTRAS:
        for block in blocks(extra):
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
        text = (ROOT / "requirements" / f"{extra}.txt").read_text()
        assert "://" not in text and "index" not in text


def test_the_kernel_is_one_that_loses_no_request():
    "Of 7.0 to 7.3, one kernel in five stood still within 600 requests: ipython/ipykernel#1554."
    lost = SpecifierSet(">=7,<7.4")
    (asked_for,) = [Requirement(r) for r in EXTRAS["notebooks"] if r.startswith("ipykernel")]
    pinned = locked("notebooks", environment("3.11.0", "linux", "x86_64"))["ipykernel"]
    for version in (pinned, metadata.version("ipykernel")):
        assert version in asked_for.specifier and version not in lost
