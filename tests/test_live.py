"""A run on show: what the page is given is what the run has, and the run is not disturbed."""

import base64
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import patch
from urllib.request import urlopen

import h5py
import msgspec
import nbformat
import numpy as np
import pytest
from nbconvert import HTMLExporter
from starlette.testclient import TestClient

from snn.backends.local.services import Services
from snn.cloud.messages import Message
from snn.data import h5 as data
from snn.handlers.protocol import invocations_per_epoch
from snn.live.host import stage_on
from snn.live.page import create, let_go
from snn.live.stage import answer
from snn.live.watching import Onlooker, invocations_of
from snn.live.widget import Live, reply, stage_of
from snn.local import training
from snn.maths.augment import prepare
from snn.maths.network import initialise, train_epoch
from snn.replay.compute import replay_on
from snn.replay.record import read_record, training_part
from snn.viz.style import sheet

DRAWN = dict(
    augment={"flip": True, "shift": 2},
    dropout={"inputs": 0.2, "hidden": 0.1},
    standardise="mean",
    aggregation="mean",
    optimizer={"name": "adam"},
    learning_rate=0.01,
)


def arrays(path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: file[name][()].tobytes() for name in file}


STEPS = [*["neuron"] * 4, *["layer"] * 3, "mini-batch", "epoch", "neuron"]


def message_of(plan, epoch: int, batch: int, step: str) -> Message:
    "The message that has asked for a step."
    function, direction, layer, first = step.split("/")
    where = {"layer": int(layer), "first": int(first)}
    return Message(function, direction, plan.run, epoch, batch=batch, **where)


def walk(stage, cloud) -> dict:
    "Go on step by step; returns what each step has done, and what happens while the run waits."
    services, pace = stage.pace.services, stage.pace
    while not services.runs.knows(name := services.runs.newest(pace.run)):
        pace.step("neuron")  # as a person who presses until something is seen
    plan, found = services.runs.plan(name), {"steps": []}

    def done() -> dict[str, int]:
        counts = services.ledger.counts(plan)
        epoch = services.runs.status(name).epoch
        return {f: count.finished for f, count in counts.items()} | {"epoch": epoch}

    for unit in STEPS:
        before = done()
        pace.step(unit)
        found["steps"].append((unit, {k: v - before[k] for k, v in done().items()}))
    found["held"] = stage.state()["held"], done()
    under_way, size = services.runs.status(name).epoch + 1, invocations_per_epoch(plan)
    found["rows"] = invocations_of(plan, under_way, services), size, under_way
    found["entries"] = [
        services.ledger.entry(message_of(plan, under_way, batch, step))
        for batch, step, *_ in found["rows"][0]
    ]
    clock = SimpleNamespace(time=lambda: time.time() + 1000)  # it seems to stand still
    with patch("snn.cloud.runs.time", clock):
        for _ in range(3):
            cloud.workers.watch(services, "")
    found["later"], found["mended"] = done(), services.runs.counted(name, "mended")
    stage.listeners = 1
    let_go(stage)
    found["with a page"] = pace.held
    stage.listeners = 0
    let_go(stage)
    found["without"] = pace.held
    return found


@pytest.fixture(scope="module")
def watched(parameters, small_data, tmp_path_factory):
    "A training that was watched, held back and led step by step, and one that was not."
    chosen = parameters((5, 3, 1), epochs=12, granularity="neuron", **DRAWN)
    folder, stages = tmp_path_factory.mktemp("watched"), []
    thread = ThreadPoolExecutor(1)

    def begun(cloud, run):
        own = lambda: Services(cloud.workers.environment)
        cloud.workers.pace.hold()
        onlooker = Onlooker(run, cloud.workers.pace, own())
        stages.append(stage_on(run, own(), chosen, data.read(small_data), onlooker))
        stages[0].walked = thread.submit(walk, stages[0], cloud)
        stages[0].walked.add_done_callback(lambda _: onlooker.release())

    def report(progress):
        if progress.status.state != "running":
            stages[0].watcher.thread.join(60)

    training.train(chosen, small_data, folder / "watched", report, begun=begun)
    training.train(chosen, small_data, folder / "alone")
    return stages[0], folder


