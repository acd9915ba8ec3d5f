"""What the estimate counts is what a run on this machine then reports."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from snn.cloud.meter import reading
from snn.cloud.prices import load
from snn.data import h5 as data
from snn.estimate.estimate import planned
from snn.estimate.work import run_work

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
        assert (found.messages, found.stored, found.asked, found.writes) == (
            expected.messages,
            expected.stored,
            expected.asked,
            expected.writes,
        )
        if not chosen.validation_fraction:
            assert expected.weights[0] <= found.weights <= expected.weights[1]
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
        assert (meter["messages"], meter["stored"], meter["asked"], meter["writes"]) == (
            expected.messages,
            expected.stored,
            expected.asked,
            expected.writes,
        )
        assert meter["usage"]["invocations"] == {
            name: count.attempts for name, count in counts.items()
        }
        assert meter["weights"] == expected.weights[0] == expected.weights[1]
        assert sum(meter["bill"].values()) == pytest.approx(meter["dollars"]) and meter[
            "per_epoch"
        ] == pytest.approx(meter["dollars"] / 3)
        assert meter["per_neuron"] == pytest.approx(meter["dollars"] / 8)


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
