"""No command shows the password of a parameter server, whatever is wrong with its address."""

import json
import re

import pytest
import typer

from snn.backends.valkey.store import shown
from snn.cli.main import app
from snn.local.server import Server

ADDRESSES = [
    "unix://:hidden@{folder}/nobody.sock",
    "redis://somebody:hidden@127.0.0.1:1",
    "redis://:9753/hidden@127.0.0.1:1",
    "redis://:9753#hidden@127.0.0.1:1",
    "redis://:9753?hidden@127.0.0.1:1",
    "redis://:x@hidden@127.0.0.1:1",
    "redis://:hi%64den:hidden@127.0.0.1:1/0",
    "redis://127.0.0.1:1?password=hidden",
    "redis://:hidden[@127.0.0.1:1",
    "redis://:hidden@127.0.0.1:port",
    "http://:hidden@127.0.0.1:1",
    "hidden@127.0.0.1:1",
    "hidden",
]
# What each command is given, to come as far as the parameter server if it asks one.
GIVEN = {
    "train": ["--quiet", "--parameters", "p.json", "--data", "d.h5"],
    "local": [],
    "live": ["run", "--data", "d.h5"],
    "pipeline": ["--parameters", "p.json", "--data", "d.h5"],
    "runs": [],
    "status": ["run"],
    "stop": ["run"],
    "resume": ["run"],
    "faults": [],
    "bench": ["--parameters", "p.json", "--quick"],
    "replay": "run --epoch 0 --batch 0 --layer 1 --neuron 0 --data d.h5".split(),
    "tune": ["p.json", "--data", "none.h5"],
    "data": ["info", "none.h5"],
    "predict": ["--model", "none.h5", "none.png"],
    "evaluate": ["--model", "none.h5", "--data", "d.h5"],
    "serve": ["--model", "none.h5"],
    "estimate": ["--parameters", "none.json"],
    "upload": ["--stack", "Cats", "--data", "none.h5"],
}
ON_AWS = {
    "package",
    "deploy",
    "destroy",
    "watch",
    "approve",
    "sleep",
    "wake",
    "doctor",
    "smoke",
}


def test_every_command_is_tried():
    assert set(typer.main.get_command(app).commands) == GIVEN.keys() | ON_AWS


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_address_is_printed_with_its_password(address, tmp_path):
    said = shown(address.format(folder=tmp_path))
    assert "hidden" not in said and "9753" not in said


@pytest.mark.parametrize("command", sorted(GIVEN))
def test_no_command_shows_a_password(
    command, snn, parameters, small_data, tmp_path, monkeypatch
):
    wait = Server.wait
    monkeypatch.setattr(Server, "wait", lambda self, ready, *_: wait(self, ready, 0.01))
    monkeypatch.chdir(tmp_path)
    for name, value in (("http_proxy", "hidden"), ("AWS_SECRET_ACCESS_KEY", "hidden")):
        monkeypatch.setenv(name, value)
    network = {"layer1": 3, "layer2": 1}
    values = {"epochs": 1, "layers": 2, "neurons": network, "learning_rate": 0.1}
    values |= {"activations": {"layer1": "relu", "layer2": "sigmoid"}, "threshold": 0}
    (tmp_path / "p.json").write_text(json.dumps(values | {"batch_size": 64}))
    (tmp_path / "d.h5").write_bytes(small_data.read_bytes())
    for address in ADDRESSES[: 1 if command == "pipeline" else None]:  # it runs notebooks
        monkeypatch.setenv("SNN_REDIS_URL", address.format(folder=tmp_path))
        code, out, err = snn(command, *GIVEN[command])
        assert code in (1, 2) and "hidden" not in out + err, address
        assert "Traceback" not in err, err
        assert command == "pipeline" or len(err.strip().splitlines()) <= 1, err
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"hidden" in path.read_bytes() for path in left)


def test_no_notebook_keeps_an_address_with_a_password(root):
    secret = re.compile(r"\b(rediss?|unix)://[^\s@\"'/]*:[^\s@\"']+@")
    for path in (root / "nbs").rglob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        said = json.dumps([cell.get("outputs", []) for cell in cells])
        assert not secret.search(said), path