def break_it(stage, cloud, until) -> dict:
    "Ask for a fault of each kind before the run has begun; returns what became of them, when all are over."
    workers, found = dict(cloud.workers.processes), []
    ask = TestClient(create(stage)).post
    for asked in ({"kind": kind, "layer": l, "neuron": i} for kind, l, i in FAULTS):
        found.append(ask("/fault", params={"token": stage.token}, content=json.dumps(asked)))
    seen, missing = stage.pace.faults(stage.pace.services), {}

    def over() -> bool:
        state = stage.watcher.state
        faults = state.get("faults", [])
        for fault in faults:
            if fault["stage"] == "struck" and fault["epoch"] == state["epoch"] + 1:
                missing[fault["kind"]] = fault["step"] not in state["steps"][fault["batch"]]
        return [fault["stage"] for fault in faults] == ["over"] * len(FAULTS)

    stage.pace.release()
    until(over, "all faults are over", 120)
    name = stage.pace.services.runs.newest(stage.name)
    return {
        "replies": [reply.json() for reply in found],
        "asked": seen,
        "missing": missing,
        "over": stage.watcher.state["faults"],
        "ends": [process.poll() for process in workers.values()],
        "mended": stage.pace.services.runs.counted(name, "mended"),
        "duplicates": stage.watcher.state["duplicates"],
    }


FAULTS = [("kill", 2, 1), ("delay", 1, 3), ("duplicate", 1, 0)]


@pytest.fixture(scope="module")
def broken(watched, small_data, until):
    "The same training again, in which an onlooker delays, doubles and kills an invocation."
    chosen, folder, stages = watched[0].film.model.parameters, watched[1], []
    thread = ThreadPoolExecutor(1)

    def begun(cloud, run):
        own = lambda: Services(cloud.workers.environment)
        cloud.workers.pace.hold()
        onlooker = Onlooker(run, cloud.workers.pace, own())
        stages.append(stage_on(run, own(), chosen, data.read(small_data), onlooker))
        stages[0].broken = thread.submit(break_it, stages[0], cloud, until)
        stages[0].broken.add_done_callback(lambda _: onlooker.release())

    def report(progress):
        if progress.status.state != "running":
            stages[0].watcher.thread.join(60)

    training.train(chosen, small_data, folder / "broken", report, begun=begun)
    return stages[0].broken.result(), folder


@pytest.fixture(scope="module")
def ended(watched, small_data):
    "The same run, looked at when it has ended."
    stage = stage_of(watched[1] / "watched", data.read(small_data))
    stage.watcher.thread.join(60)
    return stage


@pytest.fixture(scope="module")
def browser(ended):
    return TestClient(create(ended))


def test_a_watched_training_has_the_same_bytes(watched):
    _, folder = watched
    assert arrays(folder / "watched" / "params.h5") == arrays(folder / "alone" / "params.h5")


def test_a_training_that_is_delayed_doubled_and_killed_has_the_same_bytes(broken):
    _, folder = broken
    assert arrays(folder / "broken" / "params.h5") == arrays(folder / "alone" / "params.h5")


def test_each_fault_strikes_the_next_invocation_of_its_neuron(broken):
    found, _ = broken
    named = [(fault["kind"], fault["layer"], fault["neuron"]) for fault in found["over"]]
    assert named == FAULTS and [fault["stage"] for fault in found["asked"]] == ["asked"] * 3
    assert [tuple(reply.values()) for reply in found["replies"]] == FAULTS
    for fault in found["over"]:
        where = f"NeuronLambda/forward/{fault['layer']}/{fault['neuron']}"
        assert (fault["epoch"], fault["step"]) == (0, where)


def test_a_worker_is_really_killed_and_the_watchdog_mends_the_run(broken):
    found, _ = broken
    assert -signal.SIGKILL in found["ends"] and found["mended"] >= 1
    missing = found["missing"]
    assert missing["kill"] and missing["delay"]  # at its barrier, meanwhile


def test_what_is_delivered_twice_is_counted_twice(broken):
    found, _ = broken
    assert found["over"][2]["attempts"] != 1 and found["duplicates"] >= 1


def test_a_run_goes_on_by_a_neuron_a_layer_a_mini_batch_or_an_epoch(watched):
    for unit, grown in watched[0].walked.result()["steps"]:
        if unit == "neuron":
            assert grown["NeuronLambda"] == 1, grown
        elif unit == "layer":
            assert grown["TrainerLambda"] == 1, grown
        elif unit == "mini-batch":
            assert grown["TrainerLambda"] > 1 and grown["NeuronLambda"] > 5, grown
        else:
            assert grown["epoch"] == 1, grown


def test_a_run_that_is_held_back_does_not_stand_still_and_is_not_held_for_nobody(watched):
    found = watched[0].walked.result()
    held, then = found["held"]
    assert held and found["later"] == then and found["mended"] == 0
    assert found["with a page"] and not found["without"]


