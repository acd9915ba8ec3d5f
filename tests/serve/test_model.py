"The model that answers: loaded carefully, and replaced without a dropped request."

import os
import signal
import subprocess
import sys
import threading

import httpx2
import numpy as np
import pytest
from serving import photograph, saved, small_model

from snn.cli.serve import serve
from snn.data.models import write
from snn.errors import InputError
from snn.serve import api
from snn.serve.model import Live, Sources, model_id


def test_a_new_model_takes_over_without_a_dropped_request(running, model_path, until):
    url, _ = running(look=0.05)
    ids = [model_id(small_model(seed)) for seed in range(4)]
    expected = {model_id(small_model(seed)): None for seed in range(4)}
    answers, stop, content = [], threading.Event(), saved(photograph())

    def ask():
        with httpx2.Client() as client:
            while not stop.is_set():
                answers.append(
                    client.post(f"{url}/predict", files=[("image", ("a.png", content))] * 2)
                )

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for seed in (0, 1, 2, 3):
        if seed:
            write(small_model(seed), model_path)
        until(
            lambda: answers and answers[-1].json()["model"] == ids[seed],
            f"model {seed} answers",
        )
    stop.set()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["model"] for answer in answers} == set(ids)
    for (
        answer
    ) in answers:  # both pictures of a request by one model, and by the one that it names
        first, second = answer.json()["predictions"]
        assert first["probability"] == second["probability"]
        known = expected[answer.json()["model"]] or first["probability"]
        expected[answer.json()["model"]] = known
        assert known == first["probability"]


def test_a_broken_new_model_changes_nothing(make_client, model_path, until, monkeypatch):
    looks, refresh = [], Live.refresh

    def counted(self):
        looks.append(1)
        return refresh(self)

    monkeypatch.setattr(Live, "refresh", counted)
    client = make_client(look=0.05)
    model_path.write_text("not a model")
    until(
        lambda: "snn_refused_models_total 1.0" in client.get("/metrics").text,
        "the broken model was refused",
    )
    assert client.get("/readyz").json()["model"] == model_id(small_model())
    model_path.unlink()
    looks.clear()
    until(lambda: len(looks) >= 2, "it was looked for twice since it is gone")
    assert (
        client.post("/predict", files=[("image", ("a.png", saved(photograph())))]).status_code
        == 200
    )
    write(small_model(1), model_path)
    until(
        lambda: client.get("/readyz").json()["model"] == model_id(small_model(1)),
        "the new model answers",
    )
    assert client.get("/readyz").json()["model"] == model_id(small_model(1))


def test_the_same_weights_have_the_same_name(tmp_path):
    write(small_model(), tmp_path / "a.h5")
    write(small_model(), tmp_path / "b.h5")
    assert (
        Live(Sources(tmp_path / "a.h5")).current.id
        == Live(Sources(tmp_path / "b.h5")).current.id
        != model_id(small_model(1))
    )


def test_a_missing_or_broken_model_is_told_before_anything_starts(tmp_path, model_path):
    (tmp_path / "text.h5").write_text("not a model")
    (tmp_path / "half.h5").write_bytes(model_path.read_bytes()[:3000])
    broken = small_model()
    write(
        broken._replace(layers=[(W * np.nan, b) for W, b in broken.layers]),
        tmp_path / "nan.h5",
    )
    for name, words in {
        "missing.h5": "no such file",
        "text.h5": "not a model file",
        "half.h5": "not a model file",
        "nan.h5": "W1 holds",
    }.items():
        with pytest.raises(InputError, match=words):
            serve(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        serve(model_path, data=tmp_path / "none.h5")
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(InputError, match="must be an object"):
        serve(model_path, run=tmp_path / "run.json")


def test_a_taken_port_is_told(model_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(InputError, match="choose another with --port"):
            serve(model_path, port=taken.getsockname()[1])


def test_a_missing_extra_is_told(model_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("snn.serve.api")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(
        InputError,
        match=r"serving needs the package fastapi; install it with: pip install 'snn\[serve\]'",
    ):
        serve(model_path)


def test_the_command_imports_no_framework():
    code = "import sys, snn.cli.serve; sys.exit(any(name in sys.modules for name in ('fastapi', 'uvicorn', 'httpcore2')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command_serves_from_a_folder_that_it_may_not_write_to_and_ends_when_told(
    model_path, tmp_path
):
    "As in the container: nothing is written anywhere, and SIGTERM ends it."
    code = f"from pathlib import Path; from snn.cli.serve import serve; serve(Path({str(model_path)!r}), port=0)"
    nowhere = {
        **os.environ,
        "TMPDIR": "/nonexistent",
        "HOME": "/nonexistent",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=nowhere,
    )
    try:
        line = process.stdout.readline()
        url = line.split(" answers at ")[1].split()[0]
        large = saved(
            photograph(1000, 700)
        )  # several MiB, which a form parser likes to put on the disk
        assert (
            len(large) > 2**20
            and httpx2.post(f"{url}predict", files=[("image", ("a.png", large))]).status_code
            == 200
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_an_early_refusal_reaches_the_client(running):
    "A real server: the 413 arrives although the body has not been read."
    url, _ = running()
    answer = httpx2.post(
        f"{url}/predict",
        content=bytes(12 * 2**20),
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    assert answer.status_code == 413 and answer.json()["type"] == "/docs#too-large"


def test_requests_beyond_the_places_are_refused_at_once_and_the_others_answered(
    running, monkeypatch, until
):
    refused, think = threading.Event(), api.predict

    def held(*rest):
        refused.wait(60)
        return think(*rest)

    monkeypatch.setattr(
        api, "predict", held
    )  # those that have a place keep it until another was refused
    url, _ = running(requests=2, threads=1)
    content, statuses = saved(photograph(900, 700)), []

    def ask():
        statuses.append(
            httpx2.post(
                f"{url}/predict", files=[("image", ("a.png", content))], timeout=120
            ).status_code
        )

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    until(lambda: 503 in statuses, "one was refused")
    refused.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 503} and httpx2.get(f"{url}/readyz").status_code == 200
