"""Folders, shells and settings of strangers do not change what the commands do."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

SNN = Path(sys.executable).parent / "snn"


@pytest.fixture
def train(parameters, small_data, tmp_path):
    "Runs snn train as a program in a folder of the user's, with changes to the environment."

    def run(folder: Path, **environment) -> subprocess.CompletedProcess:
        chosen = parameters((3, 1), epochs=2)
        (tmp_path / "parameters.json").write_bytes(msgspec.json.encode(chosen))
        given = ("--data", small_data, "--parameters", tmp_path / "parameters.json")
        command = [SNN, "train", *given, "--out", tmp_path / "out", "--workers", "1"]
        return subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_what_lies_in_the_users_folder_is_not_run(train, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("random", "json", "queue", "numpy", "redis", "snn", "ministack", "h5py"):
        text = (
            f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})\nraise SystemExit(3)\n"
        )
        (folder / f"{name}.py").write_text(text)
    done = train(folder)
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "params.h5").is_file()


@pytest.mark.parametrize(
    "backend", ["module://matplotlib_inline.backend_inline", "module://nowhere"]
)
def test_a_backend_that_is_not_there_does_not_end_a_training(backend, train, tmp_path):
    done = train(tmp_path, MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "cost.png").is_file()


@pytest.mark.parametrize("name", ["a%20b#c?d&e", "long-" * 30])
def test_a_temporary_folder_may_have_any_name(name, train, tmp_path):
    "Also one that is too long for a socket, or that means something in an address."
    (tmp_path / name).mkdir()
    done = train(tmp_path, TMPDIR=str(tmp_path / name))
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / name).iterdir())


@pytest.mark.parametrize(
    "script", ["train", "test", "deploy", "destroy", "lab", "pipeline", "venv", "mutants"]
)
def test_a_script_finds_its_folder_through_a_link_and_under_cdpath(script, root, tmp_path):
    "Stops as soon as the script has said what it takes for its folder."
    link = tmp_path / script
    link.symlink_to(root / "bin" / script)
    program = 'exit() { builtin exit 0; }; set -T; trap \'[ -z "${root:-}" ] || { echo "$root"; builtin exit 0; }\' DEBUG; source "$0"'
    done = subprocess.run(
        ["bash", "-c", program, link],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "CDPATH": f"{root}:{tmp_path}:."},
        timeout=30,
    )
    assert done.stdout.strip() == str(root), done.stderr


def test_a_clone_keeps_the_line_ends_that_bash_reads(root):
    asked = [
        "git",
        "check-attr",
        "eol",
        "--",
        "bin/train",
        "snn/__init__.py",
        "infra/main.yaml",
    ]
    said = subprocess.run(asked, cwd=root, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [
        f"{name}: eol: lf" for name in ("bin/train", "snn/__init__.py", "infra/main.yaml")
    ]