def test_the_timeline_has_each_invocation_as_the_ledger_has_it(watched):
    stage, _ = watched
    found = stage.walked.result()
    rows, size, under_way = found["rows"]
    assert 0 < len(rows) < size and len({row[:2] for row in rows}) == len(rows)
    for (_, _, attempts, took), entry in zip(rows, found["entries"], strict=True):
        assert (attempts, took is not None, took or 0) == entry and attempts > 0
    for epoch in range(under_way):  # the run was held; epoch 0 has its start as well
        kept = answer(stage, "invocations", {"epoch": epoch}.__getitem__)["rows"]
        assert len(kept) == size + (epoch == 0) and all(took is not None for *_, took in kept)
    assert answer(stage, "invocations", {"epoch": -5}.__getitem__) == {"rows": []}


def test_a_run_that_has_ended_can_not_be_held_back(browser, ended):
    ask = lambda content: browser.post("/pace", params={"token": ended.token}, content=content)
    assert not browser.get("/run", params={"token": ended.token}).json()["paced"]
    assert ask(b'{"do": "hold"}').status_code == 400
    assert "has ended" in ask(b'{"do": "hold"}').text
    assert ask(b'{"do": "step", "unit": "month"}').status_code == 400
    assert browser.post("/pace", content=b'{"do": "hold"}').status_code == 403
    fault = b'{"kind": "kill", "layer": 1, "neuron": 0}'
    assert browser.post("/fault", content=fault).status_code == 403
    refused = browser.post("/fault", params={"token": ended.token}, content=fault)
    assert refused.status_code == 400 and "has ended" in refused.text


def test_the_last_frame_is_the_model(watched):
    stage, folder = watched
    assert stage.watcher.state["state"] == "finished"
    last = stage.film.nearest(10**9)
    assert last.epoch == 12
    with h5py.File(folder / "watched" / "params.h5") as file:
        for l, (W, b) in enumerate(last.layers, start=1):
            np.testing.assert_allclose(W, file[f"W{l}"][()], rtol=1e-6)
            np.testing.assert_allclose(b, file[f"b{l}"][()], rtol=1e-6, atol=1e-12)


def test_a_run_that_has_ended_is_computed_again_as_it_was(watched, ended):
    record = read_record(watched[1] / "watched")
    np.testing.assert_allclose(ended.watcher.state["costs"], record.costs, rtol=1e-9)
    assert [frame.epoch for frame in ended.film.all()] == list(range(13))


@pytest.mark.parametrize("layer, neuron", [(1, 2), (2, 0), (3, 0)])
def test_the_numbers_of_a_neuron_are_those_of_its_replay(
    layer, neuron, watched, browser, ended, small_data
):
    record = read_record(watched[1] / "watched")
    part = training_part(record, data.read(small_data))
    expected = replay_on(record, *part, 7, 1, layer, neuron, "backward")
    query = {"token": ended.token, "epoch": 7, "batch": 1, "layer": layer, "neuron": neuron}
    found = browser.get("/neuron", params=query).json()
    for name in ("z", "a", "da", "dz"):
        np.testing.assert_allclose(found[name], getattr(expected, name), rtol=1e-3, atol=1e-6)
    dw = np.frombuffer(base64.b64decode(found["dw"]), "<f4")
    np.testing.assert_allclose(dw, expected.dw, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "path", ["run", "state", "pictures", "frame", "neuron", "invocations", "events"]
)
def test_without_the_token_nothing_is_told(path, browser):
    assert browser.get(f"/{path}").status_code == 403
    assert browser.get(f"/{path}", params={"token": "x"}).status_code == 403
    assert browser.post("/fork", content=b"{}").status_code == 403


@pytest.mark.parametrize(
    "asked",
    [
        b"not JSON",
        b"{}",
        b'{"epoch": 99, "epochs": 5, "changes": []}',
        b'{"epoch": 0, "epochs": 100000, "changes": []}',
        b'{"epoch": 0, "epochs": 5, "changes": [{"layer": 9, "neuron": 0}]}',
        b'{"epoch": 0, "epochs": 5, "changes": [{"layer": 1, "neuron": 0, "weight": -1}]}',
        b'{"epoch": 0, "epochs": 5, "changes": [{"layer": 1, "neuron": 0, "weight": "all"}]}',
        b'{"epoch": 0, "epochs": 5, "changes": [{"layer": 2, "neuron": 0, "weight": 1.5}]}',
        b'{"epoch": 0, "epochs": 5, "changes": [{"layer": 2, "neuron": 9, "weight": "bias"}]}',
        b'{"epoch": 0, "epochs": 5, "changes": [{"layer": 2, "neuron": 0, "weight": 0, "value": 1e999}]}',
        b'{"epoch": 0, "epochs": 5, "changes": [{"layer": 1, "neuron": 0, "weight": "bias", "value": 1e308},'
        b' {"layer": 2, "neuron": 0, "weight": 0, "value": 1e308}]}',
    ],
)
def test_a_wrong_thought_experiment_is_refused(asked, browser, ended):
    answer = browser.post("/fork", params={"token": ended.token}, content=asked)
    assert answer.status_code == 400 and len(answer.text.splitlines()) == 1


