"""Functions that stay: in their packages, in Lambda's own client, with the weights of those that are invoked anew for each message."""

import json
import os
import signal

import h5py
import msgspec
import pytest

from snn.local import lambda_runtime
from snn.local.lambda_runtime import LambdaWorkers
from snn.local.training import train


def weights(path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: file[name][()].tobytes() for name in file}


@pytest.fixture(scope="module")
def inline(tmp_path_factory, parameters, datasets):
    "The weights that the handlers leave, called as functions; by number of epochs."

    def make(epochs: int, granularity: str):
        chosen = msgspec.structs.replace(parameters, epochs=epochs, granularity=granularity)
        return weights(
            train(chosen, datasets, tmp_path_factory.mktemp("inline"), workers=2).files[
                "params.h5"
            ]
        )

    return make


@pytest.fixture
def events(monkeypatch):
    "Every event that a function is invoked with."
    found, put = [], lambda_runtime.Pool.put

    def recorded(self, work):
        found.append((self.function.name, json.loads(work.event), self))
        put(self, work)

    monkeypatch.setattr(lambda_runtime.Pool, "put", recorded)
    return found


def calls(events, function: str) -> list[int]:
    "The seats that a function was asked to take."
    return sorted(
        event["number"]
        for name, event, _ in events
        if name == function and event.get("state") == "stay"
    )


@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
def test_functions_that_stay_train_to_the_same_bytes_and_are_invoked_once(
    granularity, tmp_path, packages, parameters, datasets, inline, events, monkeypatch
):
    monkeypatch.setattr(
        LambdaWorkers, "every", 1e6
    )  # no watchdog calls a second time, should the first come late
    chosen = msgspec.structs.replace(
        parameters, granularity=granularity, epochs=12, residents=2
    )
    outcome = train(chosen, datasets, tmp_path, runtime="lambda")
    assert (
        weights(outcome.files["params.h5"]) == inline(12, granularity)
        and outcome.duplicates == 0
    )
    assert calls(events, "NeuronLambda") == [0, 1] and calls(events, "LaunchLambda") == [0]
    assert calls(events, "TrainerLambda") == ([] if granularity == "network" else [0, 1])
    assert not [
        event for _, event, _ in events if event.get("function") and "state" not in event
    ]  # all messages went through the queues


def test_a_function_calls_its_successor_before_its_time_is_up(
    tmp_path, packages, parameters, datasets, inline, events, monkeypatch
):
    monkeypatch.setattr(
        LambdaWorkers, "timeout", 5.9
    )  # so little that it calls its successor as soon as it has looked for messages once
    monkeypatch.setattr(LambdaWorkers, "every", 1e6)  # no watchdog calls anybody
    chosen = msgspec.structs.replace(parameters, granularity="network", epochs=60, residents=1)
    outcome = train(chosen, datasets, tmp_path, runtime="lambda")
    assert weights(outcome.files["params.h5"]) == inline(60, "network")
    assert len(calls(events, "NeuronLambda")) > 1 and len(calls(events, "LaunchLambda")) > 1


def test_a_function_that_is_killed_is_replaced_and_nothing_is_lost(
    tmp_path, packages, parameters, datasets, inline, events, monkeypatch
):
    monkeypatch.setattr(LambdaWorkers, "every", 0.5)
    chosen = msgspec.structs.replace(
        parameters, granularity="layer", epochs=250, residents=2, stall_after=2.0
    )
    killed = []

    def kill(progress) -> None:
        "One NeuronLambda and the LaunchLambda, in the middle of the run."
        if progress.status.epoch < 20 or killed:
            return
        for pool in {
            pool
            for name, event, pool in events
            if name != "TrainerLambda" and event.get("state") == "stay"
        }:
            environment = next(
                e for e in pool.environments if e.work and b"stay" in e.work.event
            )
            os.kill(environment.process.pid, signal.SIGKILL)
            killed.append(pool.function.name)

    outcome = train(chosen, datasets, tmp_path, kill, runtime="lambda")
    assert sorted(killed) == ["LaunchLambda", "NeuronLambda"]
    assert weights(outcome.files["params.h5"]) == inline(250, "layer")
