"""What the estimate counts is what a run on this machine then reports."""

import json
import time
from collections import Counter

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snn.backends.local.services import Services
from snn.backends.valkey.store import Store
from snn.cloud.arrays import encode
from snn.cloud.messages import Message, Upload
from snn.cloud.meter import reading
from snn.cloud.prices import load
from snn.data import h5 as data
from snn.estimate.estimate import planned
from snn.estimate.work import run_work
from snn.handlers import protocol
from snn.handlers.upload import start
from snn.lab.faults import LabBucket
from snn.local.server import parameter_server

GRANULARITIES = ("neuron", "layer", "network")

networks = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 6), max_size=3).map(lambda hidden: (*hidden, 1)),
        "images": st.integers(3, 40),
        "batch_size": st.integers(2, 20),
        "epochs": st.integers(1, 3),
        "size": st.integers(1, 6),
        "aggregation": st.sampled_from(["best", "mean"]),
        "dtype": st.sampled_from(["float64", "float32"]),
        "rule": st.sampled_from(["sgd", "momentum", "adam"]),
        "validation_fraction": st.sampled_from([0.0, 0.3]),
        "residents": st.sampled_from([0, 3]),
        "seed": st.integers(0, 99),
    }
)


@pytest.fixture(scope="module")
def server():
    with parameter_server() as opened:
        yield opened


@pytest.fixture(scope="module")
def run_of(cloud, small_datasets, tmp_path_factory, parameters, start_run, finished, until):
    "Trains a network, and returns its plan and the counts of its run."
    folder, number = tmp_path_factory.mktemp("counts"), iter(range(10**6))

    def run(drawn: dict, granularity: str):
        name = f"counts-{next(number)}"
        path = folder / f"{name}.h5"
        data.write(small_datasets(size=drawn["size"], train=drawn["images"], test=2), path)
        chosen = parameters(
            drawn["sizes"],
            granularity=granularity,
            optimizer={"name": drawn["rule"]},
            learning_rate=1e-3,
            **{
                key: drawn[key]
                for key in (
                    "epochs",
                    "batch_size",
                    "aggregation",
                    "dtype",
                    "validation_fraction",
                    "residents",
                    "seed",
                )
            },
        )
        plan = finished(cloud, start_run(cloud, name, chosen, path))
        counts = until(
            lambda: (
                (found := cloud.services.ledger.counts(plan))["LaunchLambda"].finished
                == chosen.epochs + 1
                and found
            ),
            "the last epoch is recorded",
        )
        return chosen, plan, counts

    return run


def total(counts, field: str) -> int:
    return sum(getattr(count, field) for count in counts.values())


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks)
def test_ten_random_networks_do_exactly_what_was_estimated(run_of, cloud, drawn):
    for granularity in GRANULARITIES:
        chosen, plan, counts = run_of(drawn, granularity)
        expected = run_work(planned(chosen, drawn["images"], drawn["size"]), drawn["epochs"])
        assert {
            name: count.attempts for name, count in counts.items() if count.attempts
        } == expected.invocations
        found = reading(
            plan, counts, cloud.services.runs.status(plan.run), time.time(), load()
        )
        assert (found.messages, found.writes) == (expected.messages, expected.writes)
        assert total(counts, "costs") == expected.costs and total(counts, "duplicates") == 0


def test_what_a_run_reports_in_its_file_is_the_same(run_of, cloud):
    drawn = {
        "sizes": (4, 3, 1),
        "images": 30,
        "batch_size": 8,
        "epochs": 3,
        "size": 4,
        "aggregation": "mean",
        "dtype": "float64",
        "rule": "adam",
        "validation_fraction": 0.0,
        "residents": 0,
        "seed": 5,
    }
    for granularity in GRANULARITIES:
        chosen, plan, counts = run_of(drawn, granularity)
        expected = run_work(planned(chosen, 30, 4), 3)
        meter = json.loads(cloud.bucket.get(f"training_results/{plan.run}/run.json"))["meter"]
        assert (meter["messages"], meter["writes"]) == (expected.messages, expected.writes)
        assert meter["usage"]["invocations"] == {
            name: count.attempts for name, count in counts.items()
        }
        assert sum(meter["bill"].values()) == pytest.approx(meter["dollars"]) and meter[
            "per_epoch"
        ] == pytest.approx(meter["dollars"] / 3)
        assert meter["per_neuron"] == pytest.approx(meter["dollars"] / 8)


