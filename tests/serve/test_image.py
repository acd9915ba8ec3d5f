"""What the image of the Prediction API holds, without Docker: the locked packages in an environment of their own, and its command.

The service runs there with a limit of 0 bytes on files: whatever it tried to write would end it.
"""

import json
import re
import resource
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
from serving import photograph, saved, small_model

from snn.data import models
from snn.deploy.wheels import Target, find_python, here, wheels


@pytest.fixture(scope="module")
def dockerfile(root) -> str:
    return (root / "infra" / "service" / "Dockerfile").read_text()


def commands(dockerfile: str) -> list[list[str]]:
    "The health check and the command."
    return [json.loads(found) for found in re.findall(r"CMD (\[.*\])", dockerfile)]


def test_the_base_is_pinned_and_the_user_is_nobody_special(dockerfile):
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.M)
    assert len(set(bases)) == 1 and re.fullmatch(
        r"public\.ecr\.aws/docker/library/python:3\.13\.\d+-slim-\w+", bases[0]
    )
    assert (
        "--require-hashes" in dockerfile
        and dockerfile.index("USER 10001") < dockerfile.rindex("CMD")
        and "ADD " not in dockerfile
    )


def test_only_what_the_image_needs_is_sent_to_the_builder(root, dockerfile):
    lines = [
        line
        for line in (root / "infra" / "service" / "Dockerfile.dockerignore")
        .read_text()
        .splitlines()
        if not line.startswith("#")
    ]
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word.rstrip("/")
        for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.M)
        for word in line.split()[:-1]
    }
    assert lines[0] == "*" and let_in == copied


@pytest.fixture(scope="module")
def environment(tmp_path_factory, root) -> Path:
    "An environment of the locked wheels and snn, as the Dockerfile makes it."
    python = find_python("3.13")
    if not python:
        pytest.skip("no Python 3.13, which the image has")
    folder = tmp_path_factory.mktemp("image") / "snn"
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [
            *pip,
            "install",
            "--no-compile",
            "--no-deps",
            "--no-index",
            *wheels("service", Target("3.13", here().machine)),
        ],
        check=True,
    )
    source = folder.parent / "source"
    shutil.copytree(root / "snn", source / "snn")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    subprocess.run(
        [*pip, "install", "--no-compile", "--no-deps", "--no-build-isolation", source],
        check=True,
    )
    subprocess.run([*pip, "uninstall", "--yes", "setuptools", "pip"], check=True)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory, small_data) -> Path:
    "The folder /model."
    folder = tmp_path_factory.mktemp("model")
    models.write(small_model(size=8), folder / "params.h5")
    (folder / "datasets.h5").write_bytes(small_data.read_bytes())
    (folder / "run.json").write_text("{}")
    return folder


def test_the_command_serves_from_the_locked_packages_alone_and_writes_nothing(
    environment, files, dockerfile, until
):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    at_home = lambda words: [
        word.replace("/model/", f"{files}/")
        .replace("8000", str(port))
        .replace("0.0.0.0", "127.0.0.1")
        for word in words
    ]
    check, command = map(at_home, commands(dockerfile))
    options = dict(
        env={
            "PATH": f"{environment}/bin:/usr/bin:/bin",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        cwd="/",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    healthy = lambda: (
        subprocess.run(
            [environment / "bin" / "python", *check[1:]], **options, capture_output=True
        ).returncode
        == 0
    )
    assert not healthy()
    with subprocess.Popen(
        [environment / "bin" / "snn", *command[1:]],
        **options,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        until(lambda: process.poll() is not None or healthy(), "it is healthy")
        assert process.poll() is None, process.stdout.read()
        ask = lambda path, **more: json.load(
            urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{port}{path}", **more)
            )
        )
        assert ask("/model")["evaluation"]["images"] == 42
        form = (
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
            + saved(photograph(900, 700))
            + b"\r\n--x--\r\n"
        )
        assert ask(
            "/predict?explain=true",
            data=form,
            headers={"Content-Type": "multipart/form-data; boundary=x"},
        )["predictions"][0]["explanation"]
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode in (0, 143) and not healthy()
