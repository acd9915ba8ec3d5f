"""Packages are built once, for the interpreter that runs the tests, from wheels that the cache folder keeps."""

import numpy as np
import pytest

from snn.data import h5 as data
from snn.deploy.inputs import Account, Inputs
from snn.deploy.package import build
from snn.deploy.wheels import here
from snn.maths.parameters import from_dict

CONNECTION = "arn:aws:codeconnections:eu-west-1:123456789012:connection/12345678-1234-1234-1234-123456789012"


@pytest.fixture(scope="session")
def packages():
    return {name: build(name, here()) for name in ("training", "launch")}


@pytest.fixture
def inputs():
    return Inputs("cats-of-2026", "Cats", "somebody", CONNECTION, "somebody@example.com")


@pytest.fixture
def account(aws):
    return Account("us-east-1", aws.url)


@pytest.fixture(scope="session")
def parameters():
    "Of a small network."
    return from_dict(
        {
            "epochs": 3,
            "layers": 2,
            "neurons": {"layer1": 3, "layer2": 1},
            "learning_rate": 0.1,
            "batch_size": 10,
            "activations": {"layer1": "relu", "layer2": "sigmoid"},
            "threshold": 0,
        }
    )


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    "Path of a small data set."
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "datasets.h5"
    pictures = lambda m: rng.integers(0, 256, (m, 8, 8, 3), dtype=np.uint8)
    data.write(
        data.Datasets(pictures(20), np.arange(20) % 2, pictures(4), np.arange(4) % 2), path
    )
    return path
