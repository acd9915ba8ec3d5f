"""Folders, shells and settings of strangers do not change what the commands do."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import nbformat
import pytest

from snn.cli.console import PlainConsole, TrainingProgress
from snn.cloud.runs import Status
from snn.data import h5 as data
from snn.errors import InputError
from snn.local.pipeline import run_notebook
from snn.local.training import Progress

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


def test_what_a_matplotlibrc_says_changes_no_picture(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: nowhere\n")
    program = "from pathlib import Path; from snn.local.training import plot_costs; plot_costs([1, 0.5], 0.1, Path('cost.png'))"
    subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, check=True)
    assert (tmp_path / "cost.png").is_file()


@pytest.fixture
def arguments(parameters, small_data, tmp_path):
    "What snn train is given, without --out."
    given = tmp_path / "parameters.json"
    given.write_bytes(msgspec.json.encode(parameters((3, 1), epochs=2)))
    return ["train", "--data", small_data, "--parameters", given, "--workers", 1]


def test_a_picture_that_can_not_be_drawn_is_a_note(arguments, snn, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("snn.local.training.plot_costs", fail)
    code, said, _ = snn(*arguments, "--out", tmp_path / "out")
    assert code == 0
    assert "note            cost.png could not be drawn: No space left on device" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "params.h5",
        "results.json",
        "run.json",
    ]


def test_what_would_stop_the_end_stops_the_beginning(arguments, snn, tmp_path, monkeypatch):
    monkeypatch.setattr("snn.local.training.LocalCloud", lambda *_, **__: pytest.fail("begun"))
    (tmp_path / "out" / "params.h5").mkdir(parents=True)
    code, _, said = snn(*arguments, "--out", tmp_path / "out")
    assert code == 2 and said.splitlines()[-1] == (
        f"{tmp_path / 'out' / 'params.h5'}: is a folder; a file of this name is left at the end"
    )


def test_two_runs_do_not_leave_their_files_in_one_folder(arguments, snn, tmp_path):
    out = tmp_path / "out"
    program = f"from pathlib import Path; from snn.local.training import alone_in\nwith alone_in(Path({str(out)!r})): print('held', flush=True); input()"
    command = [sys.executable, "-P", "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        code, _, said = snn(*arguments, "--out", out)
        assert code == 2 and said.splitlines()[-1] == (
            f"{out}: another run leaves its files here; wait for its end, or give another --out"
        )
        assert not list(out.iterdir())
        other.kill()
    assert snn(*arguments, "--out", out)[0] == 0


def test_who_has_no_home_gets_another_cache_folder(tmp_path, monkeypatch):
    "A file where a folder should be keeps out root too."
    (tmp_path / "home").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    temporary = tmp_path / f"snn-cache-{os.getuid()}"
    assert data.cache_folder() == temporary and temporary.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", "~")  # as where neither HOME nor a user is known
    assert data.cache_folder() == temporary
    temporary.rmdir()
    temporary.symlink_to("/nowhere")
    with pytest.raises(InputError, match="set XDG_CACHE_HOME to one that can be written to"):
        data.cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.cache_folder() == tmp_path / "cache" / "snn"


def test_a_stage_runs_in_this_environment_whatever_is_called_python3(tmp_path, monkeypatch):
    "As where another environment has put its kernel first in JUPYTER_PATH."
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    other = {"argv": ["false"], "display_name": "Python 3", "language": "python"}
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(other))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    cell = nbformat.v4.new_code_cell("import sys; print(sys.executable)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "stage.ipynb")
    ran = run_notebook(tmp_path / "stage.ipynb", tmp_path / "ran.ipynb", {})
    outputs = nbformat.read(ran, 4).cells[-1].outputs
    assert outputs[0].text.strip() == sys.executable


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


def test_ctrl_c_while_the_command_is_imported_ends_it_without_a_word(tmp_path):
    text = "print('importing', flush=True)\nimport time\ntime.sleep(60)\n"
    (tmp_path / "typer.py").write_text(text)
    started = subprocess.Popen(
        [sys.executable, "-m", "snn", "train"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with started as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and said == ("", "")


def test_where_only_ascii_can_be_shown_all_can_be_said(tmp_path):
    command = [sys.executable, "-m", "snn", "data", "check", tmp_path / "mačky × →.h5"]
    settings = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, env=settings, capture_output=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert b"ma\\u010dky \\xd7 \\u2192.h5: " in done.stderr and b"Traceback" not in done.stderr


def test_colours_that_are_forced_into_a_file_bring_no_cursor(tmp_path):
    with open(tmp_path / "log", "w+") as log:
        with TrainingProgress(10, console=PlainConsole(file=log, force_terminal=True)) as bar:
            bar.report(Progress(Status(epoch=1, cost=0.5), 100, 1.0))
        log.seek(0)
        assert "\x1b[" not in log.read()
