"""The handlers compute what plain NumPy computes, count what they do, and stop when they should."""

import json
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest

from snn.cloud.arrays import decode
from snn.cloud.messages import ALL, epoch_messages
from snn.data import h5 as data
from snn.handlers.protocol import (
    after_epoch,
    invocations_per_epoch,
    stages,
)
from snn.local import training
from snn.local.cloud import LocalCloud
from snn.maths import network, sampling
from snn.maths.activations import ACTIVATIONS

GRANULARITIES, AGGREGATIONS = ("neuron", "layer", "network"), ("best", "mean")


def numpy_reference(parameters, path) -> tuple[list[float], dict[str, np.ndarray]]:
    "Costs and weights by plain NumPy."
    found = data.read(path)
    costs, layers = zip(
        *network.train(
            parameters, sampling.standardise(found.train_x, parameters.dtype), found.train_y
        )
    )
    pairs = [
        (f"{name}{l}", array)
        for l, layer in enumerate(layers[-1], start=1)
        for name, array in zip("Wb", layer)
    ]
    return list(costs), dict(sorted(pairs))


def assert_equal_weights(found, expected, rtol=1e-9):
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(
            found[name], expected[name], rtol=rtol, atol=rtol * 1e-6, err_msg=name
        )


def costs_of(cloud, run) -> list[float]:
    "Cost per epoch, as the run's results.json says."
    results = json.loads(cloud.bucket.get(f"training_results/{run}/results.json"))
    return [value["cost"] for name, value in results.items() if name.startswith("epoch")]


@pytest.fixture(scope="module")
def drawn_data(drawn_data, tmp_path_factory):
    "The pictures that the project draws, at a quarter of their width."
    found, path = data.read(drawn_data), tmp_path_factory.mktemp("drawn") / "datasets.h5"
    means = lambda x: x.reshape(len(x), 16, 4, 16, 4, 3).mean((2, 4)).astype(np.uint8)
    small = found._replace(train_x=means(found.train_x), test_x=means(found.test_x))
    data.write(small, path)
    return path


@pytest.fixture(scope="module")
def fifty_epochs(parameters, request):
    "Each data set, the network that is trained on it for 50 epochs, and what plain NumPy makes of it; looked up by name."
    networks = {
        "real": parameters(epochs=50),
        "drawn": parameters((6, 4, 3, 1), "leaky_relu", epochs=50, seed=3, learning_rate=0.05),
    }
    known = {}

    def look_up(kind: str, aggregation: str):
        path = request.getfixturevalue(f"{kind}_data")
        chosen = msgspec.structs.replace(networks[kind], aggregation=aggregation)
        if (kind, aggregation) not in known:
            known[kind, aggregation] = numpy_reference(chosen, path)
        return path, chosen, known[kind, aggregation]

    return look_up


@pytest.mark.parametrize(
    "kind, granularity, aggregation",
    [*product(["drawn", "real"], GRANULARITIES, AGGREGATIONS)],
)
def test_fifty_epochs_of_handlers_equal_plain_numpy(
    kind, granularity, aggregation, cloud, fifty_epochs, start_run, finished, weights_of
):
    path, chosen, (costs, expected) = fifty_epochs(kind, aggregation)
    chosen = msgspec.structs.replace(chosen, granularity=granularity)
    run = start_run(cloud, f"{kind}-{granularity}-{aggregation}", chosen, path)
    plan = finished(cloud, run)
    assert_equal_weights(weights_of(cloud, run), expected)
    np.testing.assert_allclose(costs_of(cloud, run), costs, rtol=1e-9)
    assert sum(
        count.attempts for count in cloud.services.ledger.counts(plan).values()
    ) == 1 + 50 * invocations_per_epoch(plan)


RULES = {
    "momentum": {"name": "momentum"},
    "adam": {"name": "adam"},
    "weight decay": {"l2": 0.01},
}


@pytest.mark.parametrize("rule, aggregation", [*product(RULES, AGGREGATIONS)])
def test_every_rule_by_handlers_equals_plain_numpy(
    rule, aggregation, cloud, parameters, small_data, start_run, finished, weights_of
):
    chosen = parameters(
        (4, 3, 1),
        "tanh",
        epochs=10,
        optimizer=RULES[rule],
        aggregation=aggregation,
        learning_rate=0.01,
    )
    run = start_run(cloud, f"{rule}-{aggregation}", chosen, small_data)
    finished(cloud, run)
    assert_equal_weights(weights_of(cloud, run), numpy_reference(chosen, small_data)[1])


