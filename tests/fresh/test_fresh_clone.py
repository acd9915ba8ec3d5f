"""What a clone does that was just made, copied, moved, interrupted, or that lies in a strange place: `bin/test --fresh`.

The clones run the project's own scripts and code. Only their packages come from here and not from a network: their lock
files are empty, and a backend of our own links to the packages that these tests run with.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(900)  # makes many environments
BUILD = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def run(command, folder, **environment) -> subprocess.CompletedProcess:
    "Run a script as a user would, with no index of packages."
    ours = ("PYTHON", "PYTHONPATH", "VIRTUAL_ENV")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**inherited, "PIP_NO_INDEX": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def stub(folder: Path) -> Path:
    "Make the installation of a clone one that needs no network."
    text = (folder / "pyproject.toml").read_text()
    text = re.sub(r"\[build-system\]\n.*?\n(?=\[)", BUILD, text, count=1, flags=re.S)
    (folder / "pyproject.toml").write_text(text)
    for lock in (folder / "requirements").glob("*.txt"):
        lock.write_text("# empty\n")
    shutil.copy(Path(__file__).with_name("backend.py"), folder)
    (folder / "packages").write_text(sysconfig.get_path("purelib"))
    return folder


@pytest.fixture
def clone(tmp_path) -> Path:
    "A copy of the files that git knows, in a folder whose name is not simple."
    folder = tmp_path / "a clone, à côté"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.strip("\0").split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return stub(folder)


def code_of(folder: Path) -> Path:
    "Where the environment of a clone takes the project's code from."
    command = [folder / ".venv/bin/python", "-P", "-c", "import snn; print(snn.__file__)"]
    done = run(command, "/")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture
def train(parameters, small_data, tmp_path):
    "Trains for two epochs by the script of a clone; returns what it said."

    def train(script: Path, folder: Path, **environment) -> subprocess.CompletedProcess:
        given, out = tmp_path / "parameters.json", tmp_path / "trained"
        given.write_bytes(msgspec.json.encode(parameters((3, 1), epochs=2)))
        command = [script, "--data", small_data, "--parameters", given, "--out", out]
        done = run([*command, "--workers", "1"], folder, **environment)
        assert done.returncode == 0, done.stderr
        assert {"params.h5", "cost.png"} <= {path.name for path in out.iterdir()}
        assert "Traceback" not in done.stdout + done.stderr
        return done

    return train


def test_copied_and_moved_clones_run_their_own_code(clone, train, tmp_path):
    "From another folder, through a symbolic link, under CDPATH; the second time nothing is installed."
    link = tmp_path / "link"
    link.symlink_to(clone / "bin" / "train")
    settings = {"CDPATH": f"{clone}:{tmp_path}:."}
    assert "Installing" in train(link, tmp_path, **settings).stderr
    assert "Installing" not in train(link, tmp_path, **settings).stderr
    copy, moved = tmp_path / "copy", tmp_path / "moved"
    subprocess.run(["cp", "-a", clone, copy], check=True)
    assert code_of(copy).is_relative_to(clone)  # so far
    train(copy / "bin" / "train", tmp_path)
    assert code_of(copy).is_relative_to(copy) and code_of(clone).is_relative_to(clone)
    copy.rename(moved)
    assert "Installing" in train(moved / "bin" / "train", tmp_path).stderr
    assert code_of(moved).is_relative_to(moved)


LONG = "a-folder-for-what-is-not-kept-whose-name-is-far-too-long-for-a-socket-" * 2
SETTINGS = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "AWS_PROFILE": "nobody",
    "AWS_CONFIG_FILE": "/nowhere",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "CONDA_PREFIX": "/opt/conda",
    "CONDA_DEFAULT_ENV": "base",
    "PIP_USER": "1",
    "PIP_REQUIRE_VIRTUALENV": "1",
    "PIP_CONSTRAINT": "/nowhere/constraints.txt",
    "PYTHONDONTWRITEBYTECODE": "1",  # as in many containers
}


def test_the_users_settings_and_temporary_folder_change_nothing(clone, train, tmp_path):
    mine, home, temporary = tmp_path / "mine", tmp_path / "home", tmp_path / f"%#?{LONG}"
    for folder in (mine, home, temporary):
        folder.mkdir()
    (mine / "numpy.py").write_text("raise SystemExit('not the numpy of the project')\n")
    (mine / "sitecustomize.py").write_text("raise SystemExit('not ours')\n")
    (home / "pip.conf").write_text(
        f"[install]\ntarget = {tmp_path / 'elsewhere'}\nuser = true\n"
    )
    settings = SETTINGS | {"PYTHONPATH": str(mine), "TMPDIR": str(temporary)}
    settings |= {
        "PIP_TARGET": str(tmp_path / "elsewhere"),
        "PIP_CONFIG_FILE": str(home / "pip.conf"),
    }
    train(clone / "bin" / "train", mine, **settings)
    assert code_of(clone).is_relative_to(clone)
    assert not (tmp_path / "elsewhere").exists()
    compiled = list((clone / "snn" / "handlers").glob("__pycache__/*.pyc"))
    assert compiled, "each process compiles anew what it imports"
    assert not list(temporary.iterdir())


def test_two_first_calls_at_once_both_succeed(clone):
    "And a third, after both were killed in the middle."
    command = [clone / "bin" / "venv", "notebooks"]
    environment = os.environ | {"PIP_NO_INDEX": "1"}
    start = lambda: subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    both = [start(), start()]
    while not (clone / ".venv" / "pyvenv.cfg").exists():
        assert any(process.poll() is None for process in both)
    for process in both:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (clone / ".venv" / "installed-notebooks").exists()
    both = [start(), start()]
    said = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("Installing" in text for text in said) == 1
    assert sum("waiting" in text for text in said) == 1
    assert code_of(clone).is_relative_to(clone)


def test_a_folder_that_may_only_be_read(clone, train, tmp_path):
    "Without .venv a sentence; with one, training works, and leaves what it leaves elsewhere."
    program = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    closed = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-ec",
        program,
        "sh",
        clone,
    ]
    if run([*closed, "true"], tmp_path).returncode:
        pytest.skip("no mount namespace may be made here")
    done = run([*closed, clone / "bin" / "venv"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"{clone / '.venv'} can't be written (Read-only file system), so .venv can't be made or changed; "
        "copy the project to a folder of your own."
    )
    assert run([clone / "bin" / "venv"], tmp_path).returncode == 0
    script = tmp_path / "closed"
    script.write_text(
        f'#!/bin/sh\nexec {" ".join(map(repr, map(str, closed)))} "{clone}/bin/train" "$@"\n'
    )
    script.chmod(0o755)
    train(script, tmp_path)


def test_another_interpreter_or_a_changed_project_is_installed_anew(clone, tmp_path):
    venv = [clone / "bin" / "venv"]
    assert "Installing" in run(venv, tmp_path).stderr
    assert run(venv, tmp_path).stderr == ""
    os.utime(clone / "pyproject.toml", (0, 0))  # an older time, a newer text
    with open(clone / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    assert "Installing" in run(venv, tmp_path).stderr
    (clone / "requirements" / "base.txt").write_text("# another lock\n")
    assert "Installing" in run(venv, tmp_path).stderr
    (clone / ".venv" / "bin" / "python").unlink()
    (clone / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    assert "making it anew" in run(venv, tmp_path).stderr
    assert code_of(clone).is_relative_to(clone)
    for other in ("python3.11", "python3.12", "python3.13"):
        ask = [other, "-c", "import sys; print(sys.implementation.cache_tag)"]
        if shutil.which(other) and (tag := run(ask, tmp_path)).returncode == 0:
            if tag.stdout.strip() != sys.implementation.cache_tag:
                assert "making it anew" in run(venv, tmp_path, PYTHON=other).stderr
                assert tag.stdout.strip() in (clone / ".venv" / "made").read_text()
                return


def wheel(folder: Path, version: int) -> str:
    "Write a wheel of a small package; returns its hash."
    path = folder / f"thing-{version}-py3-none-any.whl"
    info = f"thing-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("thing.py", f"VERSION = {version}\n")
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: thing\nVersion: {version}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(
            f"{info}/RECORD",
            f"thing.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_lock_is_what_is_installed_unless_the_newest_are_asked_for(clone, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    first, _ = wheel(wheels, 1), wheel(wheels, 2)
    text = (clone / "pyproject.toml").read_text()
    text = re.sub(
        r"^dependencies = \[.*?^\]", 'dependencies = ["thing"]', text, flags=re.S | re.M
    )
    (clone / "pyproject.toml").write_text(text)
    lock, venv = clone / "requirements" / "base.txt", clone / "bin" / "venv"
    version = lambda: run(
        [clone / ".venv/bin/python", "-c", "import thing; print(thing.VERSION)"], tmp_path
    ).stdout.strip()
    source = {"PIP_FIND_LINKS": str(wheels)}

    lock.write_text(f"thing==1 --hash=sha256:{'0' * 64}\n")
    done = run([venv], tmp_path, **source)
    assert done.returncode == 1 and "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    lock.write_text(f"thing==1 --hash=sha256:{first}\n")
    assert run([venv], tmp_path, **source).returncode == 0 and version() == "1"
    done = run([venv, "--newest"], tmp_path, **source)
    assert done.returncode == 0 and version() == "2", done.stderr
    assert run([venv], tmp_path, **source).stderr == "" and version() == "2"


def test_git_may_be_told_to_turn_line_ends(tmp_path):
    "A clone under core.autocrlf, as the installer of Git for Windows proposes it."
    folder = tmp_path / "clone"
    command = ["git", "clone", "-q", "-c", "core.autocrlf=true", f"file://{ROOT}", folder]
    subprocess.run(command, check=True, capture_output=True)
    for script in sorted((folder / "bin").iterdir()):
        assert b"\r" not in script.read_bytes(), script
    assert run([stub(folder) / "bin" / "venv", "nothing"], tmp_path).returncode == 2


def test_what_is_no_extra_is_refused(clone, tmp_path):
    done = run([clone / "bin" / "venv", "everything"], tmp_path)
    assert done.returncode == 2 and not (clone / ".venv").exists()
    assert done.stderr.startswith(
        "everything is no extra; there are: estimate, notebooks, serve,"
    )
