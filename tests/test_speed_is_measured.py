"""The benchmark measures what it says it does. How fast anything is, is no test's business: machines have other things to do."""

import importlib.util
import json
import os
import re
import signal
import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import msgspec
import nbformat
import numpy as np
import pytest
from PIL import Image

from snn.data import h5 as data
from snn.lab import bench, engines, profile
from snn.local.pipeline import default_notebooks, run_notebook
from snn.maths import network, sampling

GRANULARITIES = ("network", "layer", "neuron")
FIELDS = {"name", "median", "fastest", "slowest", "ratio", "loop", "invocations"}
REFERENCES = [bench.NUMPY, bench.BY_NEURON]
on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="looks at processes through /proc"
)


@pytest.fixture(scope="module")
def parameters_file(parameters, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "parameters.json"
    path.write_bytes(msgspec.json.encode(parameters((5, 3, 1), epochs=1)))
    return path


@pytest.fixture
def opened(cloud, monkeypatch):
    "`snn bench` finds the cloud of this file's tests open; that it opens and closes its own, the test of Ctrl-C sees."
    monkeypatch.setattr("snn.local.cloud.LocalCloud", lambda workers: nullcontext(cloud))


def check_rows(rows: list[dict], peers: set[str] = frozenset()) -> None:
    "Everybody is there, and what is said of them can be."
    assert [row["name"] for row in rows][:5] == [*REFERENCES, *GRANULARITIES] and {
        row["name"] for row in rows[5:]
    } == peers
    for row in rows:
        assert set(row) == FIELDS
        assert 0 < row["fastest"] <= row["median"] <= row["slowest"]
        assert row["ratio"] > 0 and row["loop"] > 0
    assert rows[0]["ratio"] == rows[1]["loop"] == 1


def test_the_bench_times_all_granularities_and_counts_their_invocations(
    snn, parameters_file, small_data, opened
):
    code, said, told = snn(
        "bench",
        "--data",
        small_data,
        "--parameters",
        parameters_file,
        "--epochs",
        5,
        "--repetitions",
        2,
        "--json",
    )
    assert code == 0 and "repetition 2 of 2" in told
    rows = json.loads(said)
    check_rows(rows, set(bench.peers_here()))
    neurons, layers, batches = (
        9,
        3,
        3,
    )  # of a 5-3-1 network on 167 images in mini-batches of 64
    counted = {
        "network": 1 + batches,
        "layer": 1 + batches * (4 * layers + 1),
        "neuron": 1 + batches * (2 * neurons + 2 * layers + 1),
    }
    assert {row["name"]: row["invocations"] for row in rows if row["invocations"]} == counted


def test_a_quick_bench_prints_a_table_and_draws_a_picture(
    snn, parameters_file, small_data, tmp_path, opened
):
    code, said, told = snn(
        "bench",
        "--data",
        small_data,
        "--parameters",
        parameters_file,
        "--quick",
        "--plot",
        tmp_path / "bench.png",
    )
    assert code == 0 and "repetition 2 of 2" in told
    for name in (*REFERENCES, *GRANULARITIES):
        assert re.search(rf"{name}( +[\d.]+){{5}}", said), name
    assert (
        Image.open(tmp_path / "bench.png").width == 2 * 800
    )  # sharp where a page has twice the pixels


@pytest.mark.parametrize("name", ["scikit-learn", "PyTorch"])
def test_a_peer_that_is_not_installed_is_left_out_with_a_note(name, monkeypatch):
    monkeypatch.setitem(
        sys.modules, bench.PEERS[name].module, None
    )  # as Python marks what can't be imported
    said = []
    assert name not in bench.peers_here(said.append)
    assert any(
        line.startswith(f"{name} is not installed and left out; pip install") for line in said
    )


def test_an_engine_that_is_not_known_is_refused_and_one_that_is_not_installed_is_a_note(
    snn, parameters_file, small_data, monkeypatch
):
    given = ("--data", small_data, "--parameters", parameters_file, "--engines", "ray,spark")
    code, said, told = snn("bench", *given)
    assert (code, said) == (2, "")
    assert told.strip() == "--engines has spark; it may have ray, dask, celery"
    said = []
    for way in engines.WAYS.values():
        monkeypatch.setitem(sys.modules, way.module, None)
    ways = engines.chosen("Celery, ray")
    assert ways == ["celery", "ray actors", "ray tasks"]
    assert engines.engines_here(ways, said.append) == {}
    assert said[0] == "Celery is not installed and left out; pip install celery brings it"


@pytest.mark.parametrize("way", engines.WAYS)
def test_an_engine_gives_the_weights_that_plain_numpy_gives(
    way, parameters, small_data, tmp_path
):
    if importlib.util.find_spec(engines.WAYS[way].module) is None:
        pytest.skip(f"no engine for {way} to compare with")
    chosen, found = parameters((5, 3, 1), epochs=2), data.read(small_data)
    told = msgspec.json.encode(chosen).decode()
    np.savez(tmp_path / "asked.npz", x=found.train_x, parameters=told)
    with engines.WAYS[way].start(str(tmp_path / "asked.npz"), 2) as engine:
        *_, (total, layers) = engines.train_through(
            engine, chosen, found.train_x, found.train_y
        )
    *_, (expected, by_numpy) = network.train(chosen, found.train_x, found.train_y)
    assert total == pytest.approx(expected)
    for ours, theirs in zip(layers, by_numpy):
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-9)