def test_a_fork_is_to_the_byte_a_training_that_began_so(browser, ended):
    changes = [
        {"layer": 2, "neuron": 1, "weight": 4, "value": 0.75},
        {"layer": 2, "neuron": 1, "weight": "bias", "value": -0.125},
        {"layer": 1, "neuron": 3, "weight": "scale", "value": -1.5},
    ]
    asked = {"epoch": 0, "epochs": 4, "changes": changes}
    query = {"token": ended.token}
    found = browser.post("/fork", params=query, content=json.dumps(asked)).json()
    parameters, costs = ended.film.model.parameters, []
    X, mean = prepare(parameters, ended.X)
    layers = initialise(parameters, X.shape[1])
    (W1, *_), (W2, b2, *_), *_ = layers
    W2[1, 4], b2[1], W1[3] = 0.75, -0.125, W1[3] * -1.5
    for epoch in range(4):
        total, layers = train_epoch(parameters, layers, X, ended.Y, epoch, mean)
        costs.append(total)
    assert found["costs"] == costs != ended.watcher.state["costs"][:4]
    assert reply(ended, {"id": 1, "path": "fork", "query": asked})[0]["value"] == found


def test_the_kernel_answers_as_the_server_does(browser, ended):
    query = {"epoch": 3}
    told, buffers = reply(ended, {"id": 7, "path": "frame", "query": query})
    assert told == {"id": 7}
    assert buffers[0] == browser.get("/frame", params={**query, "token": ended.token}).content
    told, _ = reply(ended, {"id": 8, "path": "run"})
    assert told["value"] == browser.get("/run", params={"token": ended.token}).json()
    assert "error" in reply(ended, {"id": 9, "path": "../etc/passwd"})[0]


def test_the_widget_needs_no_web_server():
    program = "import sys; sys.modules['starlette'] = None; import snn.live.widget"
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


def test_the_widget_leaves_a_picture_where_there_is_no_kernel(watched, small_data):
    "In an exported page, which knows nothing of widgets."
    pytest.importorskip("anywidget", reason="anywidget is not installed: bin/venv test")
    record = read_record(watched[1] / "watched")
    widget = Live(record, data.read(small_data), still=sheet(2, 1, "As it was"))
    kept, said = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in kept
    output = nbformat.v4.new_output("display_data", kept, metadata=said)
    cell = nbformat.v4.new_code_cell("Live(run)", outputs=[output])
    exporter = HTMLExporter(template_name="lab")
    page, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert kept["image/png"] in page and "widget-view" not in page


def test_a_film_of_a_long_run_stays_small(ended, parameters):
    from snn.live.film import Film

    film = Film(ended.film.model, ended.film.test_x, ended.film.test_y, most=20)
    layers = ended.film.nearest(0).layers
    for epoch in range(1000):
        film.add(epoch, layers)
    epochs = [frame.epoch for frame in film.all()]
    assert 10 <= len(epochs) <= 20 and epochs[0] == 0
    assert len({b - a for a, b in zip(epochs, epochs[1:])}) == 1  # evenly


def test_training_live_shows_the_run_and_ends_with_ctrl_c(small_data, parameters, tmp_path):
    chosen = tmp_path / "parameters.json"
    chosen.write_bytes(msgspec.json.encode(parameters((5, 3, 1), epochs=4)))
    command = [sys.executable, "-P", "-c", "from snn.cli.main import main; main()", "train"]
    options = [
        "--live",
        "--data",
        small_data,
        "--parameters",
        chosen,
        "--out",
        tmp_path / "out",
    ]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        line = next(line for line in program.stdout if line.startswith("The page is at "))
        with urlopen(line.split()[-1].replace("/?", "/state?")) as answer:
            state = json.load(answer)
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 130
    assert state["state"] == "finished" and len(state["costs"]) == 4
    assert [frame["epoch"] for frame in state["frames"]][-1] == 4