@pytest.fixture
def bytes_moved(monkeypatch):
    "Bytes that real handlers in this process store and ask for, of arrays of their epoch; of weights, what they store."
    moved, real = (
        Counter(),
        {name: getattr(Store, name) for name in ("put", "finish", "_join")},
    )
    array = lambda name: "weights" if name.startswith("w") else "stored"

    def counting(name, values_of):
        def counted(self, *arguments, **more):
            for array_name, value in (values_of(*arguments) or {}).items():
                moved[array(array_name)] += len(value)
            return real[name](self, *arguments, **more)

        monkeypatch.setattr(Store, name, counted)

    counting("put", lambda message, values: values)
    counting("finish", lambda *arguments: dict(*arguments[2:3]))
    counting("_join", lambda *arguments: arguments[4])
    begin, read = protocol.open_invocation, Store.read

    def begun(call, *arguments):
        status = begin(call, *arguments)
        moved["asked"] += sum(len(encode(array)) for array in call.arrays.values())
        return status

    def reading_of(self, run, batch, epoch, names):
        values = read(self, run, batch, epoch, names)
        moved["asked"] += sum(map(len, values)) * names[0].startswith("g")
        return values

    monkeypatch.setattr(protocol, "open_invocation", begun)
    monkeypatch.setattr(Store, "read", reading_of)
    return moved


@pytest.mark.parametrize("aggregation", ["best", "mean"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_handlers_move_the_bytes_that_were_estimated(
    granularity, aggregation, bytes_moved, server, parameters, small_datasets, tmp_path
):
    "A real parameter server, and real handlers, one after the other."
    chosen = parameters(
        (3, 2, 1),
        granularity=granularity,
        aggregation=aggregation,
        optimizer={"name": "adam"},
        batch_size=8,
        epochs=3,
    )
    path = tmp_path / "datasets.h5"
    data.write(small_datasets(size=4, train=20, test=2), path)
    services = Services({"SNN_REDIS_URL": server.url})
    services._buckets["lab"] = LabBucket(
        {
            "in/datasets.h5": path.read_bytes(),
            "in/parameters.json": msgspec.json.encode(chosen),
        }
    )
    run = start(Upload("lab", "in/datasets.h5", f"{granularity}{aggregation}"), services)
    handled = 0
    while envelopes := services.bus.take("hand", wait=0):
        for envelope in envelopes:
            protocol.handle(msgspec.json.decode(envelope.event, type=Message), services)
            handled += 1
    assert services.runs.status(run).state == "finished"
    moved = dict(bytes_moved)  # the recording is made by the same handlers
    expected = run_work(planned(chosen, 20, 4), 3)
    assert (handled, moved["stored"], moved["asked"]) == (
        expected.messages,
        expected.stored,
        expected.asked,
    )
    assert expected.weights[0] <= moved["weights"] <= expected.weights[1]


def test_the_shape_of_results_json_is_the_originals(run_of, cloud):
    drawn = {
        "sizes": (2, 1),
        "images": 10,
        "batch_size": 8,
        "epochs": 2,
        "size": 2,
        "aggregation": "best",
        "dtype": "float64",
        "rule": "sgd",
        "residents": 0,
        "validation_fraction": 0.0,
        "seed": 1,
    }
    _, plan, _ = run_of(drawn, "network")
    assert list(json.loads(cloud.bucket.get(f"training_results/{plan.run}/results.json"))) == [
        "Start",
        "epoch0",
        "epoch1",
        "End",
    ]