@pytest.mark.parametrize("plot", ["nowhere/bench.png", "bench.pdf"])
def test_a_picture_that_could_not_be_written_is_refused_before_anything_is_measured(
    plot, snn, parameters_file, small_data
):
    code, said, told = snn(
        "bench", "--data", small_data, "--parameters", parameters_file, "--plot", plot
    )
    assert (
        code == 2
        and said == ""
        and told.strip() == f"--plot is {plot}; it must be a .png in a folder that exists"
    )


def marked(mark: str) -> list[str]:
    "Commands of living processes that inherited a mark in their environment."
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if (
                f"SNN_TEST={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
                and (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            ):
                found.append((folder / "cmdline").read_text())
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError, PermissionError):
            pass
    return found


@on_linux
def test_ctrl_c_ends_a_bench_and_leaves_nothing(
    spawn, parameters_file, small_data, tmp_path, until
):
    (tmp_path / "tmp").mkdir()
    process = spawn(
        "bench",
        "--data",
        small_data,
        "--parameters",
        parameters_file,
        "--repetitions",
        1000,
        "--epochs",
        5,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "SNN_TEST": tmp_path.name},
    )
    for line in process.stderr:
        if line.startswith("repetition 1 "):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert (
        process.returncode == 130
        and told.splitlines()[-1] == "Stopped. Nothing is left running."
    )
    until(lambda: not marked(tmp_path.name), "no process is left", 10)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_run_that_is_over_too_soon_is_given_more_epochs(
    cloud, parameters, small_datasets, tmp_path
):
    data.write(small_datasets(4, 4, 2), tmp_path / "datasets.h5")
    assert (
        bench.time_run(
            cloud, parameters((1,), epochs=2, granularity="network"), tmp_path / "datasets.h5"
        )
        > 0
    )


# How it grows


def test_everybody_takes_a_turn_in_each_repetition():
    order = []
    cases = {
        name: lambda turn, name=name: order.append((turn, name)) or float(turn)
        for name in "abc"
    }
    assert bench.in_turns(cases, 3) == {name: [0, 1, 2] for name in "abc"}
    assert order == [*product(range(3), "abc")]


@pytest.mark.parametrize("once, each", [(0, 1), (5, 0.01), (3, 0)])
def test_points_on_a_line_give_the_line(once, each):
    found = bench.straight(
        [bench.Point("layer", n, once + each * n, 0, 0) for n in (4, 16, 64, 256)]
    )
    assert found == pytest.approx((once, each, 1), abs=1e-9)