@pytest.mark.parametrize("kind, granularity", [*product(sorted(ACTIVATIONS), GRANULARITIES)])
def test_every_activation_by_handlers_equals_plain_numpy(
    kind, granularity, cloud, parameters, small_data, start_run, finished, weights_of
):
    chosen = parameters((4, 3, 1), kind, epochs=6, batch_size=50, granularity=granularity)
    run = start_run(cloud, f"bent-{kind}-{granularity}", chosen, small_data)
    finished(cloud, run)
    assert_equal_weights(weights_of(cloud, run), numpy_reference(chosen, small_data)[1])


def test_more_than_fifteen_mini_batches_work(
    cloud, parameters, small_data, start_run, finished, weights_of
):
    chosen = parameters((5, 1), batch_size=4, epochs=3)
    run = start_run(cloud, "many-batches", chosen, small_data)
    assert finished(cloud, run).batches == 42
    assert_equal_weights(weights_of(cloud, run), numpy_reference(chosen, small_data)[1])


def test_runs_at_the_same_time_leave_one_another_alone(
    cloud, parameters, small_data, start_run, finished, weights_of
):
    every = [
        parameters((5, 1), epochs=20, seed=seed, granularity=granularity)
        for seed, granularity in enumerate(GRANULARITIES)
    ]
    runs = [
        start_run(cloud, f"together-{chosen.seed}", chosen, small_data) for chosen in every
    ]
    for run, chosen in zip(runs, every):
        finished(cloud, run)
        assert_equal_weights(weights_of(cloud, run), numpy_reference(chosen, small_data)[1])


def test_a_threshold_of_zero_never_ends_a_run(
    cloud, parameters, small_data, start_run, finished
):
    chosen = parameters(
        (1,),
        epochs=200,
        learning_rate=2,
        batch_size=256,
        optimizer={"name": "momentum"},
        granularity="network",
        threshold=0,
    )
    run = start_run(cloud, "no-threshold", chosen, small_data)
    finished(cloud, run)
    costs = costs_of(cloud, run)
    assert min(costs) < 1e-4 and len(costs) == 200
    assert cloud.services.runs.status(run).reason == "all 200 epochs are done"


def test_a_threshold_ends_a_run_at_the_first_epoch_that_reaches_it(
    cloud, parameters, small_data, start_run, finished, weights_of
):
    chosen = parameters((5, 1), epochs=60, learning_rate=0.05, granularity="layer")
    costs, _ = numpy_reference(chosen, small_data)
    chosen = msgspec.structs.replace(chosen, threshold=sorted(costs)[30])
    reference, expected = numpy_reference(chosen, small_data)
    assert 1 < len(reference) < 60
    run = start_run(cloud, "threshold", chosen, small_data)
    finished(cloud, run)
    assert len(costs_of(cloud, run)) == len(reference)
    assert (
        cloud.services.runs.status(run).reason
        == f"the cost is at or below the threshold of {chosen.threshold:g}"
    )
    assert_equal_weights(weights_of(cloud, run), expected)


def test_patience_ends_a_run_and_keeps_the_best_epoch(
    cloud, parameters, small_data, start_run, finished, weights_of
):
    chosen = parameters(
        (5, 1),
        epochs=300,
        learning_rate=0.5,
        granularity="network",
        validation_fraction=0.3,
        patience=5,
    )
    run = start_run(cloud, "patience", chosen, small_data)
    plan = finished(cloud, run)
    status = cloud.services.runs.status(run)
    assert (
        status.reason == "the validation cost has not improved for 5 epochs"
        and status.epoch == status.best_epoch + 5
    )
    found = data.read(small_data)
    kept, held = sampling.split(167, 0.3, 0)
    X = sampling.standardise(found.train_x)
    best = [layers for _, layers in network.train(chosen, X[kept], found.train_y[kept])][
        status.best_epoch
    ]
    assert plan.images == len(kept) == 117 and len(held) == 50
    assert_equal_weights(
        weights_of(cloud, run),
        {
            name: array
            for name, array in sorted(
                (f"{name}{l}", array)
                for l, layer in enumerate(best, start=1)
                for name, array in zip("Wb", layer)
            )
        },
    )


@pytest.mark.parametrize("granularity, aggregation", [*product(GRANULARITIES, AGGREGATIONS)])
def test_a_run_that_diverges_fails_and_says_where(
    granularity, aggregation, cloud, parameters, small_data, start_run, until
):
    chosen = parameters(
        (5, 1),
        epochs=50,
        learning_rate=1e308,
        granularity=granularity,
        aggregation=aggregation,
    )
    run = start_run(cloud, f"diverges-{granularity}-{aggregation}", chosen, small_data)
    status = until(
        lambda: (s := cloud.services.runs.status(run)).state != "running" and s,
        "the run has ended",
    )
    assert status.state == "failed"
    assert (
        status.reason.startswith("epoch ")
        and "a learning rate below 1e+308 may help" in status.reason
    )
    left = {key.split("/")[-1] for key in cloud.bucket.keys(f"training_results/{run}/")}
    assert not left & {"params.h5", "results.json"}


