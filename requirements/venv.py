"""Makes .venv and installs the project into it, unless what is there fits.

Usage: bin/venv [--newest] [EXTRA]

EXTRA is one of pyproject.toml, such as notebooks or test. What is installed are the releases of the lock files in
requirements/. --newest takes the newest that pyproject.toml allows, then and in later calls; delete .venv to go back.
"""

import ast
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV, PROJECT, LOCKS = ROOT / ".venv", ROOT / "pyproject.toml", ROOT / "requirements"
PYTHON, MADE, INSTALLING = VENV / "bin" / "python", VENV / "made", VENV / "installing"
# The user's settings that say where packages come from. Those that say where they go, or which, are not for us.
SOURCES = {"index-url", "extra-index-url", "find-links", "no-index", "cert", "client-cert"}
SOURCES |= {
    "proxy",
    "trusted-host",
    "timeout",
    "default-timeout",
    "retries",
    "keyring-provider",
}


def read(path: Path) -> dict:
    "What was noted in a file; nothing where there is none."
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def interpreter() -> str:
    "Which Python the environment runs, if it runs, and has pip."
    ask = "import pip, platform, sys; print(sys.implementation.cache_tag, platform.machine())"
    try:
        done = subprocess.run(
            [PYTHON, "-I", "-c", ask],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def fits(newest: bool) -> bool:
    "Was the environment made here, whole, by the Python that it runs and that was asked for?"
    made, own = read(MADE), f"{sys.implementation.cache_tag} {platform.machine()}"
    return (
        not INSTALLING.exists()
        and made.get("place") == str(ROOT)
        and made.get("python") == interpreter()
        and (made["python"] == own or not os.environ.get("PYTHON"))
        and (made.get("newest", False) or not newest)
    )


def wanted(newest: bool) -> dict[str, str]:
    "What an installation depends on."
    locks = b"".join(path.read_bytes() for path in sorted(LOCKS.glob("*.txt")))
    sha = lambda data: hashlib.sha256(data).hexdigest()
    return {"project": sha(PROJECT.read_bytes()), "lock": "newest" if newest else sha(locks)}


@contextlib.contextmanager
def alone():
    "One at a time; released when the process ends, however that comes."
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("Another command is making .venv; waiting for it.", file=sys.stderr)
                fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def pip_environment() -> dict[str, str]:
    "The environment for pip, with the user's sources of packages and none of the user's other settings."
    said = subprocess.run(
        [PYTHON, "-I", "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True
    ).stdout
    found = {"global": {}, "install": {}, ":env:": {}}
    for line in said.splitlines():
        name, _, value = line.partition("=")
        section, _, name = name.rpartition(".")
        if section in found and name in SOURCES:
            found[section][name] = " ".join(ast.literal_eval(value).split())
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    for settings in found.values():
        keep |= {f"PIP_{k.upper().replace('-', '_')}": v for k, v in settings.items()}
    return keep | {"PIP_CONFIG_FILE": os.devnull}


def make(newest: bool) -> None:
    "Make the environment anew."
    if VENV.is_symlink():
        VENV.unlink()
    elif VENV.exists():
        print(
            "The .venv here is half made or belongs elsewhere; making it anew.",
            file=sys.stderr,
        )
        shutil.rmtree(VENV)
    VENV.mkdir()
    INSTALLING.touch()
    python = getattr(sys, "_base_executable", sys.executable)
    if subprocess.run([python, "-I", "-m", "venv", VENV]).returncode:
        sys.exit(f"{python} could not make .venv; on Debian, install python3-venv.")
    MADE.write_text(
        json.dumps({"place": str(ROOT), "python": interpreter(), "newest": newest}) + "\n"
    )


def install(extra: str, newest: bool) -> None:
    "Install what the project needs, and the project."
    print(
        f"Installing into .venv{extra and f' with {extra}'}; this is done once and takes about a minute.",
        file=sys.stderr,
    )
    INSTALLING.touch()
    pip = [PYTHON, "-I", "-m", "pip", "install", "--quiet", "--no-input", "--no-compile"]
    pip += ["--disable-pip-version-check"]
    if newest:
        where = f"{ROOT}[{extra}]" if extra else ROOT
        steps = [["--upgrade", "--upgrade-strategy", "eager", "--editable", where]]
    else:
        lock = LOCKS / f"{extra or 'base'}.txt"
        steps = [["--no-deps", "--require-hashes", "--requirement", lock]]
        steps += [["--no-deps", "--no-build-isolation", "--editable", ROOT]]
    environment = pip_environment()
    with open(VENV / "install.log", "w+") as log:
        for step in steps:
            if subprocess.run(
                [*pip, *step], env=environment, stdout=log, stderr=log
            ).returncode:
                INSTALLING.unlink()
                log.seek(0)
                said = "".join(log.readlines()[-20:])
                sys.exit(f"{said}The installation failed; all it said is in {log.name}")
    stamp(extra).write_text(json.dumps(wanted(newest)) + "\n")
    INSTALLING.unlink()


def stamp(extra: str) -> Path:
    "Where it is noted what was installed with an extra."
    return VENV / f"installed{extra and f'-{extra}'}"


def ready(extra: str, newest: bool) -> bool:
    "Is all there already?"
    return fits(newest) and read(stamp(extra)) == wanted(read(MADE)["newest"])


def main() -> None:
    "What bin/venv does."
    newest, rest = "--newest" in sys.argv[1:], [a for a in sys.argv[1:] if a != "--newest"]
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    if "--help" in rest or "-h" in rest:
        print(__doc__)
        return
    if len(rest) > 1 or (rest and rest[0] not in extras):
        print(
            f"{' '.join(rest)} is no extra; there are: {', '.join(extras)}.", file=sys.stderr
        )
        sys.exit(2)
    extra = rest[0] if rest else ""
    if ready(extra, newest):
        return
    try:
        with alone():
            if not fits(newest):
                make(newest)
            if not ready(extra, newest):
                install(extra, read(MADE)["newest"])
    except OSError as error:
        sys.exit(
            f"{error.filename or VENV} can't be written ({error.strerror}), so .venv can't be made or changed; "
            f"copy the project to a folder of your own."
        )
    except KeyboardInterrupt:
        sys.exit("Interrupted; the next call begins anew.")


if __name__ == "__main__":
    main()