@pytest.mark.parametrize("power", [1.5, 2, 0.3])
def test_what_grows_in_another_way_is_told_from_a_line(power):
    farthest = bench.straight(
        [bench.Point("layer", n, n**power, 0, 0) for n in (20, 60, 200, 600, 2000)]
    ).farthest
    assert max(farthest, 1 / farthest) > 1.3


def test_an_axis_changes_what_it_says_and_nothing_else(parameters, tmp_path):
    base = parameters((5, 3, 1))
    wide, many, cut = (
        axis(base, [4, 8], tmp_path, size=4)
        for axis in (bench.wider, bench.more_images, bench.more_batches)
    )
    assert [case.parameters.sizes for case in wide] == [[4, 3, 1], [8, 3, 1]] and {
        case.datasets for case in wide
    } == {wide[0].datasets}
    assert [len(data.read(case.datasets).train_x) for case in many] == [4, 8] and all(
        case.parameters == base for case in many
    )
    assert [1024 // case.parameters.batch_size for case in cut] == [4, 8]
    for case in cut:
        assert bench.invocations(case.parameters, 1024) == 1 + case.value * (2 * 9 + 2 * 3 + 1)


# Where the time goes


def test_the_parts_of_made_up_epochs_are_what_they_were_made_of():
    "Two workers; the epochs that count are those from 30 s to 50 s, and one worker waits all the time."
    kinds = np.array(
        [profile.KINDS.index(kind) for kind in ("mathematics", "round trips", "dispatch")]
    )
    one = profile.Track(
        kinds, np.array([0.0, 35, 45, 100]), {epoch: 10.0 * epoch + 10 for epoch in range(6)}
    )
    other = profile.Track(kinds[2:], np.array([0.0, 100]), {})
    assert profile.middle([one, other]) == (30, 50, 2)
    found = {kind: seconds for kind, seconds in profile.parts([one, other]).items() if seconds}
    assert found == {"mathematics": 5 / 4, "round trips": 10 / 4, "dispatch": 25 / 4}


def test_what_is_spent_on_the_way_is_told_from_what_is_spent_at_work():
    "Two workers in an epoch of 10 s: one works 4 s of 6, and asks for 4 s, of which the server takes 2."
    kinds = [profile.KINDS.index(kind) for kind in ("mathematics", "round trips")]
    edges = np.array([0.0, *(t for e in range(6) for t in (10 * e + 6, 10 * e + 10))])
    busy = np.array([0.0, *(t for e in range(6) for t in (5 * e + 4, 5 * e + 5))])
    epochs = {epoch: 10.0 * epoch + 10 for epoch in range(6)}
    track = profile.Track(np.array(6 * kinds), edges, epochs, busy)
    cost = profile.cost_of(profile.Watched([track, track], 4.0), 5)
    assert cost._asdict() == pytest.approx(
        {
            "arithmetic": 4 * 2 / 5,
            "decoding": 0,
            "python": 0,
            "asking": 1 * 2 / 5,
            "server": 2 * 2 / 5,
            "wire": 1 * 2 / 5,
            "waiting": 0,
            "processor": 2 * 2 / 5,
        }
    )


@pytest.fixture(scope="module")
def profiled(parameters, small_data):
    "The parameters of a run at each granularity, and what was seen of it."
    every = [parameters((5, 3, 1), epochs=9, granularity=name) for name in GRANULARITIES]
    seen = profile.profile(every, small_data, 2)
    return {chosen.granularity: (chosen, watched) for chosen, watched in zip(every, seen)}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_parts_of_an_epoch_are_the_whole(granularity, profiled):
    chosen, watched = profiled[granularity]
    tracks = watched.tracks
    parts, (start, end, epochs) = profile.parts(tracks), profile.middle(tracks)
    assert len(tracks) == 2 and sorted(profile.ends(tracks)) == list(range(9)) and epochs == 5
    assert set(parts) == set(profile.KINDS) and sum(parts.values()) == pytest.approx(
        (end - start) / epochs
    )
    assert (
        min(
            parts[kind] for kind in ("mathematics", "round trips", "serialisation", "dispatch")
        )
        > 0
    )
    assert 1 <= profile.requests(tracks) <= 4 * bench.invocations(chosen, 167)
    for kind, seconds in profile.busy_parts(tracks).items():
        assert 0 <= seconds <= parts[kind] + 1e-4, kind
    count = bench.invocations(chosen, 167)
    assert sum(profile.cost_of(watched, count)) * count / 2 == pytest.approx(
        sum(parts.values())
    )


def test_a_profile_says_what_an_invocation_costs_and_that_it_is_the_whole_epoch(
    snn, parameters_file, small_data
):
    given = ("--data", small_data, "--parameters", parameters_file, "--epochs", 6)
    code, said, told = snn("bench", "--profile", "--repetitions", 1, "--json", *given)
    assert code == 0 and "repetition 1 of 1" in told
    rows = json.loads(said)
    assert [row["name"] for row in rows] == [*GRANULARITIES]
    for row in rows:
        assert set(row["cost"]) == set(profile.Cost._fields)
        together = sum(row["cost"].values()) * row["invocations"] / row["workers"]
        assert together == pytest.approx(row["epoch"])
        assert row["fastest"] <= row["epoch"] <= row["slowest"]


# Half the bytes


@pytest.mark.parametrize(
    "granularity, aggregation", [*product(GRANULARITIES, ("best", "mean"))]
)
def test_float32_gives_what_float64_gives_as_far_as_it_can_hold_it(
    granularity, aggregation, cloud, parameters, small_data, start_run, finished, weights_of
):
    chosen, found = (
        parameters(
            (6, 4, 1),
            "tanh",
            epochs=10,
            granularity=granularity,
            aggregation=aggregation,
            learning_rate=0.05,
        ),
        data.read(small_data),
    )
    *_, (_, layers) = network.train(chosen, sampling.standardise(found.train_x), found.train_y)
    run = start_run(
        cloud,
        f"half-{granularity}-{aggregation}",
        msgspec.structs.replace(chosen, dtype="float32"),
        small_data,
    )
    finished(cloud, run)
    weights = weights_of(cloud, run)
    for l, (W, b, *_) in enumerate(layers, start=1):
        for name, expected in ((f"W{l}", W), (f"b{l}", b)):
            np.testing.assert_allclose(weights[name], expected, rtol=1e-3, atol=1e-5)
            assert (weights[name] == weights[name].astype(np.float32)).all() and not (
                weights[name] == expected
            ).all()


# The notebook


@pytest.mark.timeout(600)
def test_the_benchmark_tells_itself_in_its_quick_mode(tmp_path, small_data):
    ran = run_notebook(
        default_notebooks() / "Benchmark.ipynb",
        tmp_path / "Benchmark.ipynb",
        {"quick": True, "data": str(small_data), "out": str(tmp_path)},
        longest=300,
    )
    said = [
        output
        for cell in nbformat.read(ran, 4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert not [
        output
        for output in said
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert len([output for output in said if "image/png" in output.get("data", {})]) == 13
    numbers = json.loads((tmp_path / "benchmark.json").read_text())
    check_rows(numbers["side by side"], set(bench.peers_here()))
    assert set(numbers) == {
        "side by side",
        "where the time goes",
        "an invocation",
        "width",
        "images",
        "mini-batches",
        "epochs",
        "workers",
        "float32",
        "predicted",
        "on AWS",
    }
    for axis in ("width", "images", "mini-batches"):
        assert {point["name"] for point in numbers[axis]} == {"plain NumPy", *GRANULARITIES}
