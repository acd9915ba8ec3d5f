"""Whatever goes wrong, by a seeded schedule, a run ends with the bytes that it would have had."""

from functools import lru_cache

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from snn.handlers import checkpoint
from snn.lab.faults import (
    KINDS,
    SMALL,
    Died,
    LabBucket,
    Schedule,
    run_in_lab,
    same,
    small_datasets,
)
from snn.local.server import parameter_server
from snn.maths import parameters as parameters_file
from snn.maths.parameters import from_dict


@pytest.fixture(scope="module")
def server():
    with parameter_server() as started:
        yield started


CHANCE = {  # all that differs from epoch to epoch, and checkpoints as often as can be
    "augment": {"flip": True, "shift": 2},
    "dropout": {"inputs": 0.3, "hidden": 0.2},
    "standardise": "mean",
    "schedule": "linear",
    "checkpoint_every": 0,
    "checkpoint_seconds": 1e-6,
}


@lru_cache(maxsize=32)
def in_peace(url: str, granularity: str, aggregation: str, chance: bool = False):
    "The run that nothing happened to."
    chosen = small(granularity, aggregation, chance)
    return run_in_lab(Schedule(0, ()), url, chosen, small_datasets())


def small(granularity: str, aggregation: str, chance: bool = False):
    changes = {"granularity": granularity, "aggregation": aggregation}
    return from_dict({**SMALL, **changes, **(CHANCE if chance else {})})


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_fault_is_really_injected_and_survived(server, kind):
    peace = in_peace(server.url, "neuron", "best")
    result = run_in_lab(
        Schedule(1, (kind,), 0.3), server.url, small("neuron", "best"), small_datasets()
    )
    assert result.injected[kind] > 0
    assert same(result.layers, peace.layers)


def check(
    url: str, granularity: str, aggregation: str, schedule: Schedule, chance: bool = False
) -> None:
    chosen = small(granularity, aggregation, chance)
    result = run_in_lab(schedule, url, chosen, small_datasets())
    assert same(result.layers, in_peace(url, granularity, aggregation, chance).layers), (
        schedule
    )


@pytest.mark.parametrize("aggregation", ["best", "mean"])
@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
def test_what_is_drawn_at_random_is_the_same_after_any_fault(server, granularity, aggregation):
    for seed in range(2):
        check(server.url, granularity, aggregation, Schedule(seed, KINDS, 0.1), chance=True)