@pytest.mark.parametrize("granularity, aggregation", [*product(GRANULARITIES, AGGREGATIONS)])
def test_a_run_that_diverges_in_its_last_epoch_leaves_no_model(
    granularity, aggregation, cloud, parameters, small_data, start_run, weights_of, until
):
    states = set()
    for epochs in (1, 2, 3):  # one of them is the one in which the weights become infinite
        chosen = parameters(
            (5, 1),
            epochs=epochs,
            learning_rate=1e308,
            granularity=granularity,
            aggregation=aggregation,
        )
        run = start_run(
            cloud, f"diverges-last-{granularity}-{aggregation}-{epochs}", chosen, small_data
        )
        status = until(
            lambda: (s := cloud.services.runs.status(run)).state != "running" and s,
            "the run has ended",
        )
        states.add(status.state)
        if status.state == "failed":
            assert not cloud.bucket.keys(f"training_results/{run}/params.h5")
            continue
        found = weights_of(cloud, run)
        assert all(np.isfinite(array).all() for array in found.values()), (
            f"after {epochs} epochs"
        )
    assert "failed" in states, "no run diverged, so nothing was tested"


# Same bytes


def test_a_run_leaves_the_same_bytes_with_any_number_of_workers_and_when_repeated(
    cloud, parameters, small_data, start_run, finished, weights_of
):
    chosen, left = (
        parameters((5, 3, 1), epochs=4, granularity="neuron", aggregation="mean"),
        [],
    )

    def twice(cloud: LocalCloud) -> int:
        "Two runs in a cloud, with how many workers?"
        for folder in ("once", "twice"):
            run = start_run(cloud, folder, chosen, small_data)
            finished(cloud, run)
            left.append(
                {name: array.tobytes() for name, array in weights_of(cloud, run).items()}
            )
        return len(cloud.workers.processes)

    for workers in {1, 2, 3} - {twice(cloud)}:
        with LocalCloud(workers) as another:
            assert twice(another) == workers
    assert len(left) >= 6 and len(left[0]) == 6 and all(other == left[0] for other in left)


# Memory


@pytest.fixture(scope="module")
def memory(parameters, small_data, start_run, finished):
    "Bytes that a parameter server uses when a run has ended, by granularity and epochs; the runs with few epochs go first."
    chosen, used = parameters((3, 1), batch_size=256), {}
    with LocalCloud() as cloud:
        for epochs, granularity in product((50, 500), ("layer", "network")):
            case = msgspec.structs.replace(chosen, epochs=epochs, granularity=granularity)
            run = start_run(cloud, f"{granularity}, {epochs} epochs", case, small_data)
            finished(cloud, run)
            server = cloud.services.store.client.info("memory")
            used[granularity, epochs] = server["used_memory"]
    return used


@pytest.mark.parametrize("granularity", ["layer", "network"])
def test_the_servers_memory_does_not_grow_with_epochs(granularity, memory):
    assert memory[granularity, 500] <= 1.1 * memory[granularity, 50]


# Invocations


def messages_of_epoch(plan, epoch: int) -> list:
    "Every message of an epoch, as the functions send them one after another."
    starts = epoch_messages(plan, epoch, "")
    found = [m for start in starts for stage in stages(plan, start) for m in stage]
    return [*found, *after_epoch(plan, found[0])]


@pytest.fixture(scope="module", params=["small", "real"])
def counted(request, cloud, parameters, start_run, finished):
    "A run of three epochs, neuron by neuron, over 167 images: its plan."
    path = request.getfixturevalue(f"{request.param}_data")
    assert len(data.read(path).train_x) == 167
    return finished(
        cloud,
        start_run(
            cloud, f"counted-{request.param}", parameters(epochs=3, granularity="neuron"), path
        ),
    )


def test_an_epoch_of_167_images_is_226_invocations(counted):
    neurons, trainer_steps, batches = 20 + 7 + 5 + 1, 2 * 4 + 1, 3
    assert invocations_per_epoch(counted) == 1 + batches * (2 * neurons + trainer_steps) == 226
    assert len({message.id for message in messages_of_epoch(counted, 2)}) == 226


