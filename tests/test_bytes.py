"""The model of a run is the same to the byte as it was when these hashes were written down."""

import hashlib
import json
import sys
import tempfile
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest

from snn.cloud.services import services_of
from snn.data import h5 as data
from snn.data import models
from snn.handlers.invocation import forget
from snn.handlers.protocol import handle
from snn.handlers.upload import handle_uploads
from snn.lab.faults import SMALL, Schedule, run_in_lab, small_datasets
from snn.local.server import parameter_server
from snn.maths import network, sampling
from snn.maths.parameters import from_dict

WRITTEN = Path(__file__).with_suffix(".json")
GRANULARITIES = ("neuron", "layer", "network")
OPTIMIZERS = {
    "sgd": {"name": "sgd"},
    "momentum": {"name": "momentum", "l2": 0.01},
    "adam": {"name": "adam"},
}
RUNS = {
    f"{aggregation} {optimizer}": {"aggregation": aggregation, "optimizer": settings}
    for aggregation, (optimizer, settings) in product(("best", "mean"), OPTIMIZERS.items())
} | {
    "single": {"dtype": "float32", "seed": 5},
    "validation": {"validation_fraction": 0.25, "patience": 2, "batch_size": 5},
}


def digest(layers) -> str:
    "A fingerprint of all weights and biases."
    return hashlib.sha256(
        b"".join(a.tobytes() for W, b, *_ in layers for a in (W, b))
    ).hexdigest()


def plain_numpy(parameters, content: bytes) -> str:
    "What the reference gives on this machine: another BLAS may round the last bit otherwise."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "datasets.h5")
        path.write_bytes(content)
        found = data.read(path)
    X = sampling.standardise(found.train_x, parameters.dtype)
    *_, (_, layers) = network.train(parameters, X, found.train_y)
    return digest(layers)


def handlers(parameters, content: bytes, url: str) -> str:
    "What a run leaves in params.h5."
    forget()
    return digest(run_in_lab(Schedule(0, ()), url, parameters, content).layers)


@pytest.fixture(scope="module")
def server():
    with parameter_server() as started:
        yield started


def written_here(name: str, content: bytes) -> dict[str, str]:
    "The hashes that were written where plain NumPy rounds as it does on this machine."
    plain = plain_numpy(chosen(name), content)
    for written in json.loads(WRITTEN.read_text())[name]:
        if written["plain NumPy"] == plain:
            return written
    pytest.skip("plain NumPy rounds otherwise on this machine than where hashes were written")


def chosen(name: str, **changes):
    return from_dict({**SMALL, "epochs": 3, **RUNS[name], **changes})


@pytest.mark.parametrize("name", RUNS)
def test_the_bytes_of_a_model_are_those_of_before(name, server):
    content = small_datasets()
    written = written_here(name, content)
    for granularity in GRANULARITIES:
        found = handlers(chosen(name, granularity=granularity), content, server.url)
        assert found == written[granularity], granularity


def in_memory(parameters, content: bytes) -> str:
    "What a run leaves in params.h5 on a backend that is two chapters, without any server."
    forget()
    services = services_of({"SNN_BACKEND": "memory"})
    bucket = services.bucket("cats")
    bucket.put("training_input/datasets.h5", content)
    bucket.put("training_input/parameters.json", msgspec.json.encode(parameters))
    _, etag = bucket.read("training_input/datasets.h5")
    event = {"upload": {"bucket": "cats", "key": "training_input/datasets.h5", "etag": etag}}
    assert handle_uploads(services.uploads(event), services) == []
    services.bus.deliver(lambda message: handle(message, services))
    (run,) = services.runs.names()
    assert services.runs.status(run).state == "finished"
    counts = services.ledger.counts(services.runs.plan(run)).values()
    assert sum(count.finished for count in counts) == sum(count.attempts for count in counts)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "params.h5").write_bytes(bucket.get("prediction_input/params.h5"))
        return digest(models.read(f"{folder}/params.h5").layers)


@pytest.mark.parametrize("name", RUNS)
def test_another_backend_is_a_folder_and_leaves_the_same_bytes(name):
    content = small_datasets()
    written = written_here(name, content)
    for granularity in GRANULARITIES:
        found = in_memory(chosen(name, granularity=granularity), content)
        assert found == written[granularity], granularity


def write(server, others: dict[str, list[dict[str, str]]]) -> None:
    "Write the hashes of this machine down, beside those of other kinds of machines."
    content, found = small_datasets(), {}
    for name in RUNS:
        here = {"plain NumPy": plain_numpy(chosen(name), content)}
        for granularity in GRANULARITIES:
            here[granularity] = handlers(
                chosen(name, granularity=granularity), content, server.url
            )
        found[name] = [*(w for w in others.get(name, []) if w != here), here]
    WRITTEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    # --another: on a machine that rounds otherwise; without it, a change of the numbers is wanted,
    # and the hashes of other machines are of no use any more.
    with parameter_server() as opened:
        np.seterr(all="ignore")
        write(opened, json.loads(WRITTEN.read_text()) if "--another" in sys.argv else {})