@pytest.mark.timeout(3600)
def test_any_schedule_of_faults_ends_with_the_same_bytes(server, all_faults):
    @settings(
        max_examples=200 if all_faults else 24,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(
        st.sampled_from(["neuron", "layer", "network"]),
        st.sampled_from(["best", "mean"]),
        st.builds(
            Schedule,
            st.integers(0, 10**6),
            st.lists(st.sampled_from(KINDS), min_size=1, unique=True).map(tuple),
            st.floats(0.01, 0.15),
        ),
        st.booleans(),
    )
    def survives(granularity, aggregation, schedule, chance):
        check(server.url, granularity, aggregation, schedule, chance)

    survives()


def test_messages_of_a_run_that_the_server_has_forgotten_twice_do_not_reach_the_third(server):
    check(
        server.url,
        "neuron",
        "best",
        Schedule(
            37, ("duplicate", "die", "lose", "delay", "amnesia", "twins", "refuse"), 0.067036
        ),
    )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
def test_the_default_network_survives_on_photographs(
    server, all_faults, real_data, root, granularity
):
    epochs, seeds = (30, range(5)) if all_faults else (3, range(1))
    chosen = msgspec.structs.replace(
        parameters_file.read(root / "parameters.json"),
        granularity=granularity,
        epochs=epochs,
        checkpoint_every=10,
        threshold=0.0,
    )
    datasets = real_data.read_bytes()
    peace = run_in_lab(Schedule(0, ()), server.url, chosen, datasets)
    for seed in seeds:
        assert same(
            run_in_lab(Schedule(seed, KINDS, 0.02), server.url, chosen, datasets).layers,
            peace.layers,
        ), seed


def test_a_fifth_of_all_events_duplicated_costs_less_than_a_third_more_invocations(server):
    peace = in_peace(server.url, "neuron", "best")
    result = run_in_lab(
        Schedule(3, ("duplicate",), 0.2), server.url, small("neuron", "best"), small_datasets()
    )
    assert result.injected["duplicate"] > 0.1 * peace.invocations
    assert result.invocations <= 1.3 * peace.invocations
    assert same(result.layers, peace.layers)


@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
def test_with_a_fifth_of_all_events_duplicated_the_ledger_shows_each_finished_invocation_once(
    server, monkeypatch, granularity
):
    put, left = LabBucket.put, []

    def keep(bucket, key, content):
        if key.endswith("/run.json"):
            left.append(msgspec.json.decode(content)["invocations"])
        put(bucket, key, content)

    monkeypatch.setattr(LabBucket, "put", keep)
    _, result = (
        run_in_lab(schedule, server.url, small(granularity, "best"), small_datasets())
        for schedule in (Schedule(0, ()), Schedule(3, ("duplicate",), 0.2))
    )
    peace, duplicated = left
    assert {name: count["finished"] for name, count in duplicated.items()} == {
        name: count["finished"] for name, count in peace.items()
    }
    assert (
        result.injected["duplicate"] > 0
        and sum(count["finished"] for count in peace.values()) > 0
    )


@pytest.mark.parametrize("kept", range(5))
def test_a_run_that_dies_between_two_of_its_last_files_leaves_them_all_though_the_server_has_forgotten_it(
    server, monkeypatch, kept
):
    peace, put, seen = in_peace(server.url, "neuron", "best"), LabBucket.put, []

    def dies_once(bucket, key, content):
        of_the_end = key.startswith(("training_results/", "prediction_input/"))
        if of_the_end and "/answers/" not in key:
            seen.append(key)
        if len(seen) == kept + 1:
            seen.append("death")
            with redis.Redis.from_url(server.url) as client:
                client.flushall()
            raise Died
        put(bucket, key, content)

    monkeypatch.setattr(LabBucket, "put", dies_once)
    result = run_in_lab(Schedule(0, ()), server.url, small("neuron", "best"), small_datasets())
    assert (
        seen[kept + 1] == "death"
        and len(seen) == kept + 2 + 5
        and seen[-1].endswith("/run.json")
    )
    assert result.mended == 1 and same(result.layers, peace.layers)


def test_a_run_that_two_take_up_at_the_same_moment_goes_on_once(server, monkeypatch):
    peace, restore, resume, taken = (
        in_peace(server.url, "neuron", "best"),
        checkpoint._restore,
        checkpoint.resume,
        [],
    )

    def both(plan, content, services):
        monkeypatch.setattr(checkpoint, "_restore", restore)
        taken.clear()
        assert (
            checkpoint.resume(plan.name, services.bucket("lab"), services) != plan.run
        )  # the other one, while this one is at it
        return restore(plan, content, services)

    def resumed(name, bucket, services):
        taken.append(resume(name, bucket, services))
        for run in (
            services.runs.names()
        ):  # whoever looks sees one that goes on, and never that all have stopped
            assert services.runs.status(run).state == (
                "running" if run == services.runs.newest(name) else "stopped"
            )
        return taken[-1]

    monkeypatch.setattr(checkpoint, "_restore", both)
    monkeypatch.setattr(checkpoint, "resume", resumed)
    result = run_in_lab(
        Schedule(4, ("amnesia",), 0.2), server.url, small("neuron", "best"), small_datasets()
    )
    assert checkpoint._restore is restore and len(taken) > 1 and taken[0] == taken[1], (
        "both say the same"
    )
    assert same(result.layers, peace.layers)