def test_the_ledger_counts_exactly_these(cloud, counted, until):
    counts = until(
        lambda: (
            (found := cloud.services.ledger.counts(counted))["LaunchLambda"].finished == 4
            and found
        ),
        "the last epoch is recorded",
    )
    assert {
        name: (count.attempts, count.finished, count.duplicates)
        for name, count in counts.items()
    } == {
        "LaunchLambda": (1 + 3, 1 + 3, 0),
        "TrainerLambda": (3 * 27, 3 * 27, 0),
        "NeuronLambda": (3 * 198, 3 * 198, 0),
    }
    assert sum(count.attempts for count in counts.values()) == 1 + 3 * 226


def test_the_run_reports_the_number(cloud, counted):
    record = json.loads(cloud.bucket.get(f"training_results/{counted.run}/run.json"))
    assert sum(count["attempts"] for count in record["invocations"].values()) == 1 + 3 * 226


def test_each_invocation_of_the_last_epoch_is_in_the_ledger_once(cloud, counted, until):
    entries = lambda: [
        cloud.services.ledger.entry(message) for message in messages_of_epoch(counted, 2)
    ]
    until(lambda: all(entry.finished for entry in entries()), "every invocation has finished")
    assert {entry.attempts for entry in entries()} == {1} and len(entries()) == 226


@pytest.fixture(scope="module")
def in_dynamodb(parameters, small_data, start_run, finished):
    "A cloud whose ledger is in DynamoDB, and the plan of a run on it: 2 epochs, 3 mini-batches, 4 neurons in 2 layers."
    with LocalCloud(ledger="dynamodb") as cloud:
        yield (
            cloud,
            finished(
                cloud,
                start_run(
                    cloud,
                    "dynamodb",
                    parameters((3, 1), epochs=2, granularity="neuron"),
                    small_data,
                ),
            ),
        )


def items(cloud, table: str) -> list[dict]:
    "All items of a table in DynamoDB."
    pages = cloud.aws.client("dynamodb").get_paginator("scan").paginate(TableName=table)
    return [item for page in pages for item in page["Items"]]


def test_the_tables_hold_one_item_per_invocation(in_dynamodb, until):
    cloud, plan = in_dynamodb
    until(
        lambda: sum("finished" in item for item in items(cloud, "LaunchLambda")) == 3,
        "the last epoch is recorded",
    )
    expected = {"LaunchLambda": 1 + 2, "TrainerLambda": 2 * 3 * 5, "NeuronLambda": 2 * 3 * 8}
    for table, count in expected.items():
        found = items(cloud, table)
        assert len(found) == count and all(
            item["cnt"]["N"] == "1" and item["attempts"]["N"] == "1" for item in found
        )


def test_the_tables_name_the_messages(in_dynamodb):
    cloud, plan = in_dynamodb
    ids = {
        item["invID"]["S"]
        for table in ("TrainerLambda", "NeuronLambda")
        for item in items(cloud, table)
    }
    assert ids == {
        message.id
        for epoch in (0, 1)
        for message in messages_of_epoch(plan, epoch)
        if message.batch != ALL
    }


def test_the_costs_table_holds_what_the_store_holds(in_dynamodb):
    cloud, plan = in_dynamodb
    found = {
        int(item["epoch"]["N"]): [float(item[f"batch{batch}"]["S"]) for batch in range(3)]
        for item in items(cloud, "Costs")
    }
    stored = cloud.services.store.read(
        plan.run, ALL, 1, [f"cost/{batch}" for batch in range(3)]
    )
    assert found[1] == [float(decode(value)[0]) for value in stored]
    assert [min(costs) for _, costs in sorted(found.items())] == costs_of(cloud, plan.run)


def test_the_ledger_in_dynamodb_answers_as_the_other_does(in_dynamodb):
    cloud, plan = in_dynamodb
    ledger = cloud.services.ledger
    assert all(
        ledger.entry(message).finished
        for epoch in (0, 1)
        for message in messages_of_epoch(plan, epoch)
    )
    assert ledger.counts(plan)["NeuronLambda"].finished == 2 * 3 * 8


def test_what_is_copied_is_whole_and_nothing_is_left_of_what_was_cut_short(
    tmp_path, monkeypatch
):
    path, write = tmp_path / "training_data" / "run.npz", Path.write_bytes

    def cut_short(path: Path, content: bytes) -> None:
        write(path, content[:2])
        raise KeyboardInterrupt

    training._write_whole(path, b"before")
    monkeypatch.setattr(Path, "write_bytes", cut_short)
    with pytest.raises(KeyboardInterrupt):
        training._write_whole(path, b"after")
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"before"]
