"""The `snn` command: what it prints, what it leaves, and that it leaves nothing else."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from io import StringIO
from math import sqrt
from pathlib import Path

import boto3
import h5py
import msgspec
import numpy as np
import pytest
import redis
from PIL import Image
from rich.console import Console

from snn import __version__
from snn.cli import data as cli_data
from snn.data import h5 as data
from snn.data import models


@pytest.fixture(scope="module")
def parameters_file(parameters, tmp_path_factory) -> Path:
    "A parameters.json for a small network."
    path = tmp_path_factory.mktemp("parameters") / "parameters.json"
    path.write_bytes(
        msgspec.json.encode(
            parameters((4, 1), epochs=6, granularity="network", learning_rate=0.05)
        )
    )
    return path


@pytest.fixture(scope="module")
def training(run_snn, parameters_file, small_data, tmp_path_factory):
    "One run of snn train --json: exit code, standard output, standard error, and the folder."
    out = tmp_path_factory.mktemp("training") / "new" / "out"
    return *run_snn(
        "train", "--data", small_data, "--parameters", parameters_file, "--out", out, "--json"
    ), out


@pytest.fixture(scope="module")
def out(training) -> Path:
    "The folder of that run."
    return training[-1]


# train


def test_a_training_reads_its_data_set_once(
    snn, parameters_file, small_data, monkeypatch, tmp_path
):
    "The command, what it sends and the evaluation at the end share what was read."
    read, real = [], data.read
    for module in (data, cli_data):  # each knows it by a name of its own
        monkeypatch.setattr(
            module, "read", lambda path, **more: read.append(path) or real(path, **more)
        )
    options = ("--parameters", parameters_file, "--epochs", 1, "--out", tmp_path / "out", "-q")
    assert snn("train", "--data", small_data, *options)[0] == 0
    assert read == [small_data]


def test_train_says_its_outcome_as_json(training, small_data):
    code, said, error, out = training
    outcome = json.loads(said)
    assert code == 0 and "Traceback" not in error
    assert list(outcome) == [
        "run",
        "reason",
        "epochs",
        "cost",
        "evaluation",
        "invocations",
        "duplicates",
        "neurons",
        "seconds",
        "files",
        "notes",
    ]
    assert outcome["reason"] == "all 6 epochs are done" and outcome["epochs"] == 6
    assert outcome["invocations"] == 1 + 6 * (1 + 3) and outcome["duplicates"] == 0
    assert outcome["neurons"] == 5
    assert (
        outcome["evaluation"]["images"] == 42
        and sum(map(sum, outcome["evaluation"]["confusion"])) == 42
    )
    assert outcome["files"] == {
        name: str(out / name) for name in ("results.json", "run.json", "params.h5", "cost.png")
    }


def test_train_leaves_four_files_and_nothing_else(out):
    assert sorted(path.name for path in out.iterdir()) == [
        "cost.png",
        "params.h5",
        "results.json",
        "run.json",
    ]


def test_results_have_the_originals_shape(out):
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"Start", "End", *(f"epoch{i}" for i in range(6))}
    start, end = (
        datetime.strptime(results[name], "%Y-%m-%d %H:%M:%S.%f") for name in ("Start", "End")
    )
    assert start <= end
    for i in range(6):
        assert list(results[f"epoch{i}"]) == ["cost"] and isinstance(
            results[f"epoch{i}"]["cost"], float
        )
    assert results["epoch5"]["cost"] < results["epoch0"]["cost"]


def test_the_run_record_holds_the_rest(out):
    record = json.loads((out / "run.json").read_text())
    assert record["reason"] == "all 6 epochs are done" and record["epochs"] == 6
    assert record["cost"] == json.loads((out / "results.json").read_text())["epoch5"]["cost"]
    assert (
        record["plan"]["parameters"]["neurons"] == {"layer1": 4, "layer2": 1}
        and record["plan"]["parameters"]["seed"] == 0
    )
    assert len(record["plan"]["etag"]) == 32 and record["plan"]["images"] == 167
    assert set(record["invocations"]) == {"LaunchLambda", "TrainerLambda", "NeuronLambda"}
    assert record["invocations"]["NeuronLambda"]["duplicates"] == 0


def test_the_model_file_is_enough_to_predict(out):
    with h5py.File(out / "params.h5") as file:
        assert {name: (file[name].shape, file[name].dtype) for name in file} == {
            "W1": ((4, 192), np.float64),
            "b1": ((4, 1), np.float64),
            "W2": ((1, 4), np.float64),
            "b2": ((1, 1), np.float64),
        }
        assert json.loads(file.attrs["parameters"])["activations"] == {
            "layer1": "relu",
            "layer2": "sigmoid",
        }
        assert (
            list(file.attrs["classes"]) == ["non-cat", "cat"] and file.attrs["image_size"] == 8
        )


def test_the_cost_plot_is_a_picture(out):
    with Image.open(out / "cost.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        picture.load()


def test_the_same_training_again_says_nothing_if_quiet_and_leaves_the_same_weights(
    snn, out, weights, parameters_file, small_data, tmp_path
):
    for path in out.iterdir():
        (tmp_path / path.name).write_text("what a training before has left")
    assert snn(
        "train",
        "-q",
        "--data",
        small_data,
        "--parameters",
        parameters_file,
        "--out",
        tmp_path,
        "--workers",
        1,
    ) == (0, "", "")
    first, second = weights(out / "params.h5"), weights(tmp_path / "params.h5")
    assert {name: array.tobytes() for name, array in first.items()} == {
        name: array.tobytes() for name, array in second.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        path.name for path in out.iterdir()
    )
    assert list(json.loads((tmp_path / "results.json").read_text())) == list(
        json.loads((out / "results.json").read_text())
    )


def test_a_training_says_what_a_person_wants_to_know(
    snn, parameters_file, small_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SNN_PARAMETERS", str(parameters_file))
    code, said, error = snn(
        "train", "--data", small_data, "--epochs", 2, "--seed", 3, "--aggregation", "mean"
    )
    assert code == 0 and error.startswith(
        "Training on 167 images of 8x8 pixels, the whole network in one invocation for each mini-batch."
    )
    for words in (
        "Trained 2 epochs",
        "final cost",
        "test accuracy",
        "neurons         5",
        "invocations",
        "out/results.json",
        "out/params.h5",
        "out/cost.png",
        "--granularity neuron",
    ):
        assert words in said
    chosen = json.loads((tmp_path / "out" / "run.json").read_text())["plan"]["parameters"]
    assert (
        chosen["epochs"],
        chosen["seed"],
        chosen["aggregation"],
        chosen["granularity"],
    ) == (2, 3, "mean", "network")


def test_progress_without_a_terminal_is_lines():
    from snn.cli.console import TrainingProgress
    from snn.cloud.runs import Status
    from snn.local.training import Progress

    said = StringIO()
    with TrainingProgress(10, console=Console(file=said, soft_wrap=True), every=0) as shown:
        for epoch in range(3):
            shown.report(
                Progress(Status(epoch=epoch, cost=0.5 - epoch / 10), 100 * epoch, float(epoch))
            )
    *_, last = said.getvalue().splitlines()
    assert len(said.getvalue().splitlines()) == 3 and "\x1b" not in said.getvalue()
    assert (
        last.startswith("epoch 3/10")
        and "cost 0.30000" in last
        and "100 invocations/s" in last
        and "left" in last
    )


# predict and evaluate


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    "A bright and a dark picture, of different sizes and kinds."
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (30, 20), "white").save(folder / "bright.png")
    Image.new("L", (100, 200), 10).save(folder / "dark picture.jpeg")
    return [folder / "bright.png", folder / "dark picture.jpeg"]


def test_predict_says_for_each_picture_what_the_model_says(snn, out, pictures):
    code, said, error = snn("predict", "--model", out / "params.h5", "--json", *pictures)
    answers = json.loads(said)
    assert (code, error) == (0, "") and [answer["image"] for answer in answers] == [
        str(path) for path in pictures
    ]
    trained = models.read(out / "params.h5")
    expected = trained.probabilities(
        np.stack([np.full((8, 8, 3), value, np.uint8) for value in (255, 10)])
    )
    np.testing.assert_allclose(
        [answer["probability"] for answer in answers], expected, rtol=1e-12
    )
    assert [answer["class"] for answer in answers] == [
        ("non-cat", "cat")[int(p >= 0.5)] for p in expected
    ]


def test_predict_says_it_to_a_person_too(snn, out, pictures):
    code, said, error = snn("predict", "--model", out / "params.h5", *pictures)
    assert (code, error) == (0, "")
    for line, path in zip(said.splitlines(), pictures, strict=True):
        assert line.startswith(f"{path}: ") and "cat" in line and "%" in line


def test_evaluate_counts_as_one_would_by_hand(snn, out, small_data):
    code, said, error = snn(
        "evaluate", "--model", out / "params.h5", "--data", small_data, "--json"
    )
    found, trained = data.read(small_data), models.read(out / "params.h5")
    called = trained.probabilities(found.test_x) >= 0.5
    pairs = list(zip(found.test_y.tolist(), called.tolist()))
    tn, fp, fn, tp = (
        pairs.count(pair) for pair in ((0, False), (0, True), (1, False), (1, True))
    )
    p, n, z = (tn + tp) / 42, 42, 1.959963984540054
    middle, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n)),
    )
    evaluation = json.loads(said)
    assert (code, error) == (0, "")
    assert evaluation["confusion"] == [[tn, fp], [fn, tp]] and evaluation["images"] == 42
    assert evaluation["accuracy"] == p and evaluation["majority_baseline"] == 28 / 42
    np.testing.assert_allclose(
        evaluation["interval"], [max(0, middle - half), min(1, middle + half)], rtol=1e-12
    )


def test_evaluate_says_it_to_a_person_too(snn, out, small_data):
    code, said, error = snn("evaluate", "--model", out / "params.h5", "--data", small_data)
    assert (
        (code, error) == (0, "")
        and "accuracy" in said
        and "majority baseline   66.7%" in said
        and "Wilson" in said
    )


# data


def test_drawn_data_is_what_info_says_and_the_same_each_time(snn, tmp_path):
    for name in ("one.h5", "two.h5"):
        assert snn("data", "draw", "--size", 8, "--seed", 5, "--out", tmp_path / name)[0] == 0
    code, said, error = snn("data", "info", tmp_path / "one.h5", "--json")
    facts, found, again = (
        json.loads(said),
        data.read(tmp_path / "one.h5"),
        data.read(tmp_path / "two.h5"),
    )
    assert (code, error) == (0, "")
    assert facts["size"] == 8 and facts["classes"] == ["non-cat", "cat"]
    assert facts["training"] == {
        "images": len(found.train_y),
        "cat": int(found.train_y.sum()),
        "non-cat": int((found.train_y == 0).sum()),
    }
    assert facts["test"]["images"] == len(found.test_y)
    assert all(np.array_equal(a, b) for a, b in zip(found[:4], again[:4]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.h5", "two.h5"]


def test_folders_of_pictures_become_a_data_set(snn, tmp_path):
    for name, colour, count in (("cats", 200, 10), ("others", 20, 20)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (30 + i, 40), (colour,) * 3).save(tmp_path / name / f"{i}.png")
    call = [
        "data",
        "pack",
        "--cat",
        tmp_path / "cats",
        "--non-cat",
        tmp_path / "others",
        "--size",
        16,
        "--out",
        tmp_path / "mine.h5",
    ]
    code, said, error = snn(*call)
    found = data.read(tmp_path / "mine.h5")
    assert (code, error) == (0, "") and "16x16 pixels" in said and "24 images" in said
    assert (
        len(found.train_y),
        found.train_y.sum(),
        len(found.test_y),
        found.test_y.sum(),
    ) == (24, 8, 6, 2)
    assert (
        found.size == 16 and ((found.train_x[:, 0, 0, 0] == 200) == (found.train_y == 1)).all()
    )


def test_the_version_and_the_commands_are_told(snn):
    assert snn("--version") == (0, f"snn {__version__}\n", "")
    code, said, _ = snn("--help")
    for command in ("train", "local", "predict", "evaluate", "data"):
        assert code == 0 and command in said


# Nothing is left

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def marked(mark: str) -> dict[int, str]:
    "Living processes that inherited a mark in their environment, and their commands."
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if f"SNN_TEST={mark}".encode() not in (folder / "environ").read_bytes().split(
                b"\0"
            ):
                continue
            if (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            pass
    return found


@pytest.fixture
def place(tmp_path):
    "An environment with a mark, and a temporary folder of its own, of a name short enough for a socket."
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield {**os.environ, "TMPDIR": folder, "SNN_TEST": tmp_path.name}


@pytest.fixture
def in_the_middle(spawn, parameters_file, small_data, tmp_path, place, until):
    "A training with hours to go, five epochs after its beginning."
    process = spawn(
        "train",
        "--data",
        small_data,
        "--parameters",
        parameters_file,
        "--out",
        tmp_path / "out",
        "--epochs",
        10**6,
        env=place,
    )

    def epochs_done() -> bool:
        assert process.poll() is None, process.communicate()
        for path in Path(place["TMPDIR"]).glob("snn-*/server.sock"):
            try:
                client = redis.Redis(unix_socket_path=str(path))
                return any(
                    client.hlen(f"{{{run.decode()}}}:costs") > 5
                    for run in client.zrange("snn:runs", 0, -1)
                )
            except redis.RedisError:
                pass
        return False

    until(epochs_done, "five epochs are done", 30)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


def assert_nothing_is_left(tmp_path, place, until):
    "No process of ours, no temporary folder, no file but what takes the run up again."
    until(lambda: not marked(tmp_path.name), "no process is left", 10)
    assert list(Path(place["TMPDIR"]).iterdir()) == []
    left = [
        path.relative_to(tmp_path / "out")
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    ]
    assert not [
        path for path in left if path.parts[0] != "unfinished" or "partial" in path.name
    ]


@on_linux
@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stopped_training_leaves_nothing(
    number, code, in_the_middle, tmp_path, place, until
):
    in_the_middle.send_signal(number)
    said, error = in_the_middle.communicate(timeout=20)
    assert (
        in_the_middle.returncode == code
        and said == ""
        and error.splitlines()[-1] == "Stopped. Nothing is left running."
    )
    assert list(Path(place["TMPDIR"]).iterdir()) == [], "at its end, not some time later"
    assert_nothing_is_left(tmp_path, place, until)


@on_linux
def test_ctrl_c_reaches_workers_too_and_they_say_nothing(
    in_the_middle, tmp_path, place, until
):
    os.killpg(in_the_middle.pid, signal.SIGINT)
    said, error = in_the_middle.communicate(timeout=20)
    assert in_the_middle.returncode == 130
    assert [line for line in error.splitlines() if not line.startswith("epoch ")] == [
        "Training on 167 images of 8x8 pixels, the whole network in one invocation for each mini-batch.",
        "Stopped. Nothing is left running.",
    ]
    assert_nothing_is_left(tmp_path, place, until)


@on_linux
def test_an_impatient_second_ctrl_c_leaves_nothing_either(
    in_the_middle, tmp_path, place, until
):
    os.killpg(in_the_middle.pid, signal.SIGINT)
    time.sleep(0.05)
    if in_the_middle.poll() is None:
        os.killpg(in_the_middle.pid, signal.SIGINT)
    in_the_middle.communicate(timeout=20)
    assert_nothing_is_left(tmp_path, place, until)


@on_linux
@pytest.mark.parametrize("what", ["watchman", "snn.local.worker"])
def test_ctrl_c_while_the_cloud_starts_leaves_nothing(
    what, spawn, parameters_file, small_data, tmp_path, place, until
):
    process = spawn(
        "train",
        "--data",
        small_data,
        "--parameters",
        parameters_file,
        "--out",
        tmp_path / "out",
        "--epochs",
        10**6,
        env=place,
    )
    until(
        lambda: any(what in command for command in marked(tmp_path.name).values()),
        f"the first {what} is started",
        30,
    )
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in error, error
    assert_nothing_is_left(tmp_path, place, until)


@on_linux
def test_a_training_under_nohup_outlives_its_terminal(
    spawn, parameters_file, small_data, tmp_path, place, until
):
    call = [
        "train",
        "--data",
        small_data,
        "--parameters",
        parameters_file,
        "--out",
        tmp_path / "out",
        "--epochs",
        10**6,
    ]
    process = spawn(
        *call, env=place, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    until(
        lambda: any(
            "snn.local.worker" in command for command in marked(tmp_path.name).values()
        ),
        "the first worker is started",
        30,
    )
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    process.communicate(timeout=20)
    assert_nothing_is_left(tmp_path, place, until)


@on_linux
def test_servers_and_workers_vanish_when_their_program_is_killed(
    in_the_middle, tmp_path, place, until
):
    in_the_middle.kill()
    in_the_middle.communicate()
    until(
        lambda: not list(Path(place["TMPDIR"]).glob("snn-*")),
        "the servers' folders are gone",
        10,
    )
    assert_nothing_is_left(tmp_path, place, until)


# local


class Lines(threading.Thread):
    "Collects the lines that a process says."

    def __init__(self, stream):
        super().__init__(daemon=True)
        self.stream, self.lines = stream, []
        self.start()

    def run(self) -> None:
        for line in self.stream:
            self.lines.append(line.rstrip("\n"))

    def find(self, words: str) -> str:
        return next((line for line in self.lines if words in line), "")


@on_linux
def test_local_says_what_to_export_and_trains_what_is_uploaded(
    spawn, parameters_file, small_data, tmp_path, place, until
):
    process = spawn("local", "--workers", 1, env=place)
    said, complained = Lines(process.stdout), Lines(process.stderr)
    until(lambda: said.find("Ctrl-C ends"), "the instructions are complete", 30)
    exports = dict(
        line.split("export ")[1].split("=", 1) for line in said.lines if "export " in line
    )
    leads_here = {
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "SNN_REDIS_URL",
    }
    keeps_out = {
        "AWS_CONFIG_FILE",
        "AWS_SHARED_CREDENTIALS_FILE",
        "AWS_EC2_METADATA_DISABLED",
    }  # the user's own account
    assert set(exports) == leads_here | keeps_out
    assert (
        f"aws --endpoint-url {exports['AWS_ENDPOINT_URL']} s3 cp datasets.h5 s3://snn/training_input/datasets.h5"
        in said.find("cp datasets.h5")
    )
    s3 = boto3.client(
        "s3",
        endpoint_url=exports["AWS_ENDPOINT_URL"],
        region_name=exports["AWS_DEFAULT_REGION"],
        aws_access_key_id=exports["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=exports["AWS_SECRET_ACCESS_KEY"],
    )
    for path in (parameters_file, small_data):
        s3.upload_file(str(path), "snn", f"training_input/{path.name}")
    until(
        lambda: said.find("finished after 6 of at most 6 epochs"), "the run has finished", 30
    )
    s3.put_object(Bucket="snn", Key="training_input/datasets.h5", Body=b"nonsense")
    until(
        lambda: said.find("Refused: s3://snn/training_input/datasets.h5: not an HDF5 file"),
        "nonsense is refused",
        30,
    )
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 130
    complained.join(5)
    assert complained.lines == ["Stopped. Nothing is left running."]
    assert_nothing_is_left(tmp_path, place, until)
